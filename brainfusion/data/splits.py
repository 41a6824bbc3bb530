"""Who is in train, validation and test: whole families, in every site's proportions.

People who share `family` never land on two sides: a relative in the test set makes retrieval look
better than it is. Sites are filled one by one, so that each side holds every site's share.
"""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import polars as pl

from brainfusion.runtime.errors import UserError
from brainfusion.runtime.files import hash_json, read_json, write_json

SIDES = ("train", "validation", "test")
_FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Splits:
    """Three lists of people, sorted, without overlap."""

    train: tuple[str, ...]
    validation: tuple[str, ...]
    test: tuple[str, ...]
    seed: int = 0
    fractions: tuple[float, float, float] = (0.7, 0.1, 0.2)
    group: str = "subject"
    """What is kept whole: "family", or "subject" where the table has no families."""
    stratify: str | None = None
    """The column whose values each side holds in proportion: "site", or None without one."""

    @classmethod
    def make(
        cls,
        subjects: pl.DataFrame,
        *,
        fractions: tuple[float, float, float] = (0.7, 0.1, 0.2),
        seed: int = 0,
    ) -> "Splits":
        """Split people by whole families, stratified by site and family size.

        A pure function of (seed, ids, families, sites): the order of rows does not matter. Sizes
        match `fractions` to within about the largest family.

        Args:
            subjects: Columns `subject` and, where known, `family` and `site`; an empty family is
                nobody's relative.
            fractions: Shares of people in train, validation and test; they sum to one.
            seed: Another seed gives another split.

        Raises:
            UserError: There are fewer families than sides to fill, or fractions are wrong.
        """
        fractions = _check_fractions(fractions)
        families = _families(subjects)
        sides = _fill(_ordered(subjects, families, seed), fractions)
        return cls(
            **{side: tuple(sorted(sides[i])) for i, side in enumerate(SIDES)},
            seed=seed,
            fractions=fractions,
            group="family" if "family" in subjects.columns else "subject",
            stratify="site" if "site" in subjects.columns else None,
        )

    @property
    def hash(self) -> str:
        """A hash of the three lists, whatever made them."""
        return hash_json({side: sorted(getattr(self, side)) for side in SIDES})

    def label(self, subjects: Sequence[str]) -> list[str]:
        """The side of each person: "train", "validation" or "test".

        Raises:
            UserError: Someone is in none of them.
        """
        unknown = [subject for subject in subjects if subject not in self._side]
        if unknown:
            raise UserError(
                f"{len(unknown)} of {len(subjects)} people are in no split (for example "
                f"{', '.join(unknown[:3])}): expected people of the cohort that was split; take "
                "them out, or delete splits.json to split again."
            )
        return [self._side[subject] for subject in subjects]

    def save(self, path: Path) -> None:
        """Write `splits.json`."""
        write_json(
            path,
            {
                "format": _FORMAT,
                "group": self.group,
                "stratify": self.stratify,
                "seed": self.seed,
                "fractions": list(self.fractions),
                "hash": self.hash,
                **{side: list(getattr(self, side)) for side in SIDES},
            },
        )

    @classmethod
    def load(cls, path: Path) -> "Splits":
        """Read `splits.json`.

        Raises:
            UserError: It is not there, lacks keys, lists someone twice, or its hash does not fit.
        """
        if not path.is_file():
            raise UserError(f"{path} does not exist: expected a split made by brainfusion.")
        values = read_json(path)
        keys = ("group", "stratify", "seed", "fractions", "hash", *SIDES)
        if not isinstance(values, dict) or any(key not in values for key in keys):
            raise UserError(f"{path}: expected the keys {', '.join(keys)} (docs/formats.md).")
        splits = cls(
            **{side: tuple(values[side]) for side in SIDES},
            seed=values["seed"],
            fractions=tuple(values["fractions"]),
            group=values["group"],
            stratify=values["stratify"],
        )
        everyone = [subject for side in SIDES for subject in getattr(splits, side)]
        if n_twice := len(everyone) - len(set(everyone)):
            raise UserError(f"{path} lists {n_twice} people twice: delete it to split again.")
        if splits.hash != values["hash"]:
            raise UserError(
                f"{path} was edited: its lists hash to {splits.hash}, it says {values['hash']}. "
                "Restore it, or delete it to split again (results then change)."
            )
        return splits

    def check_families(self, subjects: pl.DataFrame) -> None:
        """Check these splits against a cohort's table.

        Raises:
            UserError: People of one are not in the other, or a family stands on two sides.
        """
        known = set(subjects["subject"].to_list())
        n_gone, n_new = len(self._side.keys() - known), len(known - self._side.keys())
        if n_gone or n_new:
            raise UserError(
                f"splits.json and subjects.parquet disagree: {n_gone} people are only in the "
                f"split and {n_new} only in the table. Restore the table, or delete splits.json "
                "to split again (results then change)."
            )
        torn = sum(
            len({self._side[subject] for subject in members}) > 1
            for members in _families(subjects).values()
        )
        if torn:
            raise UserError(
                f"splits.json puts {torn} families on two sides: relatives in train and test leak; "
                "delete splits.json to split again."
            )

    @cached_property
    def _side(self) -> dict[str, str]:
        return {subject: side for side in SIDES for subject in getattr(self, side)}


def _check_fractions(fractions: Sequence[float]) -> tuple[float, float, float]:
    train, validation, test = fractions if len(fractions) == 3 else (0.0, 0.0, 0.0)
    if min(train, validation, test) < 0 or abs(train + validation + test - 1) > 1e-6 or not train:
        raise UserError(
            f"split fractions {tuple(fractions)} must be three shares (train, validation, test) "
            "that sum to 1, with train above 0."
        )
    return float(train), float(validation), float(test)


def _families(subjects: pl.DataFrame) -> dict[tuple[str, str], list[str]]:
    """People by family, each list sorted; a person without one is a family of their own."""
    ids = subjects["subject"].to_list()
    names = subjects["family"].to_list() if "family" in subjects.columns else [None] * len(ids)
    families: defaultdict[tuple[str, str], list[str]] = defaultdict(list)
    for subject, name in zip(ids, names, strict=True):
        families[("family", str(name)) if name else ("alone", subject)].append(subject)
    return {key: sorted(members) for key, members in families.items()}


def _ordered(
    subjects: pl.DataFrame, families: dict[tuple[str, str], list[str]], seed: int
) -> list[list[str]]:
    """Families by site, then size, then in an order that only the seed and the ids decide."""
    ids = subjects["subject"].to_list()
    sites = subjects["site"].to_list() if "site" in subjects.columns else [None] * len(ids)
    site_of = {subject: str(site or "") for subject, site in zip(ids, sites, strict=True)}

    def rank(members: list[str]) -> tuple[Any, ...]:
        counts = Counter(site_of[subject] for subject in members)
        site = min(counts, key=lambda name: (-counts[name], name))
        digest = hashlib.sha256(f"{seed}:{members[0]}".encode()).digest()
        return site, -len(members), digest, members[0]

    return sorted(families.values(), key=rank)


def _fill(ordered: list[list[str]], fractions: Sequence[float]) -> list[list[str]]:
    """Deal whole families to the side that is furthest behind its share of those dealt so far.

    Every stretch of the order (a site, a family size) is dealt in proportion, and what one site
    rounds off the next makes good.
    """
    wanted = [i for i, fraction in enumerate(fractions) if fraction > 0]
    if len(ordered) < len(wanted):
        raise UserError(
            f"{len(ordered)} families cannot fill {len(wanted)} sides (train, validation, test) "
            "without tearing one apart: expected at least one family a side; add people, or give "
            "a fraction of 0 to a side."
        )
    dealt: list[list[list[str]]] = [[] for _ in SIDES]
    sizes, n_dealt = [0] * len(SIDES), 0
    for members in ordered:
        n_dealt += len(members)
        side = max(wanted, key=lambda i: (fractions[i] * n_dealt - sizes[i], -i))
        dealt[side].append(members)
        sizes[side] += len(members)
    for i in wanted:  # Only cohorts of a few families leave a side empty.
        if not dealt[i]:
            donor = max(wanted, key=lambda j: (len(dealt[j]), sizes[j]))
            smallest = min(dealt[donor], key=lambda members: (len(members), members))
            dealt[donor].remove(smallest)
            dealt[i].append(smallest)
    return [[subject for members in side for subject in members] for side in dealt]
