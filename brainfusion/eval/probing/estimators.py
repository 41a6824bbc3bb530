"""The probes as scikit-learn estimators: penalties chosen by cross-validation, all of them at once.

`RidgeProbe` is a `GridSearchCV` of `Ridge` for each target and `LogisticProbe` one of
`LogisticRegression`, with the same penalties chosen and the same predictions, in one
eigendecomposition a fold for all penalties and all targets.

    LogisticProbe().fit(features, diagnosis, groups=families).predict_proba(others)

Shape legend: n people, d width, c targets, a penalties, k folds, g columns of logits.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self, cast

import numpy as np
from scipy.linalg import eigh
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data

from brainfusion.eval.design import group_folds
from brainfusion.eval.probing.linear import FeatureSpace, RidgePath, squared_errors
from brainfusion.eval.probing.logistic import (
    log_loss,
    logistic_fit,
    one_hot,
    probabilities,
)
from brainfusion.eval.statistics import family_codes

PENALTIES = tuple(np.logspace(-2, 5, 15))

_SMALL = 1_000_000
"""Numbers up to which a search is done in float64; beyond, in float32, which is twice as fast."""
_FLAT = 1e-5
"""Share of the largest eigenvalue above which all of them are sure in float32."""


class _Probe(BaseEstimator):
    """What both share: folds, the scale of a penalty, a linear map."""

    def __init__(
        self,
        penalties: Sequence[float] | np.ndarray = PENALTIES,
        *,
        n_folds: int = 5,
        scaled: bool = True,
        seed: int = 0,
    ) -> None:
        self.penalties = penalties
        self.n_folds = n_folds
        self.scaled = scaled
        self.seed = seed

    def _space(self, x: np.ndarray, folds: np.ndarray) -> tuple[FeatureSpace, np.ndarray]:
        """The features, and the penalties in their scale."""
        space = FeatureSpace(x, folds)
        grid = np.asarray(self.penalties, np.float64).reshape(-1)
        if not len(grid) or (grid <= 0).any():
            raise ValueError(f"penalties={self.penalties}: expected one or more above 0.")
        if not self.scaled:
            grid = grid / space.scale**2
        return space, grid

    def _folds(self, n: int, groups: Any, labels: np.ndarray | None) -> np.ndarray:
        """Whole groups to folds; as many folds as groups where those are fewer."""
        family = family_codes(groups, n)
        hot = np.empty((n, 0)) if labels is None else one_hot(labels, int(labels.max()) + 1)
        n_folds = min(self.n_folds, int(family.max()) + 1)
        return group_folds(family, max(n_folds, 1), balance=hot.reshape(n, -1), seed=self.seed)


def _checked(probe: _Probe, *arrays: Any, **wanted: Any) -> tuple[np.ndarray, ...]:
    """Features in float64, and targets where they are given, as arrays."""
    found = validate_data(probe, *arrays, dtype=np.float64, **wanted)
    return cast(tuple[np.ndarray, ...], found if len(arrays) > 1 else (found,))


class RidgeProbe(RegressorMixin, _Probe):
    """Ridge regression, the penalty of each target chosen by the mean squared error of folds.

    Args:
        penalties: To choose from. One alone is taken without a search.
        n_folds: Folds; groups stay whole.
        scaled: Whether penalties are for features of mean squared norm 1 (so that one grid serves
            every representation) or, if False, are scikit-learn's `alpha`.
        seed: Of the folds.

    Attributes:
        coef_: [d], or [c, d].
        intercept_: A number, or [c].
        penalty_: The chosen one, or one a target [c].
        folds_: Fold of each person.
        errors_: Mean squared error of each penalty and target, [a, c]; NaN without a search.
    """

    def fit(self, X: Any, y: Any, groups: Any = None) -> Self:
        """Fit on features [n, d] and targets [n] or [n, c].

        Args:
            X: Features.
            y: Targets.
            groups: Family of each person; they share a fold. Unknown ones are nobody's relatives.
        """
        x, y = _checked(self, X, y, multi_output=True, y_numeric=True, ensure_min_samples=2)
        y = y.astype(np.float64)
        table = y.reshape(len(y), -1)
        self.folds_ = self._folds(len(y), groups, None)
        space, grid = self._space(x, self.folds_)
        fixed = np.ones((len(y), 1))
        self.errors_ = np.full((len(grid), table.shape[1]), np.nan)
        if len(grid) > 1:
            self.errors_ = self._search(space, fixed, table, grid)
        chosen = self.errors_.argmin(axis=0)
        values, coordinates, axes = space.axes()
        path = RidgePath((values, coordinates), fixed, table, np.ones(len(y), bool))
        weights = np.empty((table.shape[1], x.shape[1]))
        for a in np.unique(chosen):
            columns = np.flatnonzero(chosen == a)
            weights[columns] = (axes @ next(path.coefficients(grid[[a]], columns))[:-1]).T
        level = table.mean(axis=0) - weights @ x.mean(axis=0)
        penalty = np.asarray(self.penalties, np.float64).reshape(-1)[chosen]
        single = y.ndim == 1
        self.coef_ = weights[0] if single else weights
        self.intercept_ = float(level[0]) if single else level
        self.penalty_ = float(penalty[0]) if single else penalty
        return self

    def __sklearn_tags__(self) -> Any:
        """Several targets are fitted at once."""
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags

    def predict(self, X: Any) -> np.ndarray:
        """Predictions [n] or [n, c], as the targets were."""
        check_is_fitted(self)
        (x,) = _checked(self, X, reset=False)
        return x @ self.coef_.T + self.intercept_

    @staticmethod
    def _search(
        space: FeatureSpace, fixed: np.ndarray, y: np.ndarray, grid: np.ndarray
    ) -> np.ndarray:
        total = np.zeros((len(grid), y.shape[1]))
        for fold in range(space.n_folds):
            basis, rows = space.basis((fold,)), space.folds == fold
            path = RidgePath(basis, fixed, y, ~rows)
            joined = np.concatenate([basis[1][rows], fixed[rows]], axis=1)
            total += squared_errors(path, [(joined, y[rows])], grid)[0] / space.n_folds
        return total


class LogisticProbe(ClassifierMixin, _Probe):
    """L2 logistic regression of two classes or more, the penalty chosen by the log loss of folds.

    Args:
        penalties: To choose from: 1 / C of scikit-learn. One alone is taken without a search.
        n_folds: Folds; groups stay whole.
        scaled: Whether penalties are for features of mean squared norm 1 or, if False, of the
            features as they are.
        seed: Of the folds.

    Attributes:
        classes_: In sorting order.
        coef_: [1, d] of two classes, [classes, d] of more.
        intercept_: [1] or [classes].
        penalty_: The chosen one.
        folds_: Fold of each person.
        losses_: Mean log loss in nats of each penalty [a]; NaN without a search.
    """

    def fit(self, X: Any, y: Any, groups: Any = None) -> Self:
        """Fit on features [n, d] and labels [n].

        Args:
            X: Features.
            y: Labels of two classes or more.
            groups: Family of each person; they share a fold. Unknown ones are nobody's relatives.
        """
        x, y = _checked(self, X, y, ensure_min_samples=2)
        check_classification_targets(y)
        self.classes_, codes = np.unique(y, return_inverse=True)
        if len(self.classes_) < 2:
            raise ValueError(
                f"LogisticProbe needs 2 classes or more; the labels have one class: "
                f"{self.classes_[0]!r}."
            )
        labels = codes.astype(np.float64)[:, None]
        self.folds_ = self._folds(len(y), groups, codes)
        space, grid = self._space(x, self.folds_)
        basis = _Basis.of(space)
        n_classes = len(self.classes_)
        self.losses_, starts = self._search(basis, labels, grid)
        best = 0 if np.isnan(self.losses_).all() else int(np.nanargmin(self.losses_))
        level, weights = logistic_fit(
            basis.values, basis.rows, labels, grid[[best]],
            n_classes=n_classes, axes=basis.axes, start=starts[best],
            tolerance=1e-13, max_steps=5000,
        )  # fmt: skip
        self.coef_ = (weights / space.scale if basis.back is None else basis.back @ weights).T
        self.intercept_ = level - self.coef_ @ x.mean(axis=0)
        self.penalty_ = float(np.asarray(self.penalties, np.float64).reshape(-1)[best])
        self.n_iter_ = 1
        return self

    def decision_function(self, X: Any) -> np.ndarray:
        """Logits: [n] of the second of two classes, [n, classes] of more."""
        check_is_fitted(self)
        (x,) = _checked(self, X, reset=False)
        logits = x @ self.coef_.T + self.intercept_
        return logits[:, 0] if logits.shape[1] == 1 else logits

    def predict_proba(self, X: Any) -> np.ndarray:
        """Probabilities [n, classes]."""
        logits = self.decision_function(X)
        p = probabilities(logits.reshape(len(logits), -1))
        return np.concatenate([1 - p, p], axis=1) if p.shape[1] == 1 else p

    def predict(self, X: Any) -> np.ndarray:
        """The likeliest class of each person, [n]."""
        likeliest = self.predict_proba(X).argmax(axis=1)
        return self.classes_[likeliest]

    def _search(
        self, basis: "_Basis", labels: np.ndarray, grid: np.ndarray
    ) -> tuple[np.ndarray, list[tuple[np.ndarray, np.ndarray] | None]]:
        """Losses [a], and where to start from with each penalty: the mean over folds.

        All folds and penalties share their products. Folds whose training people lack a class,
        where classes are tiny, do not count.
        """
        n_classes, n_grid, short = len(self.classes_), len(grid), basis.short
        sets = [self.folds_ != fold for fold in range(int(self.folds_.max()) + 1)]
        sets = [s for s in sets if len(np.unique(labels[s])) == n_classes and not s.all()]
        if n_grid == 1 or not sets:
            return np.full(n_grid, np.nan), [None] * n_grid
        level, weights = logistic_fit(
            basis.values,
            short,
            np.repeat(labels, len(sets), axis=1),
            np.repeat(grid, len(sets)),
            n_classes=n_classes,
            members=np.stack(sets, axis=1),
            axes=basis.axes,
            tolerance=1e-9 if short is basis.rows else 1e-7,
        )
        level, weights = (v.reshape(*v.shape[:-1], n_grid, len(sets), -1) for v in (level, weights))
        starts = [(level[a].mean(axis=0), weights[:, a].mean(axis=1)) for a in range(n_grid)]
        losses = np.empty((len(sets), n_grid))
        many = np.repeat(labels, n_grid, axis=1)
        for i, train in enumerate(sets):
            of_fold = weights[:, :, i].reshape(short.shape[1], -1)
            logits = short[~train] @ of_fold + level[:, i].ravel()
            logits = logits.reshape(len(logits), n_grid, -1).astype(np.float64)
            losses[i] = log_loss(logits, many[~train]).mean(axis=0)
        return losses.mean(axis=0), [*starts]


@dataclass(frozen=True, eq=False)
class _Basis:
    """What logistic models of everyone and of folds are fitted to."""

    values: np.ndarray
    """Eigenvalues [r]."""
    axes: np.ndarray | None
    """Their directions [d, r]; None if rows are in the eigenbasis."""
    rows: np.ndarray
    """[n, r], or the features [n, d]."""
    short: np.ndarray
    """The same for a search."""
    back: np.ndarray | None
    """Directions of the features as given [d, r]; None if rows are those but for their scale."""

    @classmethod
    def of(cls, space: FeatureSpace) -> Self:
        """The features as they are in a large, well-conditioned space: they need not be turned."""
        n, d = space.x.shape
        large = space.x.size > _SMALL
        if large and d <= n:
            short = space.x.astype(np.float32)
            values, axes = eigh(short.T @ short, driver="evd", check_finite=False)
            if values[0] > _FLAT * values[-1]:
                return cls(values, axes, space.x, short, None)
        values, t, back = space.axes()
        return cls(values, None, t, t.astype(np.float32) if large else t, back)
