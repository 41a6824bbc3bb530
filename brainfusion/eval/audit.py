"""Does this table belong to these people? An audit of who is paired with whom.

A table that is shifted by one person looks like any other table, and destroys every analysis that
joins it: contrastive training above all, which has nothing else to go by. Three checks need no
truth, only that something in the data knows who somebody is:

- **fingerprint**: connectomes of one person's sessions are alike (Finn et al. 2015, Nature
  Neuroscience);
- **prediction**: features predict age, sex, motion or ancestry of the people they belong to, out of
  fold, better than of anyone else;
- **similarity**: people who are alike in one table of features are alike in another (the
  Hilbert-Schmidt independence criterion, Gretton et al. 2005).

Each is computed for the pairing as it stands and for all shifts along the order of the ids, and
compared with random pairings. A shift that agrees where the pairing as it stands does not is an
error of bookkeeping: nothing else moves everyone by the same number of places.

Shape legend: n people, d width, s shifts, c columns, r random pairings.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl

from brainfusion.eval.design import group_folds
from brainfusion.eval.probing.linear import FeatureSpace, ridge_out_of_fold
from brainfusion.eval.statistics import family_codes
from brainfusion.runtime.errors import UserError

ALIGNED_Z = 4.0
"""A pairing stands out when its agreement is this many standard deviations above random ones."""
BETTER_Z = 3.0
"""A shift beats the pairing as it stands by at least this many standard deviations."""
MIN_PEOPLE = 12
"""Fewer people than this cannot tell a shift from chance."""

_N_RANDOM = 200
_N_FOLDS = 5
_PENALTIES = np.logspace(-2, 3, 6)


@dataclass(frozen=True, kw_only=True)
class Check:
    """How well two sides agree on who is who, for each shift along the order of the ids."""

    what: str
    """What was held against what."""
    n_people: int
    measure: str
    """What `agreement` is."""
    shifts: tuple[int, ...]
    agreement: tuple[float, ...]
    """One value a shift; at shift s, person i is held against person i + s."""
    z: tuple[float, ...]
    """Its distance from random pairings in their standard deviations."""
    chance: float
    """Mean agreement of random pairings."""
    recall_at_1: tuple[float, ...] | None = None
    """Share of people whose nearest is the person at this shift; fingerprints only."""

    @property
    def best(self) -> int:
        """The shift with the highest agreement; 0 where it is as high as any."""
        top = int(np.argmax(self.z))
        return 0 if self.z[top] <= self.z_at(0) else self.shifts[top]

    @property
    def verdict(self) -> str:
        """'aligned', 'shifted', or 'unclear': nothing here knows who is who."""
        if self.best and self.z_at(self.best) >= max(ALIGNED_Z, self.z_at(0) + BETTER_Z):
            return "shifted"
        return "aligned" if self.z_at(0) >= ALIGNED_Z else "unclear"

    def z_at(self, shift: int) -> float:
        """Distance from random pairings at one shift."""
        return self.z[self.shifts.index(shift)]

    def sentence(self) -> str:
        """The verdict with its figures."""
        now, best = self._figures(0), self._figures(self.best)
        if self.verdict == "shifted":
            where = f"{abs(self.best)} place(s) {'up' if self.best < 0 else 'down'} the list"
            return (
                f"SHIFTED {self.what}: the first agrees with what the second has for the person "
                f"{where} of ids ({best}), and not with what it has for the same person ({now}), "
                f"{self.n_people} people."
            )
        if self.verdict == "aligned":
            return f"aligned {self.what}: {now}, {self.n_people} people."
        return (
            f"unclear {self.what}: {now} is within reach of random pairings, so this cannot tell "
            f"({self.n_people} people)."
        )

    def _figures(self, shift: int) -> str:
        place = self.shifts.index(shift)
        found = (
            f"{self.measure} {self.agreement[place]:.3f}, chance {self.chance:.3f}, z "
            f"{self.z[place]:.1f}"
        )
        return found if self.recall_at_1 is None else f"{found}, R@1 {self.recall_at_1[place]:.2f}"


def id_order(subjects: Sequence[str]) -> list[int]:
    """Positions that sort ids as people do: sub-2 before sub-10."""
    keys = [
        [(not part.isdigit(), int(part) if part.isdigit() else 0, part) for part in parts]
        for parts in (re.split(r"(\d+)", subject) for subject in subjects)
    ]
    return sorted(range(len(subjects)), key=keys.__getitem__)


def fingerprint(
    first: np.ndarray,
    second: np.ndarray,
    places: tuple[np.ndarray, np.ndarray],
    *,
    what: str,
    max_shift: int = 5,
    seed: int = 0,
) -> Check:
    """Hold the connectomes of two sessions against each other.

    Args:
        first: [n, d]; missing values 0 after centring.
        second: [m, d].
        places: Each row's position among all people in the order of the ids.
        what: For the record.
        max_shift: Shifts up to this many places either way.
        seed: Of the random pairings.

    Returns:
        The mean correlation between a person's connectome and that of the person `shift` places
        on, over those who have both.

    Raises:
        UserError: Too few people to tell.
    """
    similarity = _rows_unit(first) @ _rows_unit(second).T  # (n, m)
    column_of = {int(place): column for column, place in enumerate(places[1])}
    shared = [row for row, place in enumerate(places[0]) if int(place) in column_of]
    _check_people(len(shared), what)
    shifts = _shifts(max_shift, len(shared))
    agreement, recall = [], []
    for shift in shifts:
        pairs = [
            (row, column_of[int(place) + shift])
            for row, place in enumerate(places[0])
            if int(place) + shift in column_of
        ]
        rows, columns = np.array(pairs).T
        agreement.append(float(similarity[rows, columns].mean()))
        recall.append(float((similarity[rows].argmax(axis=1) == columns).mean()))
    rng = np.random.default_rng([seed, 11])
    rows = np.array(shared)
    columns = np.array([column_of[int(places[0][row])] for row in shared])
    null = np.array(
        [similarity[rows, columns[rng.permutation(len(rows))]].mean() for _ in range(_N_RANDOM)]
    )
    return _check(
        what, len(shared), "mean correlation", shifts, np.array(agreement), null, tuple(recall)
    )


def predictions(
    features: np.ndarray,
    people: pl.DataFrame,
    columns: Sequence[str],
    *,
    what: str,
    max_shift: int = 5,
    seed: int = 0,
) -> list[Check]:
    """Predict each column from features, out of fold, for each shift of the people.

    Shifts are circular, so everyone takes part in each; whole families stay in one fold.

    Args:
        features: [n, d], rows in the order of the ids.
        people: The same people's rows of subjects.parquet, in the same order.
        columns: What to predict: numbers, or two labels.
        what: The name of the features.
        max_shift: Shifts up to this many places either way.
        seed: Of folds and random pairings.

    Returns:
        One check a column that varies; the agreement is the correlation of prediction and value.

    Raises:
        UserError: Too few people to tell.
    """
    n = people.height
    _check_people(n, what)
    values = {name: _numbers(people[name]) for name in columns}
    values = {name: x for name, x in values.items() if x is not None}
    if not values:
        return []
    shifts, rng = _shifts(max_shift, n), np.random.default_rng([seed, 12])
    orders = [np.roll(np.arange(n), -shift) for shift in shifts]
    orders += [rng.permutation(n) for _ in range(_N_RANDOM)]
    targets = np.stack([x[order] for x in values.values() for order in orders], axis=1)
    families = family_codes(people["family"].to_list() if "family" in people.columns else None, n)
    folds = group_folds(families, _N_FOLDS, balance=np.empty((n, 0)), seed=seed)
    space = FeatureSpace(features, folds)
    predicted, _ = ridge_out_of_fold(space, np.ones((n, 1)), targets, _PENALTIES)
    scores = _correlations(predicted, targets).reshape(len(values), len(orders))
    return [
        _check(f"{what} and {name}", n, "r", shifts, row[: len(shifts)], row[len(shifts) :])
        for name, row in zip(values, scores, strict=True)
    ]


def similarities(
    first: np.ndarray, second: np.ndarray, *, what: str, max_shift: int = 5, seed: int = 0
) -> Check:
    """Are people who are alike in one table alike in the other? For each (circular) shift.

    Args:
        first: [n, d], rows in the order of the ids.
        second: [n, e], the same people.
        what: For the record.
        max_shift: Shifts up to this many places either way.
        seed: Of the random pairings.

    Returns:
        The centred kernel alignment (Kornblith et al. 2019) of standardised columns.

    Raises:
        UserError: Too few people to tell.
    """
    n = len(first)
    _check_people(n, what)
    a, b = _centred_gram(first), _centred_gram(second)
    shifts, rng = _shifts(max_shift, n), np.random.default_rng([seed, 13])
    orders = [np.roll(np.arange(n), -shift) for shift in shifts]
    orders += [rng.permutation(n) for _ in range(_N_RANDOM)]
    scores = np.array([float((a * b[np.ix_(order, order)]).sum()) for order in orders])
    return _check(what, n, "CKA", shifts, scores[: len(shifts)], scores[len(shifts) :])


def _check(
    what: str,
    n: int,
    measure: str,
    shifts: tuple[int, ...],
    agreement: np.ndarray,
    null: np.ndarray,
    recall: tuple[float, ...] | None = None,
) -> Check:
    spread = max(float(null.std()), 1e-12)
    return Check(
        what=what,
        n_people=n,
        measure=measure,
        shifts=shifts,
        agreement=tuple(float(value) for value in agreement),
        z=tuple(float(value) for value in (agreement - null.mean()) / spread),
        chance=float(null.mean()),
        recall_at_1=recall,
    )


def _check_people(n: int, what: str) -> None:
    if n < MIN_PEOPLE:
        raise UserError(
            f"{what}: {n} people are on both sides, and fewer than {MIN_PEOPLE} cannot tell a "
            "shift from chance: audit more people."
        )


def _shifts(max_shift: int, n: int) -> tuple[int, ...]:
    most = min(max_shift, n // 4)
    return tuple(range(-most, most + 1))


def _rows_unit(x: np.ndarray) -> np.ndarray:
    x = x - x.mean(axis=1, keepdims=True)
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)


def _centred_gram(x: np.ndarray) -> np.ndarray:
    x = np.asarray(x, np.float64) - x.mean(axis=0)
    spread = x.std(axis=0)
    x = x[:, spread > 0] / spread[spread > 0]
    gram = x @ x.T
    return gram / max(float(np.linalg.norm(gram)), 1e-12)


def _numbers(column: pl.Series) -> np.ndarray | None:
    """A column as float64 [n] with the mean where it is unknown; None if it says nothing."""
    if not column.dtype.is_numeric() and column.dtype != pl.Boolean:
        labels = sorted(column.drop_nulls().unique().to_list())
        if len(labels) != 2:
            return None
        column = (column == labels[1]).cast(pl.Float64)
    values = column.cast(pl.Float64).fill_null(float("nan")).to_numpy().copy()
    known = np.isfinite(values)
    if known.sum() < MIN_PEOPLE or np.ptp(values[known]) == 0:
        return None
    values[~known] = values[known].mean()
    return values


def _correlations(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Of columns; 0 where a column is constant."""
    a, b = a - a.mean(axis=0), b - b.mean(axis=0)
    norm = np.sqrt((a**2).sum(axis=0) * (b**2).sum(axis=0))
    return np.where(norm > 0, (a * b).sum(axis=0) / np.where(norm > 0, norm, 1.0), 0.0)
