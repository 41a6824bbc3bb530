"""Layers that the encoders share: the pre-norm transformer block and sine-cosine position tables.

Shape legend: b recordings, n tokens, q tokens whose output is wanted, h heads, d width.
"""

from collections.abc import Callable, Iterable
from functools import partial

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from brainfusion.encoders.products import Linear, attention, linear

CHUNK = 2**20
"""Hidden activations of an MLP that are computed at a time where no gradient is kept."""


class Attention(nn.Module):
    """Multi-head self-attention; queries, keys and values come from one Linear."""

    def __init__(self, dim: int, n_heads: int, *, qkv_bias: bool = True) -> None:
        super().__init__()
        if dim % n_heads:
            raise ValueError(f"width {dim} is not a multiple of {n_heads} heads.")
        self.n_heads = n_heads
        self.qkv = Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = Linear(dim, dim)

    def forward(
        self, x: Float[Tensor, "b n d"], queries: Float[Tensor, "b q d"] | None = None
    ) -> Float[Tensor, "b q d"]:
        """Attend over the tokens of each recording, from all of them or from `queries` alone."""
        if queries is None:
            q, k, v = self._heads(self.qkv(x), 3)
        else:
            dim, weight, bias = x.shape[-1], self.qkv.weight, self.qkv.bias
            of_q, of_kv = (None, None) if bias is None else (bias[:dim], bias[dim:])
            (q,) = self._heads(linear(queries, weight[:dim], of_q), 1)
            k, v = self._heads(linear(x, weight[dim:], of_kv), 2)
        return self.proj(attention(q, k, v).transpose(1, 2).flatten(2))

    def weights(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b h n n"]:
        """The attention map itself, materialised: for inspection, not for training."""
        q, k, _ = self._heads(self.qkv(x), 3)
        return (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1)

    def _heads(self, x: Float[Tensor, "b n f"], n_parts: int) -> tuple[Tensor, ...]:
        """Each part as (b, h, n, d / h)."""
        return x.unflatten(-1, (n_parts, self.n_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)


class MLP(nn.Module):
    """Linear, GELU by the error function, Linear."""

    def __init__(self, dim: int, dim_hidden: int) -> None:
        super().__init__()
        self.dim_hidden = dim_hidden
        self.fc1 = Linear(dim, dim_hidden)
        self.fc2 = Linear(dim_hidden, dim)

    def forward(self, x: Float[Tensor, "*b n d"]) -> Float[Tensor, "*b n d"]:
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

    def forward(
        self, x: Float[Tensor, "b n d"], queries: Float[Tensor, "b q d"] | None = None
    ) -> Float[Tensor, "b q d"]:
        """Add the two branches.

        Args:
            x: All tokens: those that are attended to.
            queries: Those of them whose output is wanted, for a last block; all if omitted.
        """
        if queries is None:
            x = x + self.attn(self.norm1(x))
        else:
            x = queries + self.attn(self.norm1(x), self.norm1(queries))
        return by_chunks(lambda rows: rows + self.mlp(self.norm2(rows)), x, self.mlp.dim_hidden)


def by_chunks(
    function: Callable[[Tensor], Tensor], x: Float[Tensor, "b n d"], dim_hidden: int
) -> Float[Tensor, "b n d"]:
    """`function(x)` of a function of each token alone.

    On a CPU without gradients some tokens at a time, so that `dim_hidden` activations of each stay
    in the cache and in memory that is used again.
    """
    n_rows = max(1, CHUNK // dim_hidden)
    if (
        torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or x.device.type != "cpu"
        or torch.is_autocast_enabled("cpu")  # would cast the weights for each of them
        or x.shape[:-1].numel() <= n_rows
    ):
        return function(x)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    parts = (y.flatten(0, -2).split(n_rows) for y in (x, out))
    for part, into in zip(*parts, strict=True):
        into.copy_(function(part))
    return out


def run_blocks(
    blocks: Iterable[nn.Module],
    x: Float[Tensor, "b n d"],
    *,
    checkpointing: bool,
    wanted: Callable[[Tensor], Tensor] | None = None,
    **options: bool,
) -> Float[Tensor, "b q d"]:
    """One block after the other.

    Args:
        blocks: Called with their input and `options`.
        x: The tokens.
        checkpointing: Compute what is inside a block again in the backward pass instead of keeping
            it: memory for one block instead of all, for a third more time.
        wanted: Takes the tokens whose output is wanted from the last block's input. The others are
            attended to there, but have no queries and no MLP.
        **options: Keyword arguments of each block.
    """
    *first, last = blocks
    for block in first:
        x = _run(block, x, checkpointing=checkpointing, **options)
    queries = () if wanted is None else (wanted(x),)
    return _run(last, x, *queries, checkpointing=checkpointing, **options)


def _run(block: nn.Module, *inputs: Tensor, checkpointing: bool, **options: bool) -> Tensor:
    if checkpointing and torch.is_grad_enabled():
        return checkpoint(partial(block, **options), *inputs, use_reentrant=False)
    return block(*inputs, **options)


def at_least_float32(x: Tensor) -> Tensor:
    """In float32 where it was bfloat16 or half: losses of autocast outputs are computed so."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def in_float32(layer: nn.Module, x: Tensor) -> Tensor:
    """A layer on numbers that bfloat16 would blur, such as coordinates: without autocast."""
    with torch.autocast(x.device.type, enabled=False):
        return layer(x)


def sincos_table(positions: np.ndarray, dim: int) -> Float[Tensor, "n d"]:
    """Sines then cosines of each position, `dim / 2` frequencies each.

    Computed in float64 and stored in float32, as MAE's and Brain-JEPA's tables are.
    """
    if dim % 2:
        raise ValueError(f"a sine-cosine table needs an even width, got {dim}.")
    omega = 10000.0 ** (-np.arange(dim // 2, dtype=np.float64) / (dim / 2.0))
    angle = positions.astype(np.float64)[:, None] * omega
    return torch.from_numpy(np.concatenate([np.sin(angle), np.cos(angle)], axis=1)).float()
