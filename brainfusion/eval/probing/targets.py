"""What probes are asked for: targets of each kind, features and confounds, checked and said.

Shape legend: n people, d width.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl

from brainfusion.runtime.errors import UserError, nearest
from brainfusion.runtime.logs import say

CONFOUNDS = ("age", "sex", "site", "motion")
MAX_CLASSES = 20
"""A column of more labels is no target."""


class TargetError(UserError):
    """A target that cannot be predicted; `target` is its name."""

    def __init__(self, target: str, has: str) -> None:
        super().__init__(f"target '{target}' has {has}")
        self.target = target


@dataclass(frozen=True, eq=False)
class Target:
    """A column to predict."""

    name: str
    known: np.ndarray
    """bool [n]."""
    values: np.ndarray
    """float64 [known people]: values, or class numbers."""
    classes: tuple[str, ...] = ()
    """Names of the classes; none for a continuous target."""

    @property
    def n_classes(self) -> int | None:
        """None for a continuous target."""
        return len(self.classes) or None

    @property
    def kind(self) -> str:
        """continuous, binary or multi-class."""
        return {0: "continuous", 2: "binary"}.get(len(self.classes), "multi-class")


def parse_target(subjects: pl.DataFrame, name: str) -> Target:
    """Two values make a binary target, more numbers a continuous one, more labels classes.

    Classes are in sorting order; of two, the second is positive.

    Raises:
        UserError: No such column.
        TargetError: It cannot be predicted.
    """
    if name not in subjects.columns:
        raise UserError(
            f"target '{name}' is no column of the subjects table. {nearest(name, subjects.columns)}"
        )
    column = subjects[name]
    if column.dtype.is_float():
        column = column.fill_nan(None)
    known = column.is_not_null().to_numpy()
    column = column.drop_nulls()
    numeric = column.dtype.is_numeric() or column.dtype == pl.Boolean
    if not numeric:
        column = column.cast(pl.String)
    levels = column.unique().sort()
    if len(levels) < 2:
        raise TargetError(
            name, f"{len(levels)} different values: expected 2 or more; leave it out."
        )
    if len(levels) > 2 and numeric:
        return Target(name, known, column.cast(pl.Float64).to_numpy())
    if len(levels) > MAX_CLASSES:
        raise TargetError(
            name,
            f"{len(levels)} labels: expected numbers or at most {MAX_CLASSES} labels; recode it.",
        )
    values = np.searchsorted(levels.to_numpy(), column.to_numpy())
    return Target(name, known, values.astype(np.float64), tuple(map(str, levels.to_list())))


def check_classes(target: Target, folds: np.ndarray) -> None:
    """Every class in each fold: every training set has all of them, and every fold is scored.

    Raises:
        TargetError: One is missing from a fold.
    """
    if not target.classes:
        return
    counts = np.bincount(target.values.astype(int), minlength=len(target.classes))
    found = [len(np.unique(folds[target.values == k])) for k in range(len(target.classes))]
    if min(found) == folds.max() + 1:
        return
    n_folds = folds.max() + 1
    if target.n_classes == 2:
        raise TargetError(
            target.name,
            f"{counts[1]} positive of {len(target.values)} people: {n_folds} folds need some of "
            "both classes each; use fewer folds or leave this target out.",
        )
    raise TargetError(
        target.name,
        f"{len(counts)} labels, the rarest of {counts.min()} people: {n_folds} folds need some of "
        "every label each; use fewer folds, join labels or leave this target out.",
    )


def named_features(features: dict[str, np.ndarray] | np.ndarray, n: int) -> dict[str, np.ndarray]:
    """Features by name, each [n, d].

    Raises:
        UserError: A wrong shape, or values that are not finite.
    """
    named = features if isinstance(features, dict) else {"features": features}
    for name, values in named.items():
        if values.ndim != 2 or len(values) != n or not values.shape[1]:
            raise UserError(
                f"features '{name}' have shape {list(values.shape)} for {n} people: expected "
                "[people, width], row by row the people of the subjects table."
            )
        if not np.isfinite(values).all():
            raise UserError(
                f"features '{name}' have NaN or infinite values: fill or drop them first."
            )
    return named


def known_confounds(subjects: pl.DataFrame, confounds: Sequence[str]) -> list[str]:
    """Those that the table has.

    Raises:
        UserError: One that was asked for is no column.
    """
    absent = [name for name in confounds if name not in subjects.columns]
    if absent and tuple(confounds) != CONFOUNDS:
        raise UserError(
            f"confound '{absent[0]}' is no column of the subjects table. "
            f"{nearest(absent[0], subjects.columns)}"
        )
    if absent:
        say(f"probe: the subjects table has no {', '.join(absent)}: not among the confounds.")
    return [name for name in confounds if name not in absent]
