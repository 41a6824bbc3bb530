"""Personal haplotypes: the reference with a person's alleles, each distinct one once.

Shape legend: n people, p haplotypes (2, or 1), u distinct sequences, v variants.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class GeneHaplotypes:
    """One gene's distinct sequences, and who carries which."""

    gene: str
    strand: str
    """"+" if the sequences are written in the gene's own direction."""
    sequences: tuple[str, ...]
    """u distinct sequences, in the order in which they first occur."""
    index: np.ndarray
    """int32 [n, p] into `sequences`."""
    mask: np.ndarray
    """bool [n], false where too little is known of the person."""
    indels: np.ndarray
    """bool [u], true where an insertion or deletion was applied."""
    n_variants: int = 0
    """Variants that at least one haplotype carries."""
    counts: Counter[str] = field(default_factory=Counter)
    """What was left out or changed (`phased.WORDS`) -> how often."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """What one alternative allele does to the region, without the bases it shares with REF."""

    start: int
    """First base that is replaced, counted from the region's first."""
    end: int
    """Behind the last; `start` for an insertion."""
    bases: str

    @property
    def is_indel(self) -> bool:
        """Whether the length changes."""
        return self.end - self.start != len(self.bases)


def change_of(start: int, ref: str, alt: str) -> Change:
    """An allele at `start`, cut down to the bases that differ (suffix first, then prefix).

    So a substitution and a deletion that are written at the same position do not collide, and
    CA > TA is a change of one base.
    """
    while ref and alt and ref[-1] == alt[-1]:
        ref, alt = ref[:-1], alt[:-1]
    while ref and alt and ref[0] == alt[0]:
        ref, alt, start = ref[1:], alt[1:], start + 1
    return Change(start=start, end=start + len(ref), bases=alt)


def patch(reference: str, changes: Sequence[Change]) -> tuple[str, int]:
    """The reference with one haplotype's changes.

    Changes that touch the same bases (or insert at the same place) exclude each other: the first
    wins, in the order of their starts and then of the list.

    Returns:
        The sequence, and how many changes were left out.
    """
    pieces, behind, n_skipped = [], 0, 0
    last_start = -1
    for change in sorted(changes, key=lambda change: change.start):
        if change.start < behind or change.start == last_start:
            n_skipped += 1
            continue
        pieces += [reference[behind : change.start], change.bases]
        behind, last_start = change.end, change.start
    return "".join([*pieces, reference[behind:]]), n_skipped


def build_haplotypes(
    reference: str, alleles: np.ndarray, changes: Sequence[Sequence[Change | None]]
) -> tuple[tuple[str, ...], np.ndarray, np.ndarray, int]:
    """Distinct sequences of people's alleles.

    Args:
        reference: The region's bases.
        alleles: uint8 [n, p, v]: 0 for the reference, k for the k-th alternative allele.
        changes: For each variant, what its alternative alleles do; None where one is not applied.

    Returns:
        The sequences, index int32 [n, p], indels bool [u], and how often a change was left out
        because another of the same haplotype touches the same bases.
    """
    n, p, v = alleles.shape
    rows = np.ascontiguousarray(alleles.reshape(n * p, v))
    combinations: dict[bytes, int] = {}
    which = np.array([combinations.setdefault(row.tobytes(), len(combinations)) for row in rows])
    n_carriers = np.bincount(which)
    sequences: dict[str, int] = {}
    indels: list[bool] = []
    places = np.empty(len(combinations), dtype=np.int32)
    n_skipped = 0
    for packed, number in combinations.items():
        carried = np.frombuffer(packed, dtype=np.uint8)
        applied = [changes[site][carried[site] - 1] for site in np.flatnonzero(carried).tolist()]
        mine = [change for change in applied if change is not None]
        sequence, skipped = patch(reference, mine)
        n_skipped += skipped * int(n_carriers[number])
        places[number] = sequences.setdefault(sequence, len(sequences))
        if len(sequences) > len(indels):
            indels.append(any(change.is_indel for change in mine))
    return tuple(sequences), places[which].reshape(n, p), np.array(indels), n_skipped
