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
_REFERENCE_SIDES = ((7, 8, 9), (0, 1, 2))
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
    rows = rng.permuted(np.broadcast_to(np.arange(p), (b, p)), axis=1)
    start = rng.integers(0, w, size=(b, 1))
    n_rows = _size(rng, shares.context_parcels, p, p - 1)
    n_times = _size(rng, shares.context_times, w, w - 1)
    inside, outside = rows[:, :n_rows], rows[:, n_rows:]
    now, later = (start, n_times), (start + n_times, w - n_times)

    context = np.sort(_tokens(inside, start + np.arange(n_times), w), axis=1)
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
        blocks.append(np.sort(_tokens(pool[:, :n_block], times, w), axis=1))
    return context, np.concatenate(blocks, axis=1)


def _size(rng: np.random.Generator, share: Share, n: int, largest: int) -> int:
    return min(max(round(rng.uniform(*share) * n), 1), max(largest, 1))


def _tokens(rows: np.ndarray, times: np.ndarray, w: int) -> np.ndarray:
    """Tokens of the rectangles rows x times: [b, r] and [b, c] -> [b, r c]."""
    return (rows[:, :, None] * w + (times % w)[:, None, :]).reshape(len(rows), -1)


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
    window = _subset(rng, np.ones((b, p), bool), np.full(b, seen_rows))
    start = rng.integers(0, w - seen_times, size=b)  # the last start is never drawn, as upstream
    alpha = _subset(rng, np.ones((b, p), bool), np.full(b, alpha_rows))
    alpha_start = start + rng.integers(0, seen_times - alpha_times, size=b)
    patch = np.arange(w)
    window_cols = (patch >= start[:, None]) & (patch < start[:, None] + seen_times)
    alpha_cols = (patch >= alpha_start[:, None]) & (patch < alpha_start[:, None] + alpha_times)

    # Side blocks take rows from two pools; one parcel outside the window is forgotten (upstream).
    pool_in = alpha if seen_rows == p - 1 else window & alpha
    blocks = [alpha[:, :, None] & alpha_cols[:, None, :]]
    context_cols = window_cols
    for times in _REFERENCE_SIDES:
        row_share, time_share = rng.uniform(0.15, 0.3, size=b), rng.uniform(0.0, 0.4, size=b)
        side = np.zeros((b, p), bool)
        for pool in (pool_in, ~pool_in):
            side |= _subset(rng, pool, (row_share * pool.sum(1)).astype(np.int64))
        allowed = np.broadcast_to(np.isin(patch, times), (b, w))
        cols = _subset(rng, allowed, (w * time_share).astype(np.int64))
        blocks.append(side[:, :, None] & cols[:, None, :])
        context_cols = context_cols & ~cols
    context = (window & ~alpha)[:, :, None] & context_cols[:, None, :]
    return _first(context.reshape(b, -1)), _first(np.stack(blocks, 1).reshape(b, -1)) % (p * w)


def _subset(rng: np.random.Generator, pool: np.ndarray, n: np.ndarray) -> np.ndarray:
    """Of each row of `pool` [b, m], `n` [b] members drawn uniformly, as a mask."""
    keys = np.where(pool, rng.random(pool.shape), 2.0)
    ranked = np.sort(keys, axis=1)
    cut = np.take_along_axis(ranked, np.maximum(n - 1, 0)[:, None], axis=1)
    return pool & (keys <= cut) & (n > 0)[:, None]


def _first(mask: np.ndarray) -> np.ndarray:
    """Columns of the set entries of each row, cut to the shortest row: the first are kept."""
    counts = mask.sum(1)
    begin = np.concatenate([[0], np.cumsum(counts)[:-1]])
    flat = np.flatnonzero(mask)
    chosen = flat[begin[:, None] + np.arange(counts.min())]
    return chosen - np.arange(len(mask))[:, None] * mask.shape[1]
