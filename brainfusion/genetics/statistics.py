"""What the alarms need to know of the vectors, accumulated in one pass over blocks.

Shape legend: n people, g genes, r rows of a block, h width.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

SIGNIFICANT_BITS = {"bfloat16": 8, "float16": 11, "float32": 24, "float64": 53}

_BLOCK_ROWS = 1024
_N_SAMPLED_COLUMNS = 16
_N_SAMPLED_ROWS = 4096
_MIX = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True, kw_only=True, slots=True)
class GeneFigures:
    """What the alarms need to know of one gene's vectors."""

    n_present: int
    ratio: float
    """Median over columns of (sd between people) / |mean|; nan with fewer than two people."""
    n_constant: int
    """Columns in which all people have the same number."""
    width: int
    stored: str
    """The coarsest type that the vectors went through."""
    distinct: float
    """Median over columns of distinct values / people, among the first 4,096 people."""

    @property
    def all_equal(self) -> bool:
        """Whether at least two people have a vector, and all the same one."""
        return self.n_present > 1 and self.n_constant == self.width


class GeneStatistics:
    """One gene's mean, spread and resolution, from blocks of its rows in any order."""

    def __init__(self) -> None:
        self.n_rows = 0
        self._n_present = 0
        self._first: np.ndarray | None = None
        self._total: np.ndarray | None = None
        self._squares: np.ndarray | None = None
        self._sampled: list[np.ndarray] = []
        self._n_sampled = 0
        self._dtype = "float64"
        self._resolution = "bfloat16"

    def add(self, vectors: np.ndarray, mask: np.ndarray, *, dtype: str, resolution: str) -> None:
        """Take in float32 [r, h] with its mask [r], the type it was stored in and what it holds."""
        self.n_rows += len(mask)
        rows = np.flatnonzero(mask)
        if not len(rows):
            return
        self._dtype = coarsest([self._dtype, dtype])
        self._resolution = finest([self._resolution, resolution])
        self._n_present += len(rows)
        if self._first is None or self._total is None or self._squares is None:
            self._first = np.array(vectors[rows[0]], dtype=np.float64)
            self._total = np.zeros_like(self._first)
            self._squares = np.zeros_like(self._first)
        if self._n_sampled < _N_SAMPLED_ROWS:
            taken = rows[: _N_SAMPLED_ROWS - self._n_sampled]
            self._sampled.append(vectors[np.ix_(taken, self._sampled_columns())])
            self._n_sampled += len(taken)
        for start in range(0, len(rows), _BLOCK_ROWS):
            # Differences from one person are exact where sums of nearly equal numbers are not.
            offset = vectors[rows[start : start + _BLOCK_ROWS]] - self._first
            self._total += offset.sum(axis=0)
            np.square(offset, out=offset)
            self._squares += offset.sum(axis=0)

    def figures(self) -> GeneFigures:
        """The figures of the rows that were added."""
        n = self._n_present
        stored = coarsest([self._dtype, self._resolution]) if n else "float32"
        if self._first is None or self._total is None or self._squares is None or n < 2:
            width = 0 if self._first is None else len(self._first)
            return GeneFigures(
                n_present=n, ratio=np.nan, n_constant=0, width=width, stored=stored, distinct=1.0
            )
        mean = np.abs(self._first + self._total / n)
        sd = np.sqrt(np.maximum(self._squares - self._total**2 / n, 0.0) / (n - 1))
        constant = self._squares == 0
        ratio = np.where(constant, 0.0, sd / np.maximum(mean, np.finfo(np.float32).tiny))
        sampled = np.concatenate(self._sampled)
        n_distinct = [len(np.unique(column)) for column in sampled.T]
        return GeneFigures(
            n_present=n,
            ratio=float(np.median(ratio)),
            n_constant=int(constant.sum()),
            width=len(mean),
            stored=stored,
            distinct=float(np.median(n_distinct)) / len(sampled),
        )

    def _sampled_columns(self) -> np.ndarray:
        assert self._first is not None
        width = len(self._first)
        return np.linspace(0, width - 1, min(width, _N_SAMPLED_COLUMNS)).astype(np.int64)


class TableStatistics:
    """All genes' figures and what is known of each person; a gene's sums are freed once it is seen.

    Args:
        n_subjects: n.
        n_genes: g.
    """

    def __init__(self, n_subjects: int, n_genes: int) -> None:
        self.n_genes_present = np.zeros(n_subjects, dtype=np.int32)
        """Genes with a vector, a person [n]."""
        self._person_hash = np.zeros(n_subjects, dtype=np.uint64)
        self._open: dict[int, GeneStatistics] = {}
        self._figures: list[GeneFigures | None] = [None] * n_genes

    def add(
        self,
        rows: slice,
        columns: slice,
        vectors: np.ndarray,
        mask: np.ndarray,
        *,
        dtype: str,
        resolutions: Iterable[str],
    ) -> None:
        """Take in float32 [r, c, h], its mask [r, c], and how finely each column was stored."""
        genes = range(len(self._figures))[columns]
        self.n_genes_present[rows] += mask.sum(axis=1, dtype=np.int32)
        for place, (gene, resolution) in enumerate(zip(genes, resolutions, strict=True)):
            statistics = self._open.setdefault(gene, GeneStatistics())
            statistics.add(vectors[:, place], mask[:, place], dtype=dtype, resolution=resolution)
            # A sum over genes does not depend on the order in which they come.
            self._person_hash[rows] += row_hashes(vectors[:, place], seed=gene)
            if statistics.n_rows == len(self.n_genes_present):
                self._figures[gene] = self._open.pop(gene).figures()

    def figures(self) -> list[GeneFigures]:
        """One a gene, in order; a gene of which no row came counts as absent."""
        empty = GeneStatistics()
        return [
            figures if figures is not None else self._open.get(gene, empty).figures()
            for gene, figures in enumerate(self._figures)
        ]

    def largest_twin_group(self) -> int:
        """People in the largest group whose vectors are the same in all genes (1: none are)."""
        hashes = self._person_hash[self.n_genes_present > 0]
        return int(np.unique(hashes, return_counts=True)[1].max()) if len(hashes) else 0


def row_hashes(vectors: np.ndarray, *, seed: int = 0) -> np.ndarray:
    """uint64 [r] of float32 [r, h]: equal for equal rows, and for no others that matter (2^-64)."""
    width = vectors.shape[1]
    weights = np.random.default_rng(seed).integers(
        1, 2**63, size=-(-width // 2), dtype=np.uint64
    ) * np.uint64(2) + np.uint64(1)
    hashes = np.empty(len(vectors), dtype=np.uint64)
    for start in range(0, len(vectors), _BLOCK_ROWS):
        block = vectors[start : start + _BLOCK_ROWS]
        if width % 2:
            block = np.pad(block, ((0, 0), (0, 1)))
        words = np.ascontiguousarray(block, dtype=np.float32).view(np.uint64) * weights
        words ^= words >> np.uint64(32)
        words *= _MIX
        hashes[start : start + _BLOCK_ROWS] = words.sum(axis=1, dtype=np.uint64)
    return hashes


def resolution(values: np.ndarray) -> str:
    """The coarsest type that holds every one of these float32 values exactly.

    Vectors that were stored as bfloat16 or float16 and then written as float32 give themselves
    away: their last 16 (13) bits are zero.
    """
    rest = {"bfloat16": 0xFFFF, "float16": 0x1FFF}
    for start in range(0, len(values), _BLOCK_ROWS):
        # Absent vectors are nan, whose bits mean nothing.
        block = np.nan_to_num(values[start : start + _BLOCK_ROWS], nan=0.0, posinf=0.0, neginf=0.0)
        bits = np.ascontiguousarray(block, dtype=np.float32).view(np.uint32)
        rest = {dtype: low for dtype, low in rest.items() if not np.any(bits & np.uint32(low))}
        if not rest:
            return "float32"
    # All zeros in 16 bits means all zeros in 13 too: bfloat16 is the coarser of the two.
    return next(iter(rest))


def coarsest(dtypes: Iterable[str]) -> str:
    """The type with the fewest significant bits."""
    return min(dtypes, key=lambda dtype: SIGNIFICANT_BITS.get(dtype, 24))


def finest(dtypes: Iterable[str]) -> str:
    """The type with the most significant bits."""
    return max(dtypes, key=lambda dtype: SIGNIFICANT_BITS.get(dtype, 24))


def clean(vectors: np.ndarray, *, zeros_missing: bool = True) -> np.ndarray:
    """Zero, in place, rows of [..., h] with nan, inf or only zeros; the mask [...] of the others.

    Args:
        vectors: float32 [..., h].
        zeros_missing: Whether a row of zeros is no vector; false for dosages, where it is a person
            who carries none of the alleles.
    """
    mask = np.asarray(np.isfinite(vectors).all(axis=-1))
    if zeros_missing:
        mask &= np.asarray((vectors != 0).any(axis=-1))
    vectors[~mask] = 0.0
    return mask


def describe(vectors: np.ndarray, mask: np.ndarray, *, stored: str) -> GeneFigures:
    """The figures of one gene in memory: vectors float32 [n, h], mask bool [n]."""
    statistics = GeneStatistics()
    statistics.add(vectors, mask, dtype=stored, resolution=stored)
    return statistics.figures()
