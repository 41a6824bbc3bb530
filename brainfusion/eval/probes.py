"""Linear probes: what a representation knows about a trait, beyond age, sex, site and motion.

For each target three kinds of row: the confounds alone, the features, and the features with the
confounds taken out. Everything that is fitted (confound regression, penalty, model) is fitted in
the training people of an outer fold, families stay on one side, and all representations share the
folds.

Continuous targets: ridge; R2 against the mean of the training people (the coefficient of
determination, not a squared correlation; below 0 is worse than guessing the mean). For
"name | confounds", R2 is of what the confounds leave unexplained. Binary targets: L2 logistic
regression; AUROC over pairs of people of one held-out fold, because scores of different models do
not compare; "name | confounds" takes the confounds out of the features.

p-values: whole families of equal size exchange their targets within a site and everything is fitted
again, B times. Ridge: the penalty is chosen again in each. Logistic: each refit keeps the penalty
that the fold chose for the true labels, in float32 and to 1e-5 nats. "name | confounds" of a
continuous target permutes what the confounds leave (Freedman and Lane 1983). The null is thus:
within a site, families could swap targets without changing how well the features predict them.
Intervals: bootstrap over families of the out-of-fold predictions, the fitted models taken as given.

Shape legend: n people, d width, c columns, b permutations or bootstrap draws.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from brainfusion.eval.design import covariate_matrix, group_folds
from brainfusion.eval.linear import FeatureSpace, LogisticSearch, RidgeSearch, log_loss
from brainfusion.eval.statistics import (
    block_permutations,
    bootstrap_weights,
    family_codes,
    interval,
    midranks,
    p_value,
)
from brainfusion.runtime.errors import UserError, nearest
from brainfusion.runtime.logs import say
from brainfusion.runtime.threads import one_thread

if TYPE_CHECKING:
    import pandas as pd

CONFOUNDS = ("age", "sex", "site", "motion")
PENALTIES = np.logspace(-2, 5, 15)
"""Of ridge, for features of mean squared norm 1; logistic regression takes every second."""
CONFOUNDS_ONLY = "confounds only"

SCHEMA = {
    "target": pl.String,
    "kind": pl.String,
    "features": pl.String,
    "metric": pl.String,
    "value": pl.Float64,
    "ci_low": pl.Float64,
    "ci_high": pl.Float64,
    "p_value": pl.Float64,
    "chance": pl.Float64,
    "n": pl.Int64,
    "n_positive": pl.Int64,
    "n_missing": pl.Int64,
    "r": pl.Float64,
    "mae": pl.Float64,
    "balanced_accuracy": pl.Float64,
    "log_loss": pl.Float64,
    "brier": pl.Float64,
    "penalty": pl.Float64,
    "confounds": pl.String,
}


class TargetError(UserError):
    """A target that cannot be predicted; `target` is its name."""

    def __init__(self, target: str, has: str) -> None:
        super().__init__(f"target '{target}' has {has}")
        self.target = target


def probe(
    features: dict[str, np.ndarray] | np.ndarray,
    subjects: "pl.DataFrame | pd.DataFrame",
    targets: Sequence[str],
    *,
    confounds: Sequence[str] = CONFOUNDS,
    n_folds: int = 5,
    penalties: Sequence[float] | np.ndarray | None = None,
    n_permutations: int = 200,
    n_bootstrap: int = 500,
    seed: int = 0,
) -> pl.DataFrame:
    """Predict targets from frozen features, by nested cross-validation.

    Args:
        features: Name -> [n, d], or one array. Columns are not scaled one by one.
        subjects: A row a person, in the order of the features, in polars or pandas. `family` keeps
            relatives in one fold, `site` is what permutations stay within; both may be absent.
        targets: Columns of `subjects`. Two values make a binary target (the higher one, in sorting
            order, is positive); people without a value are left out and counted.
        confounds: Columns to hold against the features. The target itself is left out of them. The
            defaults that `subjects` lacks are left out and said; a missing value is a level (or an
            indicator) of its own.
        n_folds: Outer folds; the inner ones are the others.
        penalties: Ridge penalties and 1 / C; `PENALTIES` if omitted.
        n_permutations: For `p_value`; 0 for none.
        n_bootstrap: For `ci_low` and `ci_high` (95 %); 0 for none.
        seed: Of folds, permutations and bootstrap.

    Returns:
        A row for each target and representation, columns as in `SCHEMA`: `value` is R2 or AUROC
        (`metric`), `chance` 0 or 0.5; `penalty` is the median over folds; `confounds` are those
        used.
    """
    if not isinstance(subjects, pl.DataFrame):
        subjects = pl.from_pandas(subjects)
    named = _named(features, subjects.height)
    known = _known_confounds(subjects, confounds)
    parsed = [_target(subjects, name) for name in dict.fromkeys(targets)]
    grid = PENALTIES if penalties is None else np.asarray(penalties, np.float64)
    labels_grid = grid[::2] if penalties is None else grid
    if n_folds < 3:
        raise UserError(f"n_folds={n_folds}: nested cross-validation needs 3 folds or more.")
    plan = _Plan(grid, labels_grid, n_folds, n_permutations, n_bootstrap, seed)
    groups: dict[bytes, list[_Target]] = {}
    for target in parsed:
        groups.setdefault(target.known.tobytes(), []).append(target)
    rows: list[dict[str, Any]] = []
    with one_thread() if subjects.height <= 4000 else nullcontext():
        for group in groups.values():
            rows += _probe_group(named, subjects, group, known, plan)
    place = {target.name: i for i, target in enumerate(parsed)}
    rows.sort(key=lambda row: place[row["target"]])
    return pl.DataFrame(rows, schema=SCHEMA, orient="row")


@dataclass(frozen=True)
class _Plan:
    penalties: np.ndarray
    label_penalties: np.ndarray
    n_folds: int
    n_permutations: int
    n_bootstrap: int
    seed: int


@dataclass(frozen=True, eq=False)
class _Target:
    name: str
    binary: bool
    known: np.ndarray
    """bool [n]."""
    values: np.ndarray
    """float64 [known people]; 0 and 1 if binary."""


@dataclass(frozen=True, eq=False)
class _People:
    """The people of a group of targets, and all that the representations share."""

    subjects: pl.DataFrame
    family: np.ndarray
    folds: np.ndarray
    moves: np.ndarray
    weights: np.ndarray
    """Bootstrap weight of each person [b, n]."""


class _Job:
    """One representation with one set of unpenalised columns, for some targets."""

    def __init__(
        self,
        name: str,
        fixed: np.ndarray,
        targets: Sequence[_Target],
        confounds: str,
        people: _People,
        plan: _Plan,
    ) -> None:
        self.name, self.confounds, self.people, self.plan = name, confounds, people, plan
        self.continuous = [t for t in targets if not t.binary]
        self.binary = [t for t in targets if t.binary]
        folds, moves, n = people.folds, people.moves, len(people.folds)
        # Freedman-Lane: with the intercept alone this is a plain permutation.
        fit = fixed @ np.linalg.pinv(fixed, rcond=1e-10)
        y = np.stack([t.values for t in self.continuous], axis=1) if self.continuous else None
        self.ridge = self.ridge_null = self.logistic = None
        if y is not None:
            fitted = fit @ y
            shuffled = [fitted[:, [i]] + (y - fitted)[moves.T, i] for i in range(y.shape[1])]
            self.ridge = RidgeSearch(folds, fixed, y, plan.penalties)
            if len(moves):
                columns = np.concatenate(shuffled, axis=1).astype(np.float32)
                self.ridge_null = RidgeSearch(folds, fixed, columns, plan.penalties)
        self.label_moves = [t.values[moves.T].reshape(n, -1) for t in self.binary]
        self.null_logits = [np.zeros(m.shape, np.float32) for m in self.label_moves]
        if self.binary:
            labels = np.stack([t.values for t in self.binary], axis=1)
            self.logistic = LogisticSearch(folds, fixed, labels, plan.label_penalties)

    def inner(self, pair: tuple[int, int], basis: tuple[np.ndarray, np.ndarray]) -> None:
        if self.ridge:
            self.ridge.inner(pair, *basis)
        if self.ridge_null:
            self.ridge_null.inner(pair, basis[0], basis[1].astype(np.float32))
        if self.logistic:
            self.logistic.inner(pair, *basis)

    def outer(self, fold: int, basis: tuple[np.ndarray, np.ndarray]) -> None:
        if self.ridge:
            self.ridge.outer(fold, *basis)
        if self.ridge_null:
            self.ridge_null.outer(fold, basis[0], basis[1].astype(np.float32))
        if self.logistic:
            logits = self.logistic.outer(fold, *basis, self.label_moves)
            for out, values in zip(self.null_logits, logits, strict=True):
                out[self.people.folds == fold] = values

    def rows(self) -> list[dict[str, Any]]:
        """One row a target, once all folds were visited."""
        rows = [self._continuous_row(i) for i in range(len(self.continuous))]
        return rows + [self._binary_row(i) for i in range(len(self.binary))]

    def _continuous_row(self, i: int) -> dict[str, Any]:
        assert self.ridge is not None
        y, folds = self.continuous[i].values, self.people.folds
        predicted, baseline = self.ridge.predictions[:, i], self.ridge.baseline[:, i]
        error, spread = (y - predicted) ** 2, (y - baseline) ** 2
        row = self._row(self.continuous[i], "r2", 1 - error.sum() / spread.sum(), 0.0)
        if self.plan.n_bootstrap:
            weights = self.people.weights
            row["ci_low"], row["ci_high"] = interval(1 - (weights @ error) / (weights @ spread))
        if self.ridge_null:
            n_moves = len(self.people.moves)
            columns = slice(i * n_moves, (i + 1) * n_moves)
            y_null, null = self.ridge_null.targets[:, columns], self.ridge_null
            left = ((y_null - null.predictions[:, columns]) ** 2).sum(axis=0, dtype=np.float64)
            total = ((y_null - null.baseline[:, columns]) ** 2).sum(axis=0, dtype=np.float64)
            row["p_value"] = p_value(row["value"], 1 - left / total)
        unexplained = y - baseline
        found = _within_folds(predicted - baseline, folds), _within_folds(unexplained, folds)
        size = np.linalg.norm(found[0]) * np.linalg.norm(found[1])
        row["r"] = float(found[0] @ found[1] / size) if size > 1e-12 else 0.0
        row["mae"] = float(np.abs(y - predicted).mean())
        chosen = self.plan.penalties[self.ridge.chosen[:, i]]
        return row | {"penalty": float(np.median(chosen))}

    def _binary_row(self, i: int) -> dict[str, Any]:
        assert self.logistic is not None
        target, folds = self.binary[i], self.people.folds
        labels, logits = target.values, self.logistic.logits[:, i]
        value = fold_auroc(logits[:, None], labels[:, None], folds)[0]
        row = self._row(target, "auroc", value, 0.5)
        if self.plan.n_bootstrap:
            draws = _bootstrap_auroc(logits, labels > 0, folds, self.people.weights)
            row["ci_low"], row["ci_high"] = interval(draws)
        if len(self.people.moves):
            null = fold_auroc(self.null_logits[i], self.label_moves[i], folds)
            row["p_value"] = p_value(value, null)
        probability = 1 / (1 + np.exp(-np.clip(logits, -500, 500)))
        # The threshold is the training people's share of positives: 0.5 never calls a rare one.
        right = (probability > self.logistic.prevalence[:, i]) == (labels > 0)
        row["balanced_accuracy"] = float((right[labels > 0].mean() + right[labels == 0].mean()) / 2)
        row["log_loss"] = float(log_loss(logits[:, None], labels[:, None])[0])
        row["brier"] = float(((probability - labels) ** 2).mean())
        row["n_positive"] = int(labels.sum())
        chosen = self.plan.label_penalties[self.logistic.chosen[:, i]]
        return row | {"penalty": float(np.median(chosen))}

    def _row(self, target: _Target, metric: str, value: float, chance: float) -> dict[str, Any]:
        row: dict[str, Any] = dict.fromkeys(SCHEMA)
        return row | {
            "target": target.name,
            "kind": "binary" if target.binary else "continuous",
            "features": self.name,
            "metric": metric,
            "value": float(value),
            "chance": chance,
            "n": len(target.values),
            "n_missing": int((~target.known).sum()),
            "confounds": self.confounds,
        }


def fold_auroc(scores: np.ndarray, labels: np.ndarray, folds: np.ndarray) -> np.ndarray:
    """AUROC over pairs of people of the same fold, for each column of scores and labels [n, c]."""
    wins, pairs = np.zeros(scores.shape[1]), np.zeros(scores.shape[1])
    for fold in np.unique(folds):
        rows = folds == fold
        positive = labels[rows].T > 0
        n_positive = positive.sum(axis=1)
        rank_sum = (midranks(scores[rows].T) * positive).sum(axis=1, dtype=np.float64)
        wins += rank_sum - n_positive * (n_positive + 1) / 2
        pairs += n_positive * (positive.shape[1] - n_positive)
    return np.divide(wins, pairs, out=np.full(len(wins), 0.5), where=pairs > 0)


def _probe_group(
    named: dict[str, np.ndarray],
    subjects: pl.DataFrame,
    targets: Sequence[_Target],
    confounds: Sequence[str],
    plan: _Plan,
) -> list[dict[str, Any]]:
    """All rows of targets that are known for the same people."""
    known = targets[0].known
    people = _people(subjects.filter(pl.Series(known)), targets, plan)
    by_confounds: dict[tuple[str, ...], list[_Target]] = {}
    for target in targets:
        names = tuple(name for name in confounds if name != target.name)
        by_confounds.setdefault(names, []).append(target)
    ones = np.ones((len(people.folds), 1))
    used = {names: covariate_matrix(people.subjects, names) for names in by_confounds}
    rows: list[dict[str, Any]] = []
    for names, members in by_confounds.items():
        if used[names].shape[1]:
            job = _Job(CONFOUNDS_ONLY, ones, members, ", ".join(names), people, plan)
            rows += _run(FeatureSpace(used[names], people.folds), [job])
    for name, values in named.items():
        jobs = [_Job(name, ones, targets, "", people, plan)]
        jobs += [
            _Job(
                f"{name} | confounds",
                np.concatenate([ones, used[names]], axis=1),
                members,
                ", ".join(names),
                people,
                plan,
            )
            for names, members in by_confounds.items()
            if used[names].shape[1]
        ]
        rows += _run(FeatureSpace(values[known], people.folds), jobs)
    return rows


def _run(space: FeatureSpace, jobs: Sequence[_Job]) -> list[dict[str, Any]]:
    """Visit every training set once for all jobs."""
    for pair in combinations(range(space.n_folds), 2):
        basis = space.basis(pair)
        for job in jobs:
            job.inner(pair, basis)
    for fold in range(space.n_folds):
        basis = space.basis((fold,))
        for job in jobs:
            job.outer(fold, basis)
    return [row for job in jobs for row in job.rows()]


def _people(subjects: pl.DataFrame, targets: Sequence[_Target], plan: _Plan) -> _People:
    n = subjects.height
    families = subjects["family"].to_list() if "family" in subjects.columns else None
    site = subjects["site"].to_list() if "site" in subjects.columns else None
    family = family_codes(families, n)
    even = [target.values for target in targets if target.binary]
    if site is not None:
        labels = np.array([str(s) for s in site])
        even += [(labels == level).astype(np.float64) for level in np.unique(labels)]
    balance = np.stack(even, axis=1) if even else np.empty((n, 0))
    folds = group_folds(family, plan.n_folds, balance=balance, seed=plan.seed)
    for target in targets:
        if target.binary:
            _check_classes(target, folds)
    moves = block_permutations(n, families, site, plan.n_permutations, plan.seed)
    weights = bootstrap_weights(int(family.max()) + 1, plan.n_bootstrap, plan.seed)
    return _People(subjects, family, folds, moves, weights[:, family].astype(np.float64))


def _check_classes(target: _Target, folds: np.ndarray) -> None:
    """Two classes in each fold: every training set has both, and every fold is scored."""
    counts = [np.bincount(folds[target.values == c], minlength=folds.max() + 1) for c in (0, 1)]
    if min(map(min, counts)) == 0:
        raise TargetError(
            target.name,
            f"{int(target.values.sum())} positive of {len(target.values)} people: "
            f"{folds.max() + 1} folds need some of both classes each; use fewer folds or leave "
            "this target out.",
        )


def _bootstrap_auroc(
    scores: np.ndarray, positive: np.ndarray, folds: np.ndarray, weights: np.ndarray
) -> np.ndarray:
    wins, pairs = np.zeros(len(weights)), np.zeros(len(weights))
    for fold in np.unique(folds):
        ahead = np.flatnonzero((folds == fold) & positive)
        behind = np.flatnonzero((folds == fold) & ~positive)
        difference = scores[ahead][:, None] - scores[behind]
        won = (difference > 0) + 0.5 * (difference == 0)
        wins += np.einsum("bn,bn->b", weights[:, ahead] @ won, weights[:, behind])
        pairs += weights[:, ahead].sum(axis=1) * weights[:, behind].sum(axis=1)
    return np.divide(wins, pairs, out=np.full(len(wins), np.nan), where=pairs > 0)


def _within_folds(values: np.ndarray, folds: np.ndarray) -> np.ndarray:
    means = np.bincount(folds, values) / np.bincount(folds)
    return values - means[folds]


def _named(features: dict[str, np.ndarray] | np.ndarray, n: int) -> dict[str, np.ndarray]:
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


def _known_confounds(subjects: pl.DataFrame, confounds: Sequence[str]) -> list[str]:
    absent = [name for name in confounds if name not in subjects.columns]
    if absent and tuple(confounds) != CONFOUNDS:
        raise UserError(
            f"confound '{absent[0]}' is no column of the subjects table. "
            f"{nearest(absent[0], subjects.columns)}"
        )
    if absent:
        say(f"probe: the subjects table has no {', '.join(absent)}: not among the confounds.")
    return [name for name in confounds if name not in absent]


def _target(subjects: pl.DataFrame, name: str) -> _Target:
    if name not in subjects.columns:
        raise UserError(
            f"target '{name}' is no column of the subjects table. {nearest(name, subjects.columns)}"
        )
    column = subjects[name]
    if column.dtype.is_float():
        column = column.fill_nan(None)
    known = column.is_not_null().to_numpy()
    column = column.drop_nulls()
    levels = column.unique().sort()
    if len(levels) < 2:
        raise TargetError(
            name, f"{len(levels)} different values: expected 2 or more; leave it out."
        )
    if len(levels) == 2:
        return _Target(name, True, known, (column == levels[1]).to_numpy().astype(np.float64))
    if not column.dtype.is_numeric():
        raise TargetError(
            name,
            f"{len(levels)} labels: expected numbers or two labels; recode it as one column a "
            "label.",
        )
    return _Target(name, False, known, column.cast(pl.Float64).to_numpy())
