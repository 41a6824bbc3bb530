"""Which tokens Brain-JEPA's context encoder sees, and which its predictor must fill in.

Three regions surround a context of parcels R and time patches C (Dong et al. 2024, section 3.2):
Cross-ROI (other parcels, the same times), Cross-Time (the same parcels, other times) and
Double-Cross (other parcels, other times). Two ways to sample them:

- `unbiased` (default): block sizes are drawn once a batch, so all rows have equal length by
  construction and nothing is ever cut; every parcel and every time patch is equally often context
  and equally often target.
- `reference`: the published collator (src/masks/spatialtemporal_multiblock.py, commit b1dfa93e),
  written from a description of its behaviour. It cuts the batch to its shortest row and keeps the
  first indices, which favours low parcels and, at a batch of 16, trains on the first block alone
  in about two thirds of the batches. Its statistics are kept for comparison.

Shape legend: b recordings, p parcels, w time patches, k context tokens, q target tokens; token =
parcel * w + time patch.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from brainfusion.runtime.errors import UserError, nearest

Share = tuple[float, float]
Masks = tuple[list[Int[Tensor, "b k"]], list[Int[Tensor, "b q"]]]

_STREAM = 0x6D61736B  # keeps mask draws apart from other draws with the same seed
_REFERENCE_PATCHES = 10
_REFERENCE_SIDES = (slice(7, 10), slice(0, 3))
_REFERENCE_MIN_PARCELS = 20


@dataclass(frozen=True, kw_only=True, slots=True)
class RegionShares:
    """Ranges of block sizes of the unbiased masks, each drawn uniformly once a batch.

    The defaults give about the context and target counts that the reference has before it cuts
    (28 % and 27 % of the tokens), with more weight on Cross-Time, which it all but loses.
    """

    context_parcels: Share = (0.33, 0.55)
    """Share of the parcels in the context."""
    context_times: Share = (0.4, 0.9)
    """Share of the time patches in the context."""
    block_parcels: Share = (0.5, 0.8)
    """Share of a region's parcels in its target block."""
    block_times: Share = (0.4, 0.8)
    """Share of a region's time patches in its target block."""

    def __post_init__(self) -> None:
        for name in ("context_parcels", "context_times", "block_parcels", "block_times"):
            low, high = getattr(self, name)
            if not 0.0 < low <= high <= 1.0:
                raise UserError(f"{name}=({low}, {high}): expected 0 < low <= high <= 1.")


def mask_rng(seed: int, step: int, rank: int = 0) -> np.random.Generator:
    """The generator of one step's masks: a pure function of (seed, step, rank)."""
    return np.random.default_rng([_STREAM, seed, step, rank])


def sample_masks(
    grid: tuple[int, int],
    batch_size: int,
    rng: np.random.Generator,
    *,
    mode: Literal["unbiased", "reference"] | str = "unbiased",
    shares: RegionShares | None = None,
) -> Masks:
    """Draw context and target tokens for a batch.

    Args:
        grid: (parcels, time patches).
        batch_size: Recordings in the batch.
        rng: Source of every random number; `mask_rng` makes one for a step.
        mode: 'unbiased' or 'reference' (see the module).
        shares: Block sizes of the unbiased masks.

    Returns:
        (masks_enc, masks_pred): lists with one int64 tensor each, [b, k] sorted and [b, q] block
        by block. Context and targets are disjoint and never empty; within a row, indices are
        unique, except that the reference's target blocks may overlap.
    """
    n_parcels, n_patches = grid
    if batch_size < 1:
        raise UserError(f"batch_size={batch_size}: expected 1 or more.")
    if mode == "unbiased":
        context, targets = _unbiased(n_parcels, n_patches, batch_size, rng, shares)
    elif mode == "reference":
        if shares is not None:
            raise UserError("shares are for mode='unbiased': the reference's sizes are fixed.")
        context, targets = _reference(n_parcels, n_patches, batch_size, rng)
    else:
        raise UserError(f"mode='{mode}' is not known. {nearest(mode, ('unbiased', 'reference'))}")
    return [torch.from_numpy(context)], [torch.from_numpy(targets)]


def _unbiased(
    p: int, w: int, b: int, rng: np.random.Generator, shares: RegionShares | None
) -> tuple[np.ndarray, np.ndarray]:
    """One rectangle of context and one block from each region, all of one size in the batch.

    Differs from upstream: time runs in a circle, so that edge patches are context and target as
    often as middle ones, where a window that must fit would nearly always hold the middle.
    """
    if p < 1 or w < 1 or p * w < 2:
        raise UserError(f"a grid of {p} x {w} tokens has nothing to hide: it needs two or more.")
    shares = shares or RegionShares()
    rows = rng.random((b, p)).argsort(axis=1)
    start = rng.integers(0, w, size=(b, 1))
    n_rows = _size(rng, shares.context_parcels, p, p - 1)
    n_times = _size(rng, shares.context_times, w, w - 1)
    inside, outside = rows[:, :n_rows], rows[:, n_rows:]
    now, later = (start, n_times), (start + n_times, w - n_times)

    context = _tokens(inside, start + np.arange(n_times), w)
    # Cross-ROI, Cross-Time, Double-Cross; the last takes its parcels from the other end, to reach
    # first those that Cross-ROI left out.
    regions = ((outside, now), (inside, later), (outside[:, ::-1], later))
    blocks = []
    for pool, (first, length) in regions:
        if pool.shape[1] == 0 or length == 0:  # a grid of one parcel or one time patch
            continue
        n_block = _size(rng, shares.block_parcels, pool.shape[1], pool.shape[1])
        n_run = _size(rng, shares.block_times, length, length)
        times = first + rng.integers(0, length - n_run + 1, size=(b, 1)) + np.arange(n_run)
        blocks.append(_tokens(pool[:, :n_block], times, w))
    return context, np.concatenate(blocks, axis=1)


def _size(rng: np.random.Generator, share: Share, n: int, largest: int) -> int:
    return min(max(round(rng.uniform(*share) * n), 1), max(largest, 1))


def _tokens(rows: np.ndarray, times: np.ndarray, w: int) -> np.ndarray:
    """Tokens of the rectangles rows x times, ascending: [b, r] and [b, c] -> [b, r c]."""
    rows, times = np.sort(rows, axis=1), np.sort(times % w, axis=1)
    return (rows[:, :, None] * w + times[:, None, :]).reshape(len(rows), -1)


def _reference(p: int, w: int, b: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """The published collator with its published scales."""
    if w != _REFERENCE_PATCHES or p < _REFERENCE_MIN_PARCELS:
        raise UserError(
            f"reference masks are defined for {_REFERENCE_PATCHES} time patches and at least "
            f"{_REFERENCE_MIN_PARCELS} parcels, got {p} x {w}: use mode='unbiased'."
        )
    # Sizes, the same for the whole batch.
    alpha_rows, alpha_times = int(p * rng.uniform(0.45, 0.6)), int(w * rng.uniform(0.2, 0.6))
    seen_rows, seen_times = int(p * rng.uniform(0.84, 1.0)), int(w * rng.uniform(0.84, 1.0))

    # The observation window and the alpha block: rows x times.
    window = _drawn(rng, (b, p), seen_rows)
    start = rng.integers(0, w - seen_times, size=b)  # the last start is never drawn, as upstream
    alpha = _drawn(rng, (b, p), alpha_rows)
    alpha_start = start + rng.integers(0, seen_times - alpha_times, size=b)
    patch = np.arange(w)
    context_cols = (patch >= start[:, None]) & (patch < start[:, None] + seen_times)
    alpha_cols = (patch >= alpha_start[:, None]) & (patch < alpha_start[:, None] + alpha_times)

    # Side blocks take rows from two pools; one parcel outside the window is forgotten (upstream).
    pool = alpha if seen_rows == p - 1 else window & alpha
    rows, cols = [alpha], [alpha_cols]
    for times in _REFERENCE_SIDES:
        row_share, time_share = rng.uniform(0.15, 0.3, size=b), rng.uniform(0.0, 0.4, size=b)
        rows.append(_drawn_from_both(rng, pool, row_share))
        keys = np.ones((b, w))
        keys[:, times] = rng.random((b, 3))
        cols.append(keys.argsort(1).argsort(1) < (w * time_share).astype(np.int64)[:, None])
        context_cols = context_cols & ~cols[-1]
    context = _first((window & ~alpha)[:, None], context_cols[:, None])
    return context, _first(np.stack(rows, axis=1), np.stack(cols, axis=1))


def _drawn(rng: np.random.Generator, shape: tuple[int, int], n: int) -> np.ndarray:
    """In each row, `n` columns drawn uniformly, as a mask."""
    keys = rng.random(shape)
    return keys <= np.partition(keys, n - 1, axis=1)[:, n - 1 : n]


def _drawn_from_both(rng: np.random.Generator, pool: np.ndarray, share: np.ndarray) -> np.ndarray:
    """The share [b] of the columns in `pool` [b, p] and of those not in it, drawn uniformly."""
    keys = rng.random(pool.shape) + ~pool
    ranked = np.sort(keys, axis=1)  # those in the pool first
    inside = pool.sum(1)
    n_in = (share * inside).astype(np.int64)
    n_out = (share * (pool.shape[1] - inside)).astype(np.int64)
    # Keys below the first that is not taken; there is always one, as shares are below 1.
    sample = np.arange(len(pool))
    cut_in, cut_out = ranked[sample, n_in], ranked[sample, inside + n_out]
    return keys < np.where(pool, cut_in[:, None], cut_out[:, None])


def _first(rows: np.ndarray, cols: np.ndarray) -> np.ndarray:
    """Tokens of the blocks rows x cols, cut to the shortest sample: the first are kept.

    Args:
        rows: [b, blocks, p], whether a block has the parcel.
        cols: [b, blocks, w], whether a block has the time patch.
    """
    w = cols.shape[2]
    counts = (rows.sum(2) * cols.sum(2)).sum(1)
    begin = np.concatenate([[0], np.cumsum(counts)[:-1]])
    block, parcel = np.nonzero(rows.reshape(-1, rows.shape[2]))
    # An index into (set rows) x w, in the order wanted.
    flat = np.flatnonzero(cols.reshape(-1, w).take(block, axis=0))
    row, time = np.divmod(flat[begin[:, None] + np.arange(counts.min())], w)
    return parcel[row] * w + time
