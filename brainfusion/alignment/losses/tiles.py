"""Tiles of S = s a b': made, summed and forgotten, and made again for the gradients.

Logits and their sums are in bits (S log2 e, log2) throughout: exp2 takes a quarter of the time
that exp takes on a CPU.

Shape legend: n rows of a (this process), q keys (rows of b; `start` is the place of the first among
those of all processes), d width.
"""

import platform
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from brainfusion.alignment.losses.candidates import Candidates, Places

TILE = {"cpu": 1024, "cuda": 8192}
"""Rows and columns of a tile."""

_KEPT_BYTES = {"cpu": 2**26, "cuda": 2**30}
"""How much of exp(S) forward keeps for backward, which then makes one product in three less: all
of it up to 4,096 pairs in float32 on a CPU, next to nothing of many pairs."""

_HAS_ONEDNN = (
    platform.machine() in ("x86_64", "AMD64")
    and torch.backends.mkldnn.is_available()
    and hasattr(torch.ops.mkldnn, "_linear_pointwise")
)

HAS_CUDA_BFLOAT16 = hasattr(torch.ops.aten.mm, "dtype")
"""Whether this torch multiplies bfloat16 into float32 on CUDA."""


@dataclass(frozen=True)
class Tiling:
    """How S is cut, and what its entries are to one another."""

    tile: int
    offset: int
    candidates: Candidates | None
    half: bool

    def __call__(self, n: int, n_keys: int, start: int) -> Iterator[tuple[slice, slice, Places]]:
        """Tiles where anyone is a candidate: rows, keys of this block, what the ids say of them."""
        for i in range(0, n, self.tile):
            for j in range(0, n_keys, self.tile):
                rows, keys = slice(i, min(i + self.tile, n)), slice(j, min(j + self.tile, n_keys))
                if self.candidates is None:
                    yield rows, keys, Places()
                    continue
                columns = slice(start + keys.start, start + keys.stop)
                places = self.candidates.places(rows, columns)
                if places is not None:
                    yield rows, keys, places

    def logits(self, scaled: Tensor, keys: Tensor) -> Tensor:
        """A tile of S. In float32 on CPUs: torch has no product there of bfloat16 into float32."""
        return product(scaled, keys, half=self.half and scaled.device.type == "cuda")

    def diagonal(self, block: Tensor, i: slice, column: int) -> tuple[Tensor, slice]:
        """A view of the entries of pairs with themselves, and the rows that they are of.

        Args:
            block: A tile of S.
            i: Its rows.
            column: The place of its first column among the pairs of all processes.
        """
        place = self.offset + i.start - column
        if not -block.shape[0] < place < block.shape[1]:
            return block.new_empty(0), slice(i.start, i.start)
        own, first = block.diagonal(place), i.start + max(0, -place)
        return own, slice(first, first + len(own))

    def weights(self, rows: slice | Tensor) -> Tensor | float:
        """One over how many positives each of these rows has."""
        weights = None if self.candidates is None else self.candidates.weights
        if weights is None:
            return 1.0
        return weights[self.offset :][rows]


class Kept:
    """The first tiles of exp(S), kept from forward to backward while they take little memory."""

    def __init__(self, device: torch.device, *, keep: bool) -> None:
        self.tiles: list[Tensor] = []
        self.bytes_left = _KEPT_BYTES.get(device.type, 0) if keep else 0

    def add(self, block: Tensor) -> None:
        """Keep a tile; from the first that is too large on, none."""
        self.bytes_left -= block.nbytes
        if self.bytes_left >= 0:
            self.tiles.append(block)
        else:
            self.bytes_left = 0


def product(x: Tensor, y: Tensor, *, half: bool = False) -> Tensor:
    """The product x y' of x [r, d] and y [c, d]; from their values in bfloat16 if `half`.

    On x86 CPUs float32 goes through oneDNN: the MKL behind torch.mm leaves AVX-512 unused on AMD
    processors, where this takes less than half of its time.
    """
    if half and x.device.type == "cuda":
        return torch.mm(x.bfloat16(), y.bfloat16().T, out_dtype=torch.float32)
    if half:
        return torch.mm(x.bfloat16(), y.bfloat16().T)
    if _HAS_ONEDNN and x.device.type == "cpu" and x.dtype == torch.float32 and x.numel():
        return torch.ops.mkldnn._linear_pointwise(x, y, None, "none", [], "")
    return torch.mm(x, y.T)


def exp_sums(
    tiling: Tiling,
    scaled: Tensor,
    keys: Tensor,
    start: int,
    shift: float,
    rows: Tensor,
    positives: Tensor,
    kept: Kept,
) -> Tensor:
    """Column sums [q] of 2^(S - shift) over the rows of this process.

    Adds the row sums to `rows` [n], and the mean of S over each row's positives to `positives` [n].
    """
    columns = keys.new_zeros(len(keys))
    for i, j, places in tiling(len(scaled), len(keys), start):
        block = tiling.logits(scaled[i], keys[j])
        _add_positives(tiling, block, i, start + j.start, places, positives)
        places.hide(block)
        if shift:
            block.sub_(shift)
        block.exp2_()
        kept.add(block)
        rows[i] += block.sum(1)
        columns[j] += block.sum(0)
    return columns


def log_sums(
    tiling: Tiling, scaled: Tensor, keys: Tensor, start: int, rows: Tensor, positives: Tensor
) -> Tensor:
    """log2 of the column sums [q], under maxima: for logits that spread over 100 and more.

    Combines those of the rows into `rows` [n], and adds to `positives` as `exp_sums` does.
    """
    columns = keys.new_full((len(keys),), -torch.inf)
    for i, j, places in tiling(len(scaled), len(keys), start):
        block = tiling.logits(scaled[i], keys[j])
        _add_positives(tiling, block, i, start + j.start, places, positives)
        places.hide(block)
        for total, part, dim in ((rows, i, 1), (columns, j, 0)):
            # A line without candidates has a maximum of minus infinity, which cannot be taken off.
            top = block.amax(dim).clamp_(min=torch.finfo(block.dtype).min / 2)
            sums = block.sub(top.unsqueeze(dim)).exp2_().sum(dim).log2_().add_(top)
            total[part] = torch.logaddexp2(total[part], sums)
    return columns


def gradients(
    tiling: Tiling,
    a: Tensor,
    factor: float,
    keys: Tensor,
    start: int,
    logs: tuple[Tensor, Tensor],
    shift: float | None,
    grad_a: Tensor,
    kept: Iterator[Tensor],
) -> Tensor:
    """2N G' a [q, d], this process' share of it; adds 2N G b to `grad_a` [n, d].

    Args:
        tiling: As in forward.
        a: [n, d] rows.
        factor: The logit scale, in bits.
        keys: [q, d].
        start: The place of the first of them.
        logs: log2 of the complete row sums [n] and column sums [q].
        shift: What `exp_sums` took; None after `log_sums`.
        grad_a: Added to.
        kept: What forward kept, in the order of the tiles.
    """
    grad_keys = torch.zeros_like(keys)
    rows, columns = logs if shift is None else ((shift - x).exp2() for x in logs)
    scaled = a * factor
    for i, j, places in tiling(len(a), len(keys), start):
        block = next(kept, None)
        if shift is not None and block is not None:
            block = block * (rows[i, None] + columns[None, j])
        else:
            block = tiling.logits(scaled[i], keys[j])
            places.hide(block)
            if shift is None:
                other = block - columns[None, j]
                block.sub_(rows[i, None]).exp2_().add_(other.exp2_())
            else:
                if shift:
                    block.sub_(shift)
                block.exp2_().mul_(rows[i, None] + columns[None, j])
        own, mine = tiling.diagonal(block, i, start + j.start)
        own.sub_(tiling.weights(mine), alpha=2)
        if places.positives is not None:
            r, c = places.positives
            block[r, c] -= 2 * tiling.weights(r + i.start)
        if tiling.half:
            block = block.bfloat16()
        grad_a[i] += product(block, keys[j].T, half=tiling.half)
        grad_keys[j] += product(block.T, a[i].T, half=tiling.half)
    return grad_keys


def _add_positives(
    tiling: Tiling, block: Tensor, i: slice, column: int, places: Places, positives: Tensor
) -> None:
    own, mine = tiling.diagonal(block, i, column)
    positives[mine] += own * tiling.weights(mine)
    if places.positives is not None:
        r, c = places.positives
        positives.index_add_(0, r + i.start, block[r, c] * tiling.weights(r + i.start))
