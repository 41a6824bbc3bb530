"""Which columns of a tile of S are candidates of which rows, found from ids, a tile at a time.

Ids that match nobody else are dropped first, so that a tile costs a comparison of those of its rows
and columns that may match: nothing where people are unrelated.

Shape legend: n pairs of this process, m pairs of all processes, h matches in a tile.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from brainfusion.alignment.losses.pair_ids import PairIds
from brainfusion.alignment.losses.peers import Peers


@dataclass(frozen=True)
class Places:
    """What the ids say of one tile.

    `positives` are the entries (row, column) of pairs of one person, the diagonal of S excepted;
    `hidden` the entries that are neither positive nor negative; `outside` the same as a mask.
    """

    positives: tuple[Tensor, Tensor] | None = None
    hidden: tuple[Tensor, Tensor] | None = None
    outside: Tensor | None = None

    def hide(self, block: Tensor) -> None:
        """Set what is no candidate to minus infinity, in place."""
        if self.outside is not None:
            block.masked_fill_(self.outside, -torch.inf)
        if self.hidden is not None:
            block[self.hidden] = -torch.inf


_ALL = Places()


@dataclass(frozen=True)
class _Labels:
    """One kind of id: whole numbers from 0 where somebody shares it, -1 where nobody does."""

    all: Tensor  # [m]
    offset: int

    def matches(self, i: slice, j: slice) -> tuple[Tensor, Tensor]:
        """Entries (row, column) of the tile whose labels are shared: [h] and [h]."""
        first = self.all[self.offset + i.start : self.offset + i.stop]
        second = self.all[j]
        rows, columns = ((x >= 0).nonzero()[:, 0] for x in (first, second))
        if not len(rows) or not len(columns):
            return rows[:0], columns[:0]
        r, c = torch.nonzero(first[rows, None] == second[None, columns], as_tuple=True)
        return rows[r], columns[c]


@dataclass(frozen=True)
class Candidates:
    """Who is a candidate of whom, for the rows of this process against those of all processes."""

    offset: int
    person: _Labels | None
    excluded: tuple[_Labels, ...]
    within: Tensor | None  # [m]
    weights: Tensor | None
    """[m] one over the number of a pair's positives, itself among them; None where it is 1."""

    def places(self, i: slice, j: slice) -> Places | None:
        """Of rows `i` (of this process) and columns `j` (of all); None if nobody is a candidate."""
        positives = self._off_diagonal(self.person.matches(i, j), i, j) if self.person else None
        outside = None
        if self.within is not None:
            rows = self.within[self.offset + i.start : self.offset + i.stop]
            columns = self.within[j]
            if bool((rows.amin() > columns.amax()) | (rows.amax() < columns.amin())):
                if positives is None:
                    return None
                outside = torch.ones(len(rows), len(columns), dtype=torch.bool, device=rows.device)
            elif bool((rows.amin() != columns.amax()) | (rows.amax() != columns.amin())):
                outside = rows[:, None] != columns[None, :]
            if outside is not None and positives is not None:
                outside[positives] = False
        hidden = self._hidden(i, j)
        if positives is None and hidden is None and outside is None:
            return _ALL
        return Places(positives, hidden, outside)

    def _hidden(self, i: slice, j: slice) -> tuple[Tensor, Tensor] | None:
        found = [labels.matches(i, j) for labels in self.excluded]
        if not any(len(rows) for rows, _ in found):
            return None
        rows, columns = (torch.cat(x) for x in zip(*found, strict=True))
        if self.person is not None:
            mine = self.person.all[self.offset + i.start + rows]
            other = (mine < 0) | (mine != self.person.all[j.start + columns])
            rows, columns = rows[other], columns[other]
        return self._off_diagonal((rows, columns), i, j)

    def _off_diagonal(
        self, found: tuple[Tensor, Tensor], i: slice, j: slice
    ) -> tuple[Tensor, Tensor] | None:
        rows, columns = found
        other = rows + (self.offset + i.start) != columns + j.start
        rows, columns = rows[other], columns[other]
        return (rows, columns) if len(rows) else None


def find_candidates(ids: PairIds | None, peers: Peers, dtype: torch.dtype) -> Candidates | None:
    """The candidates of this process' pairs among those of all ranks; None if all are negatives.

    The ids of all ranks are kept on each: 8 bytes an id, whichever way the features travel.
    """
    if ids is None or ids.empty:
        return None
    person = excluded = within = weights = None
    if ids.person is not None:
        values = peers.gather(ids.person[:, None])[:, 0]
        person, counts = _labels(values, peers)
        weights = None if person is None else counts.to(dtype).reciprocal()
    if ids.excluded is not None:
        columns = peers.gather(ids.excluded).unbind(1)
        excluded = [_labels(column, peers)[0] for column in columns]
    if ids.within is not None:
        within = peers.gather(ids.within[:, None])[:, 0]
        within = within if len(within.unique()) > 1 else None
    kinds = tuple(x for x in excluded or () if x is not None)
    if person is None and within is None and not kinds:
        return None
    return Candidates(peers.offset, person, kinds, within, weights)


def _labels(values: Tensor, peers: Peers) -> tuple[_Labels | None, Tensor]:
    """Labels of values >= 0 that occur twice or more, and how often each pair's value occurs."""
    _, inverse, counts = values.unique(return_inverse=True, return_counts=True)
    own = counts[inverse].masked_fill_(values < 0, 1)
    labels = inverse.masked_fill(own < 2, -1)
    return (_Labels(labels, peers.offset) if bool((own > 1).any()) else None), own
