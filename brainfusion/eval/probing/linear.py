"""Ridge models in closed form: one eigendecomposition a training set.

With the training rows X = T W' (T orthogonal columns, T'T = diag(lam), W orthonormal) every ridge
penalty, every target and every permutation of a target is a product in the basis W. Unpenalised
columns Z (the intercept, confounds) enter as generalised least squares,

    gamma = (Z'H Z)^-1 Z'H y,   H = I - T (lam + a)^-1 T',   beta = (lam + a)^-1 T'(y - Z gamma)

which is the same as residualising X and y for Z in the training set (Frisch and Waugh 1933). The
squared error of held-out people (rows E = [T, Z], coefficients b = [beta, gamma]) is

    y'y - 2 b'E'y + b'E'E b

so that where fewer coefficients than people are held out, no prediction is made to choose a
penalty.

Shape legend: n people, d width, r rank, q unpenalised columns, c columns (targets, permutations,
penalties), a penalties, k folds.
"""

from collections.abc import Iterator, Sequence
from copy import copy
from itertools import combinations

import numpy as np

_RANK_TOLERANCE = 1e-11

Basis = tuple[np.ndarray, np.ndarray]
"""Eigenvalues [r] of a training set, and everyone's coordinates in its basis [n, r]."""


class FeatureSpace:
    """Features of n people, and the eigenbasis of any training set made of whole folds.

    Features are centred and scaled by one number, so that the mean squared norm of a person is 1:
    a penalty means the same for every representation, and equal features give equal results in any
    unit. Columns are not scaled one by one.
    """

    def __init__(
        self, features: np.ndarray, folds: np.ndarray, *, n_components: int | None = None
    ) -> None:
        """Store what all training sets share.

        Args:
            features: [n, d].
            folds: Fold numbers [n], 0 to k - 1.
            n_components: Keep the leading principal components of each training set; all if None.
        """
        x = np.asarray(features, np.float64)
        x = x - x.mean(axis=0)
        self.scale = float(np.sqrt(np.einsum("nd,nd->", x, x) / len(x))) or 1.0
        """What the features were divided by."""
        x /= self.scale
        self.x = x
        self.folds, self.n_folds = folds, int(folds.max()) + 1
        self.n_components = n_components
        n, d = x.shape
        self._wide = d > n
        self._learners = np.ones(n, bool)
        self._gram: np.ndarray | None = None

    def among(self, learners: np.ndarray) -> "FeatureSpace":
        """The same people and features, where only some (bool [n]) are ever trained on."""
        self._grams()
        other = copy(self)
        other._learners = learners
        if not self._wide:
            other._gram = None
        return other

    def narrowed(self, n_components: int) -> "FeatureSpace":
        """The same, by the leading principal components of each training set."""
        self._grams()
        other = copy(self)
        other.n_components = n_components
        return other

    def basis(self, left_out: Sequence[int]) -> Basis:
        """Eigenvalues [r] of the training set, and everyone's coordinates in its basis [n, r].

        Args:
            left_out: Folds that are not in the training set.
        """
        train = ~np.isin(self.folds, left_out) & self._learners
        if self._wide:
            rows = self._grams()[:, train]
            if self.n_components is not None:
                rows = rows - rows.mean(axis=1, keepdims=True)
                rows -= rows[train].mean(axis=0)
            values, vectors = self._leading(rows[train])
            return values, rows @ (vectors / np.sqrt(values))
        inside = [k for k in range(self.n_folds) if k not in left_out]
        gram, x = self._grams()[inside].sum(axis=0), self.x
        if self.n_components is not None:
            mean = x[train].mean(axis=0)
            gram, x = gram - train.sum() * np.outer(mean, mean), x - mean
        values, vectors = self._leading(gram)
        return values, x @ vectors

    def axes(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of everyone: eigenvalues [r], coordinates [n, r], and directions [d, r].

        Features as they were given, less their mean, times directions are coordinates.
        """
        if self._wide:
            gram = self._grams()
            values, vectors = self._leading(gram)
            vectors = vectors / np.sqrt(values)
            return values, gram @ vectors, self.x.T @ vectors / self.scale
        gram = self.x.T @ self.x if self._gram is None else self._gram.sum(axis=0)
        values, vectors = self._leading(gram)
        return values, self.x @ vectors, vectors / self.scale

    def _leading(self, gram: np.ndarray) -> Basis:
        values, vectors = np.linalg.eigh(gram)
        kept = values > max(values[-1], 0) * _RANK_TOLERANCE
        if self.n_components is not None:
            kept[: max(len(values) - self.n_components, 0)] = False
        return values[kept], vectors[:, kept]

    def _grams(self) -> np.ndarray:
        """Of all people [n, n], or of the columns in each fold [k, d, d]; made when first asked."""
        if self._gram is not None:
            return self._gram
        if self._wide:
            gram = self.x @ self.x.T
        else:
            parts = [self.x[(self.folds == k) & self._learners] for k in range(self.n_folds)]
            gram = np.stack([part.T @ part for part in parts])
        self._gram = gram
        return gram


class RidgePath:
    """Ridge models of one training set, for one penalty after another.

    Products are in the type of `y`. The small system for the unpenalised columns is solved in
    float64 whatever that type is.
    """

    def __init__(self, basis: Basis, fixed: np.ndarray, y: np.ndarray, train: np.ndarray) -> None:
        """Take the training people's moments.

        Args:
            basis: Of `FeatureSpace.basis`.
            fixed: Unpenalised columns, intercept included, [n, q].
            y: Targets [n, c].
            train: bool [n].
        """
        self._values, self._dtype = np.asarray(basis[0], np.float64), y.dtype
        t, z, y_train = basis[1][train], fixed[train], y[train]
        self._t_y = t.T @ y_train
        self._t_z = (t.T @ z).astype(np.float64)
        self._z_z = z.T.astype(np.float64) @ z
        self._z_y = (z.T @ y_train).astype(np.float64)

    def coefficients(
        self, penalties: np.ndarray, columns: slice | np.ndarray = slice(None)
    ) -> Iterator[np.ndarray]:
        """For each penalty [r + q, c]: of the coordinates, then of the unpenalised columns."""
        t_y, t_z = self._t_y[:, columns], self._t_z
        z_y, t_z_here = self._z_y[:, columns], self._t_z.astype(self._dtype)
        shrink = 1 / (self._values + np.asarray(penalties, np.float64)[:, None])[..., None]
        shrunk = shrink * t_z
        small = np.linalg.pinv(self._z_z - t_z.T @ shrunk, rcond=1e-10, hermitian=True)
        for a in range(len(penalties)):
            taken = (shrunk[a].T.astype(self._dtype) @ t_y).astype(np.float64)
            gamma = (small[a] @ (z_y - taken)).astype(self._dtype)
            out = np.empty((len(t_y) + len(gamma), t_y.shape[1]), self._dtype)
            beta = out[: len(t_y)]
            np.matmul(t_z_here, gamma, out=beta)
            np.subtract(t_y, beta, out=beta)
            beta *= shrink[a].astype(self._dtype)
            out[len(t_y) :] = gamma
            yield out


def least_squares(
    fixed: np.ndarray, y: np.ndarray, train: np.ndarray, rows: np.ndarray
) -> np.ndarray:
    """Predictions [rows, c] by the unpenalised columns alone; by an intercept, the train mean."""
    return fixed[rows] @ (np.linalg.pinv(fixed[train], rcond=1e-10) @ y[train])


def squared_errors(
    path: RidgePath,
    held_out: Sequence[tuple[np.ndarray, np.ndarray]],
    penalties: np.ndarray,
) -> np.ndarray:
    """Mean squared errors of held-out people for each penalty and target, float64 [h, a, c].

    Args:
        path: Of the training set.
        held_out: For each held-out fold, the people's coordinates and unpenalised columns side by
            side [m, r + q], and their targets [m, c].
        penalties: [a].
    """
    moments = []
    for rows, y in held_out:
        if rows.shape[1] < len(rows):
            size = np.einsum("nc,nc->c", y, y, dtype=np.float64)
            moments.append((rows.T @ rows, 2 * (rows.T @ y), size))
        else:
            moments.append(None)
    out = np.empty((len(held_out), len(penalties), held_out[0][1].shape[1]))
    for a, b in enumerate(path.coefficients(penalties)):
        for h, ((rows, y), known) in enumerate(zip(held_out, moments, strict=True)):
            if known is None:
                left = rows @ b
                left -= y
                out[h, a] = np.einsum("nc,nc->c", left, left)
            else:
                gram, twice, size = known
                half = gram @ b
                half -= twice
                out[h, a] = size + np.einsum("rc,rc->c", half, b)
            out[h, a] /= len(rows)
    return out


def ridge_out_of_fold(
    space: FeatureSpace, fixed: np.ndarray, y: np.ndarray, penalties: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Nested cross-validation of all targets at once.

    The penalty of each outer fold and column has the least mean squared error, averaged over the
    other folds as inner folds; the training set of two folds left out serves both of them.

    Args:
        space: Features and folds.
        fixed: Unpenalised columns [n, q].
        y: [n, c].
        penalties: [a].

    Returns:
        Out-of-fold predictions [n, c] and the index of the chosen penalty [k, c].
    """
    search = RidgeSearch(space.folds, fixed, y, penalties)
    for pair in combinations(range(space.n_folds), 2):
        search.inner(pair, space.basis(pair))
    for fold in range(space.n_folds):
        search.outer(fold, space.basis((fold,)))
    return search.predictions, search.chosen


class RidgeSearch:
    """State of a nested search while training sets are visited: all pairs of folds, then each.

    Products are in the type of `y`, coordinates are made so.
    """

    def __init__(
        self,
        folds: np.ndarray,
        fixed: np.ndarray,
        y: np.ndarray,
        penalties: np.ndarray,
        *,
        learners: np.ndarray | None = None,
    ) -> None:
        """Start.

        Args:
            folds: Fold numbers [n].
            fixed: Unpenalised columns [n, q].
            y: Targets [n, c].
            penalties: [a].
            learners: bool [n], who may be trained on and chosen with; everyone if None.
        """
        self._folds, self.targets, self._penalties = folds, y, penalties
        self._fixed = fixed.astype(y.dtype)
        self._learners = np.ones(len(y), bool) if learners is None else learners
        n_folds = int(folds.max()) + 1
        self._error = np.zeros((n_folds, len(penalties), y.shape[1]))
        self.predictions = np.zeros_like(y)
        self.baseline = np.zeros_like(y)
        """Out-of-fold predictions by the unpenalised columns alone."""
        self.inner_predictions: np.ndarray | None = None
        """[k, n, c]: for outer fold k, of its training people by models without their own fold."""
        self.inner_baseline: np.ndarray | None = None

    @property
    def chosen(self) -> np.ndarray:
        """The index of the penalty for each fold and column, [k, c]."""
        return self._error.argmin(axis=1)

    def inner(self, pair: tuple[int, int], basis: Basis) -> None:
        """Add the errors of the training set without these two folds."""
        path, joined = self._path(pair, basis)
        i, j = pair
        held_out = [
            (joined[rows], self.targets[rows])
            for rows in ((self._folds == held) & self._learners for held in (j, i))
        ]
        self._error[[i, j]] += squared_errors(path, held_out, self._penalties)

    def again(self, pair: tuple[int, int], basis: Basis) -> None:
        """After all pairs: what their models say of the two folds, by the penalties chosen."""
        if self.inner_predictions is None:
            shape = (int(self._folds.max()) + 1, *self.targets.shape)
            self.inner_predictions = np.zeros(shape, self.targets.dtype)
            self.inner_baseline = np.zeros(shape, self.targets.dtype)
        assert self.inner_baseline is not None
        path, joined = self._path(pair, basis)
        train = self._train(pair)
        for outer, held in (pair, pair[::-1]):
            rows = np.flatnonzero(self._folds == held)
            self.inner_predictions[outer, rows] = self._predict(path, joined[rows], outer)
            baseline = least_squares(self._fixed, self.targets, train, rows)
            self.inner_baseline[outer, rows] = baseline

    def outer(self, fold: int, basis: Basis) -> None:
        """Choose penalties for this fold and predict it."""
        rows = np.flatnonzero(self._folds == fold)
        path, joined = self._path((fold,), basis)
        self.predictions[rows] = self._predict(path, joined[rows], fold)
        self.baseline[rows] = least_squares(self._fixed, self.targets, self._train((fold,)), rows)

    def _predict(self, path: RidgePath, rows: np.ndarray, outer: int) -> np.ndarray:
        chosen = self._error[outer].argmin(axis=0)
        out = np.empty((len(rows), len(chosen)), self.targets.dtype)
        for a in np.unique(chosen):
            columns = np.flatnonzero(chosen == a)
            out[:, columns] = rows @ next(path.coefficients(self._penalties[[a]], columns))
        return out

    def _train(self, left_out: Sequence[int]) -> np.ndarray:
        return ~np.isin(self._folds, left_out) & self._learners

    def _path(self, left_out: Sequence[int], basis: Basis) -> tuple[RidgePath, np.ndarray]:
        basis = basis[0], basis[1].astype(self.targets.dtype, copy=False)
        path = RidgePath(basis, self._fixed, self.targets, self._train(left_out))
        return path, np.concatenate([basis[1], self._fixed], axis=1)
