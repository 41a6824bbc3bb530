"""Linear layers and softmax attention on CPUs, by the faster of torch's two libraries.

Torch computes float32 products on x86 with MKL, which leaves AVX-512 unused on AMD's CPUs. oneDNN,
which torch ships too, uses it: on a Zen 5 core a plain product runs at 98 GFLOP/s with the one and
at 170 to 220 with the other, and fused attention, whose inner products are MKL's, at 85. On such
CPUs linear layers go through oneDNN, and attention is computed in tiles of rows that stay in the
cache, each two products and a softmax. Everywhere else, in other number types, under autocast and
under torch.compile, these functions are `F.linear` and `F.scaled_dot_product_attention`.

The same numbers to rounding, and the same gradients. `torch.backends.mkldnn.set_flags(False)`, a
process-wide switch of torch's, turns it off.

Shape legend: b recordings, h heads, n queries, m keys, e width of a head, i in, o out, r rows.
"""

import functools
import platform
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

MIN_LINEAR = 2**25
"""Multiplications from which a linear layer goes through oneDNN: below, the call costs more."""
MIN_TRAINED = 2**27
"""The same where gradients are kept. oneDNN makes code for each shape that it meets, about 3 ms and
0.6 MiB, and Brain-JEPA's masks give other shapes at every step: in small models that costs more
than it saves, and the process grows by 17 MiB a step until its caches are full."""
MIN_ATTENTION = 20_000_000
"""Multiplications of a head's scores from which its attention is tiled."""
MIN_QUERIES, MIN_HEAD_WIDTH = 128, 24
"""Of tiled attention: fewer rows, or narrower products, leave too little work beside a softmax."""
TILE_SCORES = 2**20
"""Scores of a tile: 4 MiB, so that it stays in the cache between product, softmax and product."""


class Linear(nn.Linear):
    """`nn.Linear`, with the same parameters and keys, through `linear`."""

    def forward(self, input: Float[Tensor, "*r i"]) -> Float[Tensor, "*r o"]:  # noqa: A002
        """Apply to the last axis."""
        return linear(input, self.weight, self.bias)


def linear(
    x: Float[Tensor, "*r i"], weight: Float[Tensor, "o i"], bias: Float[Tensor, " o"] | None
) -> Float[Tensor, "*r o"]:
    """`F.linear`."""
    trained = _needs_gradient(x, weight, bias)
    least = MIN_TRAINED if trained else MIN_LINEAR
    if not _through_onednn(x, weight) or x.numel() * len(weight) < least:
        return F.linear(x, weight, bias)
    return _Linear.apply(x, weight, bias) if trained else _product(x, weight, bias)


def attention(
    q: Float[Tensor, "b h n e"], k: Float[Tensor, "b h m e"], v: Float[Tensor, "b h m e"]
) -> Float[Tensor, "b h n e"]:
    """`F.scaled_dot_product_attention`; heads of a token lie side by side in the result."""
    if not _through_onednn(q, k, v) or not _worth_tiling(q, k):
        return F.scaled_dot_product_attention(q, k, v)
    if _needs_gradient(q, k, v):
        return _Attention.apply(q, k, v)
    return _tiled_attention(q, k, v)


@functools.cache
def onednn_is_faster() -> bool:
    """Whether this CPU is one on which oneDNN's float32 products outrun MKL's.

    By its maker and instructions, not by a measurement: the same machine rounds the same way twice.
    """
    return (
        torch.backends.mkl.is_available()
        and torch.backends.mkldnn.is_available()
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and "AuthenticAMD" in _cpu_maker()
    )


def _cpu_maker() -> str:
    try:
        with Path("/proc/cpuinfo").open(encoding="utf-8") as lines:
            return next((line for line in lines if line.startswith("vendor_id")), "")
    except OSError:
        return platform.processor()


def _through_onednn(*tensors: Tensor) -> bool:
    return (
        not torch.compiler.is_compiling()  # first, so that compiled code has no guards on sizes
        and all(x.dtype == torch.float32 and x.device.type == "cpu" for x in tensors)
        and not torch.is_autocast_enabled("cpu")
        and all(type(x) in (Tensor, nn.Parameter) for x in tensors)
        and torch.backends.mkldnn.enabled
        and onednn_is_faster()
    )


def _worth_tiling(q: Tensor, k: Tensor) -> bool:
    n_queries, width = q.shape[2:]
    enough = n_queries * k.shape[2] * width >= MIN_ATTENTION
    return enough and n_queries >= MIN_QUERIES and width >= MIN_HEAD_WIDTH


def _needs_gradient(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def _product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """Of `a` and the transpose of `b`, with any strides, plus the bias."""
    return torch.ops.mkldnn._linear_pointwise(a, b, bias, "none", [], "")


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rows, inputs = grad.flatten(0, -2), x.flatten(0, -2)
        of_x = of_weight = of_bias = None
        if ctx.needs_input_grad[0]:
            of_x = _product(grad, weight.t())
        if ctx.needs_input_grad[1]:
            # The first factor is copied row by row, so it is the narrow one.
            narrow = inputs.shape[1] < rows.shape[1]
            pair = (inputs.t(), rows.t()) if narrow else (rows.t(), inputs.t())
            of_weight = _product(*pair).t() if narrow else _product(*pair)
        if ctx.needs_input_grad[2]:
            of_bias = rows.sum(0)
        return of_x, of_weight, of_bias


def _tiled_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    n_rows, n_heads, n_queries, width = q.shape
    out = q.new_empty(n_rows, n_queries, n_heads, width)
    scale, size = width**-0.5, _tile_rows(k.shape[2])
    for row in range(n_rows):
        for head in range(n_heads):
            queries, keys = q[row, head] * scale, k[row, head].contiguous()
            values = v[row, head].t().contiguous()
            for begin in range(0, n_queries, size):
                weights = _product(queries[begin : begin + size], keys).softmax(-1)
                out[row, begin : begin + size, head] = _product(weights, values)
    return out.transpose(1, 2)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ctx.save_for_backward(q, k, v)
        return _tiled_attention(q, k, v)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        # The weights of a tile are computed again: nothing but q, k and v was kept.
        q, k, v = ctx.saved_tensors
        of_q, of_k, of_v = (_side_by_side(x) for x in (q, k, v))
        scale, size = q.shape[3] ** -0.5, _tile_rows(k.shape[2])
        for row in range(q.shape[0]):
            for head in range(q.shape[1]):
                queries, keys = q[row, head] * scale, k[row, head].contiguous()
                values, wanted = v[row, head].contiguous(), grad[row, head].contiguous()
                keys_t = keys.t()
                of_keys, of_values = torch.zeros_like(keys.t()), torch.zeros_like(values.t())
                for begin in range(0, len(queries), size):
                    tile = slice(begin, begin + size)
                    weights = _product(queries[tile], keys).softmax(-1)
                    of_values += _product(wanted[tile].t(), weights.t())
                    of_scores = _product(wanted[tile], values)
                    # Through the softmax: its mean under the weights is taken off each row.
                    of_scores = torch.ops.aten._softmax_backward_data(
                        of_scores, weights, -1, torch.float32
                    )
                    of_q[row, head, tile] = _product(of_scores, keys_t).mul_(scale)
                    of_keys += _product(queries[tile].t(), of_scores.t())
                of_k[row, head], of_v[row, head] = of_keys.t(), of_values.t()
        return of_q, of_k, of_v


def _side_by_side(x: Float[Tensor, "b h n e"]) -> Float[Tensor, "b h n e"]:
    return torch.empty_like(x.transpose(1, 2), memory_format=torch.contiguous_format).transpose(
        1, 2
    )


def _tile_rows(n_keys: int) -> int:
    """Rows of a tile, a multiple of 16 between 64 and 1024."""
    return max(64, min(1024, TILE_SCORES // n_keys // 16 * 16))
