"""Tables of one row a vector: from rows in the order of a file to blocks of people and genes.

Rows are read once, in order. That works where rows of a person, or of a gene, stand together (in
each part of the table); a large table in no order is refused with the command that sorts it.

Shape legend: n people, g genes, e haplotypes times strands (1, 2 or 4), r rows of the table,
w stored width.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from brainfusion.genetics.source import (
    BLOCK_BYTES,
    MAX_BLOCK_BYTES,
    Block,
    Findings,
    Source,
    row_ranges,
)
from brainfusion.runtime.errors import UserError


@dataclass(frozen=True, kw_only=True, eq=False)
class LongTable:
    """What the id columns of a table say, and how its vectors are read."""

    where: Path
    subjects: tuple[str, ...]
    genes: tuple[str, ...]
    rows: np.ndarray
    """int [r]: each row's place among `subjects`."""
    columns: np.ndarray
    """int [r]: each row's place among `genes`."""
    extras: np.ndarray
    """int [r]: each row's place among haplotypes and strands, flattened."""
    pair_axes: tuple[int, ...]
    """() or (2,) or (2, 2)."""
    has_haplotypes: bool
    has_strands: bool
    width: int
    dtype: str
    layer: str | None
    parts: tuple[int, ...]
    """Row numbers at which parts of the table begin, and r."""
    vectors: Callable[[int], Iterator[np.ndarray]]
    """(first row) -> float32 pieces [., w] from there to the end, nan where absent."""
    findings: Findings


def long_source(table: LongTable) -> Source:
    """The blocks of a table.

    Raises:
        UserError: Two rows of one vector, or a large table in no order.
    """
    _refuse_repeated(table)
    pieces = _plan(table)

    def load(start: int, stop: int) -> Iterator[Block]:
        cursor = _Cursor(table)
        for rows, columns, taken in pieces[start:stop]:
            shape = (rows.stop - rows.start, columns.stop - columns.start, _n_extras(table))
            values = np.full((*shape, table.width), np.nan, dtype=np.float32)
            for first, piece in cursor.read(taken.start, taken.stop):
                here = slice(first, first + len(piece))
                values[
                    table.rows[here] - rows.start,
                    table.columns[here] - columns.start,
                    table.extras[here],
                ] = piece
            raw = values.reshape(*shape[:2], *table.pair_axes, table.width)
            yield Block(rows=rows, columns=columns, raw=raw, dtype=table.dtype)

    return Source(
        subjects=table.subjects,
        genes=table.genes,
        layer=table.layer,
        width=table.width,
        n_blocks=len(pieces),
        load=load,
        has_haplotypes=table.has_haplotypes,
        has_strands=table.has_strands,
        findings=table.findings,
    )


class _Cursor:
    """Reads rows forward; going back starts again."""

    def __init__(self, table: LongTable) -> None:
        self._table = table
        self._pieces: Iterator[np.ndarray] | None = None
        self._piece = np.empty((0, table.width), dtype=np.float32)
        self._row = 0

    def read(self, start: int, stop: int) -> Iterator[tuple[int, np.ndarray]]:
        """(number of its first row, piece) of the rows from `start` to `stop`."""
        if self._pieces is None or start < self._row:
            self._pieces, self._row = self._table.vectors(start), start
            self._piece = self._piece[:0]
        while self._row < stop:
            if not len(self._piece):
                self._piece = next(self._pieces)
            n = len(self._piece)
            used = self._piece[max(0, start - self._row) : stop - self._row]
            if len(used):
                yield max(start, self._row), used
            n_done = min(n, stop - self._row)
            self._piece, self._row = self._piece[n_done:], self._row + n_done


def _n_extras(table: LongTable) -> int:
    return int(np.prod(table.pair_axes, dtype=int))


def _refuse_repeated(table: LongTable) -> None:
    keys = (table.rows * len(table.genes) + table.columns) * _n_extras(table) + table.extras
    if n_repeated := len(keys) - len(np.unique(keys)):
        raise UserError(
            f"{table.where}: {n_repeated} rows repeat a person and gene: one vector each is "
            "expected; average a person's two haplotypes first, or tell them apart in a column "
            "'haplotype'."
        )


def _plan(table: LongTable) -> list[tuple[slice, slice, slice]]:
    """(people, genes, rows of the table) of each block; each person and gene is in one of them."""
    n, r = len(table.subjects), len(table.rows)
    parts = list(zip(table.parts[:-1], table.parts[1:], strict=True))
    ranges = [_people(table, *part) for part in parts]
    apart = all(before.stop <= after.start for before, after in pairwise(ranges))
    if len(parts) == 1 or not apart:
        parts, ranges = [(0, r)], [slice(0, n)]
    plan = []
    for number, (part, people) in enumerate(zip(parts, ranges, strict=True)):
        # People between two parts' ranges have no rows; the part before takes them in.
        last = ranges[number + 1].start if number + 1 < len(ranges) else n
        plan += _plan_part(table, slice(*part), slice(people.start, last))
    return plan


def _people(table: LongTable, start: int, stop: int) -> slice:
    rows = table.rows[start:stop]
    return slice(int(rows.min()), int(rows.max()) + 1) if len(rows) else slice(0, 0)


def _plan_part(table: LongTable, taken: slice, people: slice) -> list[tuple[slice, slice, slice]]:
    n, g = people.stop - people.start, len(table.genes)
    rows, columns = table.rows[taken], table.columns[taken]
    vector_bytes = 4 * table.width * _n_extras(table)
    if np.all(np.diff(rows) >= 0):  # a person's vectors stand together
        plan = []
        for piece in row_ranges(n, bytes_per_row=g * vector_bytes):
            first, last = people.start + piece.start, people.start + piece.stop
            low, high = taken.start + np.searchsorted(rows, [first, last])
            plan.append((slice(first, last), slice(0, g), slice(int(low), int(high))))
        return plan
    if np.all(np.diff(columns) >= 0) and n * vector_bytes <= MAX_BLOCK_BYTES:
        plan = []
        for piece in row_ranges(g, bytes_per_row=n * vector_bytes):
            low, high = taken.start + np.searchsorted(columns, [piece.start, piece.stop])
            plan.append((people, piece, slice(int(low), int(high))))
        return plan
    if np.all(np.diff(columns) >= 0) and np.all(np.diff(columns * len(table.subjects) + rows) >= 0):
        plan = []
        for gene in range(g):
            for piece in row_ranges(n, bytes_per_row=vector_bytes):
                first, last = people.start + piece.start, people.start + piece.stop
                key = columns * len(table.subjects) + rows
                wanted = gene * len(table.subjects) + np.array([first, last])
                low, high = taken.start + np.searchsorted(key, wanted)
                plan.append((slice(first, last), slice(gene, gene + 1), slice(int(low), int(high))))
        return plan
    if n * g * vector_bytes <= max(MAX_BLOCK_BYTES, BLOCK_BYTES):
        return [(people, slice(0, g), taken)]
    raise UserError(
        f"{table.where}: {len(rows)} rows in no order of people or genes are too many to hold in "
        'memory: sort them first, such as polars.scan_parquet(...).sort("eid").sink_parquet(...).'
    )
