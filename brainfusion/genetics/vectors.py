"""Vectors that stay where they are, encoded, and are decoded when asked for.

`StoredVectors` offers what is used of an array [person, gene, width]: a shape, rows, columns and
`np.asarray`. Only what is asked for is read. An encoding knows how to read haplotypes:

- `Dense`: float32 as it is
- `Centred`: float16 of what differs from the gene's centre
- `Indexed`: a number a haplotype into a dictionary of the gene's distinct vectors

Shape legend: n people, g genes, p haplotypes (2, or 1 where they were merged), h width as stored,
k width once haplotypes are combined, b people and c genes of a batch.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from brainfusion.genetics.haplotypes import (
    Combination,
    check_combination,
    combine,
    combined_width,
)

_BLOCK_BYTES = 32 * 2**20


class Encoding(Protocol):
    """How vectors lie on disk or in memory."""

    shape: tuple[int, int, int, int]
    """People, genes, haplotypes, width."""

    def read(self, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        """float32 [b, c, p, h] of these people and genes, in the order given."""
        ...


class Dense:
    """float32 [n, g, h] or [n, g, 2, h], mapped or in memory."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array
        n, g, *pair, h = array.shape
        self.shape: tuple[int, int, int, int] = (n, g, int(*pair) if pair else 1, h)

    def read(self, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        """A copy of the rows."""
        return _take(self.array, rows, columns).reshape(len(rows), len(columns), *self.shape[2:])


class Centred:
    """float16 residuals as `Dense`, of which `residual * scale + centre` is the vector."""

    def __init__(
        self, residuals: np.ndarray, centre: np.ndarray, scale: np.ndarray, mask: np.ndarray
    ) -> None:
        self._residuals, self._mask = Dense(residuals), mask
        self._centre, self._scale = centre, scale  # [g, h] and [g]
        self.shape = self._residuals.shape

    def read(self, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        """Vectors in float32; zeros where there is none."""
        values = self._residuals.read(rows, columns).astype(np.float32)
        values *= self._scale[columns][:, None, None]
        values += self._centre[columns][:, None]
        values[~_take(self._mask, rows, columns)] = 0.0
        return values


class Indexed:
    """A number [n, p, g] into the distinct vectors of each gene, float32 [all genes' u, h].

    Args:
        index: Numbers within a gene.
        offsets: Where each gene's vectors begin, [g + 1].
        dictionary: Vectors, gene after gene; writable memory (torch asks for it), never written to.
    """

    def __init__(self, index: np.ndarray, offsets: np.ndarray, dictionary: np.ndarray) -> None:
        self._index, self._offsets, self._dictionary = index, offsets, dictionary
        n, p, g = index.shape
        self.shape = (n, g, p, dictionary.shape[1])

    def read(self, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        """A copy of each haplotype's vector."""
        return self._dictionary[self._numbers(rows, columns).transpose(0, 2, 1)]

    def total(self, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        """float32 [b, h]: the sum over these genes and both haplotypes, none copied on the way."""
        import torch

        numbers = self._numbers(rows, columns).reshape(len(rows), -1)
        vectors = torch.from_numpy(self._dictionary)
        return torch.nn.functional.embedding_bag(
            torch.from_numpy(numbers), vectors, mode="sum"
        ).numpy()

    def _numbers(self, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        """Rows of the dictionary, int64 [b, p, c]."""
        index = self._index[rows]
        if len(columns) != index.shape[2] or np.any(np.diff(columns) != 1):
            index = index[:, :, columns]
        return index.astype(np.int64) + self._offsets[columns]


class StoredVectors:
    """float32 [n, g, k], read-only, decoded as it is asked for.

    `vectors[rows, columns]` reads these; of rows and columns one may be a list. `np.asarray` reads
    everything.
    """

    dtype = np.dtype(np.float32)
    ndim = 3

    def __init__(
        self,
        encoding: Encoding,
        *,
        how: Combination = "mean",
        rows: np.ndarray | None = None,
        columns: np.ndarray | None = None,
    ) -> None:
        n, g, p, h = encoding.shape
        self.encoding = encoding
        self.how: Combination = check_combination(how, n_haplotypes=p)
        self.n_haplotypes, self.stored_width = p, h
        self._rows = np.arange(n) if rows is None else rows
        self._columns = np.arange(g) if columns is None else columns
        self.shape = (len(self._rows), len(self._columns), combined_width(h, self.how))

    def __len__(self) -> int:
        return self.shape[0]

    def combined(self, how: Combination) -> "StoredVectors":
        """The same haplotypes, combined otherwise."""
        return StoredVectors(self.encoding, how=how, rows=self._rows, columns=self._columns)

    def subset(self, rows: np.ndarray, columns: np.ndarray | None = None) -> "StoredVectors":
        """These rows and columns, in the order given; reads nothing."""
        return StoredVectors(
            self.encoding,
            how=self.how,
            rows=self._rows[rows],
            columns=self._columns if columns is None else self._columns[columns],
        )

    def haplotypes(self, rows: np.ndarray, columns: np.ndarray | None = None) -> np.ndarray:
        """float32 [b, c, p, h] of these rows and columns (all columns without)."""
        chosen = self._columns if columns is None else self._columns[columns]
        return self.encoding.read(self._rows[rows], chosen)

    def take(self, rows: np.ndarray, columns: np.ndarray | None = None) -> np.ndarray:
        """float32 [b, c, k] of these rows and columns (all columns without)."""
        n_columns = self.shape[1] if columns is None else len(columns)
        if self.n_haplotypes == 1:
            return self.haplotypes(rows, columns)[:, :, 0]
        out = np.empty((len(rows), n_columns, self.shape[2]), dtype=np.float32)
        for part in self._parts(len(rows), n_columns):
            out[part] = combine(self.haplotypes(rows[part], columns), self.how)
        return out

    def total(self, rows: np.ndarray) -> np.ndarray:
        """float32 [b, k]: the sum over genes (those that are absent count as zeros)."""
        if isinstance(self.encoding, Indexed) and self.how != "mean-absdiff":
            total = self.encoding.total(self._rows[rows], self._columns)
            return total if self.how == "sum" else total / np.float32(self.n_haplotypes)
        out = np.empty((len(rows), self.shape[2]), dtype=np.float32)
        for part in self._parts(len(rows), self.shape[1]):
            np.sum(self.take(rows[part]), axis=1, out=out[part])
        return out

    def _parts(self, n_rows: int, n_columns: int) -> Iterator[slice]:
        each = 4 * n_columns * self.n_haplotypes * self.stored_width
        step = max(1, _BLOCK_BYTES // max(each, 1))
        return (slice(start, start + step) for start in range(0, n_rows, step))

    def __getitem__(self, key: Any) -> np.ndarray:
        key = key if isinstance(key, tuple) else (key,)
        if any(part is Ellipsis or part is None for part in key) or len(key) > 3:
            raise TypeError("stored vectors take [rows, columns, values]: use np.asarray() first")
        first, second, last = (*key, *(slice(None),) * (3 - len(key)))
        rows, columns = np.arange(self.shape[0])[first], np.arange(self.shape[1])[second]
        if isinstance(first, Sequence | np.ndarray) and isinstance(second, Sequence | np.ndarray):
            raise TypeError("rows and columns are both lists: use take(rows, columns)")
        values = self.take(np.atleast_1d(rows), np.atleast_1d(columns))[:, :, last]
        drop = tuple(axis for axis, part in enumerate((rows, columns)) if np.ndim(part) == 0)
        return values.squeeze(axis=drop)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if copy is False:
            raise ValueError("stored vectors are decoded, which is a copy")
        return self.take(np.arange(self.shape[0])).astype(dtype or self.dtype, copy=False)


def _take(array: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """`array[rows][:, columns]`, reading no more than that."""
    if len(columns) == array.shape[1] and np.array_equal(columns, np.arange(len(columns))):
        return array[rows]
    return array[rows[:, None], columns]
