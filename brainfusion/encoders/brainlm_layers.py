"""BrainLM's transformer layer: post-norm, attention plus a convolution along the tokens.

Upstream file `brainlm_mae/modeling_brainlm.py` at commit b591d88d, re-implemented from its
formulas.

Differs from upstream: the convolution is a banded matrix product, not a grouped `conv2d`.
Besides being slower, that one has a wrong gradient: on CPUs with AVX512, oneDNN's float32 weight
gradient of a depthwise convolution with 65 taps misses contributions in its upper half (2 to 33% of
the largest entry at 65 to 3,393 tokens; torch 2.13), while float64, or oneDNN switched off, agree
with ours to rounding. Gradients that upstream computed on such CPUs have the error. What a
checkpoint computes is not affected. `convolution="grouped"` is upstream's operation.

Shape legend: b recordings, s sequence (CLS and tokens), h heads, d width, e width of a head,
l landmarks.
"""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from brainfusion.encoders.layers import MLP, at_least_float32, by_chunks
from brainfusion.encoders.products import Linear, attention
from brainfusion.runtime.errors import UserError

PINV_STEPS = 6
"""Iterations of the pseudo-inverse in Nystrom attention."""


class Layer(nn.Module):
    """A post-norm transformer layer."""

    def __init__(
        self,
        dim: int,
        n_heads: int,
        *,
        dim_hidden: int,
        n_landmarks: int | None,
        conv_kernel_size: int | None,
        convolution: Literal["blocks", "grouped"],
        qkv_bias: bool,
        dropout: float,
        eps: float,
    ) -> None:
        super().__init__()
        self.attention = ConvAttention(
            dim,
            n_heads,
            n_landmarks=n_landmarks,
            conv_kernel_size=conv_kernel_size,
            convolution=convolution,
            qkv_bias=qkv_bias,
        )
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.mlp = MLP(dim, dim_hidden)
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Float[Tensor, "b s d"], *, alone: bool = False) -> Float[Tensor, "b s d"]:
        """Attention, then the MLP, each followed by a LayerNorm of its sum with the input."""
        x = self.norm1(self.dropout(self.attention(x, alone=alone)) + x)
        return by_chunks(
            lambda rows: self.norm2(self.dropout(self.mlp(rows)) + rows), x, self.mlp.dim_hidden
        )


class ConvAttention(nn.Module):
    """Softmax or Nystrom attention plus, for each head, one filter over its values' sequence."""

    def __init__(
        self,
        dim: int,
        n_heads: int,
        *,
        n_landmarks: int | None,
        conv_kernel_size: int | None,
        convolution: Literal["blocks", "grouped"],
        qkv_bias: bool,
    ) -> None:
        super().__init__()
        self.n_heads, self.n_landmarks, self.convolution = n_heads, n_landmarks, convolution
        self.qkv = Linear(dim, 3 * dim, bias=qkv_bias)
        self.conv_weight = (
            None
            if conv_kernel_size is None
            else nn.Parameter(torch.zeros(n_heads, 1, conv_kernel_size, 1))
        )
        self.proj = Linear(dim, dim)

    def forward(self, x: Float[Tensor, "b s d"], *, alone: bool = False) -> Float[Tensor, "b s d"]:
        """Mix the tokens of each recording; `alone` is for `nystrom_attention`."""
        qkv = self.qkv(x).unflatten(-1, (3, self.n_heads, -1))  # (b, s, 3, h, e)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        if self.n_landmarks is None:
            context = attention(q, k, v)
        else:
            context = nystrom_attention(q, k, v, self.n_landmarks, alone=alone)
        if self.conv_weight is not None:
            context = context + self._convolve(v, self.conv_weight)
        return self.proj(context.transpose(1, 2).flatten(2))

    def _convolve(self, v: Float[Tensor, "b h s e"], weight: Tensor) -> Float[Tensor, "b h s e"]:
        if self.convolution == "grouped" and torch.is_grad_enabled():
            return F.conv2d(v, weight, padding=(weight.shape[2] // 2, 0), groups=self.n_heads)
        return convolve_tokens(v, weight)


def convolve_tokens(
    v: Float[Tensor, "b h s e"], weight: Float[Tensor, "h 1 taps 1"]
) -> Float[Tensor, "b h s e"]:
    """One filter a head along the sequence, zeros beyond its ends, the same for all channels.

    Equals `F.conv2d(v, weight, padding=(taps // 2, 0), groups=h)`, some 3 times faster. The
    sequence is cut into blocks of `size` tokens; outputs of a block need only it and the next one,
    so the filter is a banded matrix [size, 2 * size], half for each of the two, and the convolution
    two matrix products a head, with blocks, recordings and channels side by side.
    """
    (n_rows, n_heads, n_seq, width), taps = v.shape, weight.shape[2]
    size = max(taps - 1, 32)
    n_blocks = -(-n_seq // size) + 1
    padded = F.pad(v, (0, 0, taps // 2, n_blocks * size - n_seq - taps // 2))
    blocks = padded.unflatten(2, (n_blocks, size)).permute(1, 3, 2, 0, 4)
    blocks = blocks.reshape(n_heads, size, n_blocks, n_rows * width)
    # Row i of the band is the filter shifted right by i: rows are one shorter than its period.
    band = F.pad(weight.view(n_heads, taps), (0, 2 * size + 1 - taps)).repeat(1, size)
    band = band[:, : 2 * size * size].view(n_heads, size, 2 * size)
    own, following = band.split(size, dim=2)
    out = own @ blocks[:, :, :-1].flatten(2)
    out = torch.baddbmm(out, following, blocks[:, :, 1:].flatten(2))
    out = out.view(n_heads, size, n_blocks - 1, n_rows, width)
    return out.permute(3, 0, 2, 1, 4).flatten(2, 3)[:, :, :n_seq]


def nystrom_attention(
    q: Float[Tensor, "b h s e"],
    k: Float[Tensor, "b h s e"],
    v: Float[Tensor, "b h s e"],
    n_landmarks: int,
    *,
    alone: bool,
) -> Float[Tensor, "b h s e"]:
    """Softmax attention through landmarks (Xiong et al. 2021), in linear memory.

    Landmarks are means over consecutive runs of the sequence. The pseudo-inverse starts from the
    largest column sum over the whole batch, as upstream's does, which lets recordings touch each
    other to rounding; with `alone`, from the largest of each recording.

    Differs from upstream: the run length comes from the input (theirs is configured, and fails, or
    mixes recordings, when it does not fit), and runs differ by one where the landmarks do not
    divide it.
    """
    q_marks, k_marks = _run_means(q, n_landmarks), _run_means(k, n_landmarks)
    values = attention(q_marks, k, v)
    # In float32 under autocast too: an inverse makes much of small errors.
    with torch.autocast(q.device.type, enabled=False):
        scores = at_least_float32(q_marks) @ at_least_float32(k_marks).transpose(-2, -1)
        inverse = _pseudo_inverse(scores * q.shape[-1] ** -0.5, alone=alone)
        values = (inverse @ values.to(inverse.dtype)).to(values.dtype)
    return attention(q, k_marks, values)


def _run_means(x: Float[Tensor, "b h s e"], n_runs: int) -> Float[Tensor, "b h l e"]:
    n_seq = x.shape[2]
    if n_seq < n_runs:
        raise UserError(
            f"Nystrom attention with {n_runs} landmarks got a sequence of {n_seq} tokens: use at "
            f"most n_landmarks={n_seq}, or attention='full'."
        )
    if n_seq % n_runs == 0:
        return x.unflatten(2, (n_runs, -1)).mean(3)
    ends = torch.arange(n_runs + 1, device=x.device) * n_seq // n_runs
    place = torch.arange(n_seq, device=x.device)
    inside = (place >= ends[:-1, None]) & (place < ends[1:, None])
    return (inside / inside.sum(1, keepdim=True)).to(x.dtype) @ x


def _pseudo_inverse(scores: Float[Tensor, "b h l l"], *, alone: bool) -> Float[Tensor, "b h l l"]:
    kernel = scores.softmax(-1)
    column_sums = kernel.sum(-2)
    largest = column_sums.amax((1, 2)).view(-1, 1, 1, 1) if alone else column_sums.max()
    inverse = kernel.transpose(-2, -1) / largest
    eye = torch.eye(kernel.shape[-1], dtype=kernel.dtype, device=kernel.device)
    for _ in range(PINV_STEPS):
        a = kernel @ inverse
        inverse = 0.25 * inverse @ (13 * eye - a @ (15 * eye - a @ (7 * eye - a)))
    return inverse
