"""The two haplotypes of a person: one vector of both, and a dictionary of those that repeat.

Common haplotypes are shared: 600 real haplotypes of the OXT locus are 97 distinct sequences, those
of AVP 41. A frozen model gives equal sequences equal vectors, so each is stored once.

Shape legend: r rows, p haplotypes (2, or 1 where they were merged), h width, u distinct vectors.
"""

import hashlib
from typing import Literal, get_args

import numpy as np

from brainfusion.runtime.errors import UserError, nearest

Combination = Literal["mean", "sum", "mean-absdiff"]
COMBINATIONS: tuple[Combination, ...] = get_args(Combination)


def check_combination(how: str, *, n_haplotypes: int) -> Combination:
    """`how`, if it is a way to combine so many haplotypes.

    Raises:
        UserError: An unknown way, or one that needs the two haplotypes where only one vector is.
    """
    if how not in COMBINATIONS:
        raise UserError(f"unknown haplotype combination '{how}'. {nearest(how, COMBINATIONS)}")
    if n_haplotypes == 1 and how != "mean":
        raise UserError(
            f"haplotypes '{how}' needs both haplotypes of a person, but these vectors are one a "
            "person and gene, already merged: use 'mean', or import files that hold both."
        )
    return how


def combined_width(width: int, how: Combination) -> int:
    """Numbers in what `combine` makes of vectors of `width`."""
    return 2 * width if how == "mean-absdiff" else width


def combine(vectors: np.ndarray, how: Combination) -> np.ndarray:
    """One vector of both haplotypes, whichever comes first: phase has no meaning across people.

    Args:
        vectors: float32 [..., p, h].
        how: "mean" of both, "sum", or "mean-absdiff": the mean beside |first - second|, which is
            zero in homozygotes.

    Returns:
        float32 [..., h], or [..., 2h] for "mean-absdiff".
    """
    if vectors.shape[-2] == 1:
        return vectors[..., 0, :]
    first, second = vectors[..., 0, :], vectors[..., 1, :]
    total = first + second
    if how == "sum":
        return total
    total *= np.float32(0.5)
    return total if how == "mean" else np.concatenate([total, np.abs(first - second)], axis=-1)


class Dictionary:
    """Numbers the distinct vectors of one gene as they come; holds a digest of each, 150 bytes."""

    def __init__(self) -> None:
        self._number: dict[bytes, int] = {}

    def __len__(self) -> int:
        return len(self._number)

    def add(self, vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Number the rows of float32 [r, h].

        Vectors are the same if all their bits are (by 128 bits of their SHA-256).

        Returns:
            The number of each row, int64 [r], and which rows are new, in the order of their
            numbers.
        """
        rows = np.ascontiguousarray(vectors).view(np.uint8)
        numbers, new = np.empty(len(rows), dtype=np.int64), []
        for row, values in enumerate(rows):
            digest = hashlib.sha256(values).digest()[:16]
            if digest not in self._number:
                self._number[digest] = len(self._number)
                new.append(row)
            numbers[row] = self._number[digest]
        return numbers, np.array(new, dtype=np.int64)
