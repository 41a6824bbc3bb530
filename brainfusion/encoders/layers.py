"""Layers that the encoders share: the pre-norm transformer block and sine-cosine position tables.

Shape legend: b recordings, n tokens, h heads, d width.
"""

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F


class Attention(nn.Module):
    """Multi-head self-attention; queries, keys and values come from one Linear."""

    def __init__(self, dim: int, n_heads: int, *, qkv_bias: bool = True) -> None:
        super().__init__()
        if dim % n_heads:
            raise ValueError(f"width {dim} is not a multiple of {n_heads} heads.")
        self.n_heads = n_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        """Attend over the tokens of each recording."""
        q, k, v = self._heads(x)
        context = F.scaled_dot_product_attention(q, k, v)
        return self.proj(context.transpose(1, 2).flatten(2))

    def weights(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b h n n"]:
        """The attention map itself, materialised: for inspection, not for training."""
        q, k, _ = self._heads(x)
        return (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1)

    def _heads(self, x: Float[Tensor, "b n d"]) -> tuple[Tensor, Tensor, Tensor]:
        b, n, d = x.shape
        qkv = self.qkv(x).reshape(b, n, 3, self.n_heads, d // self.n_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each (b, h, n, d / h)
        return q, k, v


class MLP(nn.Module):
    """Linear, GELU by the error function, Linear."""

    def __init__(self, dim: int, dim_hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, dim_hidden)
        self.fc2 = nn.Linear(dim_hidden, dim)

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        """Apply to each token."""
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """A pre-norm transformer block: attention and MLP, each on a normalised copy."""

    def __init__(
        self, dim: int, n_heads: int, *, dim_hidden: int, eps: float, qkv_bias: bool = True
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attn = Attention(dim, n_heads, qkv_bias=qkv_bias)
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = MLP(dim, dim_hidden)

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        """Add the two branches."""
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


def sincos_table(positions: np.ndarray, dim: int) -> Float[Tensor, "n d"]:
    """Sines then cosines of each position, `dim / 2` frequencies each.

    Computed in float64 and stored in float32, as MAE's and Brain-JEPA's tables are.
    """
    if dim % 2:
        raise ValueError(f"a sine-cosine table needs an even width, got {dim}.")
    omega = 10000.0 ** (-np.arange(dim // 2, dtype=np.float64) / (dim / 2.0))
    angle = positions.astype(np.float64)[:, None] * omega
    return torch.from_numpy(np.concatenate([np.sin(angle), np.cos(angle)], axis=1)).float()
