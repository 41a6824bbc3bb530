"""Scores of queries with gallery entries, as vectors to multiply or as a matrix; repeats kept once.

Identical vectors must tie exactly: two people of one gene sequence have one DNA embedding, and a
collapsed encoder gives one vector to all. Floating-point products of the same numbers may differ
with their place in a matrix product, so identical rows are scored once and counted as often as they
occur.

Vectors are never normalised: the score is the inner product of the rows as they are, so unit rows
give cosines and the vectors of a log density ratio give that ratio.

Shape legend: n queries, m gallery entries, u and v distinct ones, d width.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from brainfusion.runtime.errors import UserError


def as_array(values: ArrayLike) -> np.ndarray:
    """An array of whatever holds numbers: arrays, lists, torch tensors (bfloat16 and GPU, too).

    Half-precision tensors become float32: NumPy has no bfloat16, and every bfloat16 is a float32.
    """
    if not hasattr(values, "detach"):
        return np.asarray(values)
    tensor: Any = values  # torch is not imported to look at it
    tensor = tensor.detach().cpu()
    return (tensor.float() if tensor.element_size() < 4 else tensor).numpy()


@dataclass(frozen=True, eq=False)
class ScoreTable:
    """Scores of n queries with m gallery entries: vectors to multiply, or a matrix given whole."""

    row_of: np.ndarray
    """Distinct row of each query, int64 [n]."""
    col_of: np.ndarray
    """Distinct column of each gallery entry, int64 [m]."""
    rows: np.ndarray
    """Distinct query vectors [u, d], or the scores [n, m]."""
    cols: np.ndarray | None
    """Distinct gallery vectors [v, d]; None when `rows` holds scores."""

    @property
    def n_rows(self) -> int:
        """Distinct queries."""
        return len(self.rows)

    @property
    def n_cols(self) -> int:
        """Distinct gallery entries."""
        return self.rows.shape[1] if self.cols is None else len(self.cols)

    @classmethod
    def from_vectors(cls, queries: ArrayLike, gallery: ArrayLike) -> "ScoreTable":
        """Inner products in float32 of vectors [n, d] and [m, d] of any float type."""
        queries, gallery = _vectors(queries, "queries"), _vectors(gallery, "gallery")
        if queries.shape[1] != gallery.shape[1]:
            raise UserError(
                f"queries are {queries.shape[1]} wide but the gallery is {gallery.shape[1]}: both "
                "must come from one shared space; project them with the same model."
            )
        row_of, rows = _distinct(queries)
        col_of, cols = _distinct(gallery)
        return cls(row_of, col_of, rows, cols)

    @classmethod
    def from_scores(cls, scores: ArrayLike) -> "ScoreTable":
        """Scores [n, m] of any kind, higher for a better match."""
        scores = as_array(scores)
        scores = scores.astype(
            np.float32 if scores.dtype.itemsize < 4 else scores.dtype, copy=False
        )
        if scores.ndim != 2 or not np.isfinite(scores).all():
            raise UserError(
                f"scores have shape {list(scores.shape)}: expected [queries, gallery], all finite."
            )
        return cls(np.arange(len(scores)), np.arange(scores.shape[1]), scores, None)

    def tile(self, rows: slice, cols: slice) -> np.ndarray:
        """Scores of some distinct queries with some distinct gallery entries."""
        if self.cols is None:
            return self.rows[rows, cols]
        return self.rows[rows] @ self.cols[cols].T

    def block(self, queries: np.ndarray, gallery: np.ndarray) -> np.ndarray:
        """Scores of these queries with these gallery entries (indices), repeats included."""
        if self.cols is None:
            return self.rows[np.ix_(queries, gallery)]
        rows, row_of = np.unique(self.row_of[queries], return_inverse=True)
        cols, col_of = np.unique(self.col_of[gallery], return_inverse=True)
        return (self.rows[rows] @ self.cols[cols].T)[row_of][:, col_of]


def _vectors(given: ArrayLike, name: str) -> np.ndarray:
    values = as_array(given)
    if values.ndim != 2 or 0 in values.shape:
        raise UserError(f"{name} have shape {list(values.shape)}: expected [n, width], not empty.")
    # Adding zero turns -0.0 into 0.0: they are equal and must have equal bytes.
    values = np.ascontiguousarray(values, dtype=np.float32) + np.float32(0)
    if not np.isfinite(values).all():
        n_bad = int((~np.isfinite(values).all(axis=1)).sum())
        raise UserError(
            f"{name}: {n_bad} of {len(values)} vectors have NaN or infinite values (in float32); "
            "drop those people or make their embeddings again."
        )
    return values


def _distinct(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distinct rows in order of first appearance, and which of them each row is."""
    keys = _row_keys(values)
    _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    if len(first) == len(values):
        return np.arange(len(values)), values
    order = np.argsort(first)
    return np.argsort(order)[inverse], values[first[order]]


def _row_keys(values: np.ndarray) -> np.ndarray:
    """A 64-bit key of each row's bytes: equal rows have equal keys, others differ but for 2^-64."""
    rng = np.random.default_rng(0)
    odd = rng.integers(0, 2**63, values.shape[1], dtype=np.uint64) * np.uint64(2) + np.uint64(1)
    out = np.empty(len(values), np.uint64)
    for start in range(0, len(values), 4096):
        words = values[start : start + 4096].view(np.uint32).astype(np.uint64)
        words = (words + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        words ^= words >> np.uint64(29)
        words *= odd
        words ^= words >> np.uint64(32)
        out[start : start + 4096] = (words * odd).sum(axis=1, dtype=np.uint64)
    return out
