"""Who a pair is of, and which pairs must not push each other apart: ids, never a matrix of pairs.

Shape legend: n pairs, k columns of exclusions.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class PairIds:
    """What `info_nce` is told about its pairs (a_i, b_i), one row a pair, all int64.

    Two pairs are positives, negatives or neither. Whatever the other ids say, pairs of one person
    are positives. Two others are negatives unless `excluded` or `within` takes them out.
    """

    person: Tensor | None = None
    """[n] whose pair this is. Pairs of one person (several scans) are positives of each other. A
    negative id is a person of its own, and so is every pair if this is None."""
    excluded: Tensor | None = None
    """[n, k] pairs that share a value in any one column (a twin pair, a family, one DNA vector) are
    not negatives of each other. Each column is compared with itself; -1 matches nobody."""
    within: Tensor | None = None
    """[n] only pairs of the same value (a site, a scanner) are negatives of each other."""

    def __post_init__(self) -> None:
        lengths = set()
        for name, ndim in (("person", 1), ("excluded", 2), ("within", 1)):
            value: Tensor | None = getattr(self, name)
            if value is None:
                continue
            if value.ndim != ndim or value.dtype != torch.int64:
                raise ValueError(
                    f"PairIds: {name} is {tuple(value.shape)} of {value.dtype}; expected int64 of "
                    f"{ndim} dimension{'s' * (ndim > 1)}, one row a pair."
                )
            lengths.add(len(value))
        if len(lengths) > 1:
            raise ValueError(
                f"PairIds: ids of {' and of '.join(map(str, sorted(lengths)))} pairs; expected as "
                "many rows in each."
            )

    def __len__(self) -> int:
        """How many pairs; 0 if nothing is known about any."""
        return next((len(x) for x in self._fields() if x is not None), 0)

    @property
    def empty(self) -> bool:
        """Whether no ids are given at all: as if there were no PairIds."""
        return all(x is None for x in self._fields())

    def take(self, rows: Tensor | slice) -> "PairIds":
        """The ids of some of the pairs, in the order of `rows`."""
        return PairIds(
            person=None if self.person is None else self.person[rows],
            excluded=None if self.excluded is None else self.excluded[rows],
            within=None if self.within is None else self.within[rows],
        )

    def to(self, device: torch.device | str) -> "PairIds":
        """The same ids on `device`."""
        return PairIds(
            person=None if self.person is None else self.person.to(device),
            excluded=None if self.excluded is None else self.excluded.to(device),
            within=None if self.within is None else self.within.to(device),
        )

    def _fields(self) -> tuple[Tensor | None, ...]:
        return self.person, self.excluded, self.within
