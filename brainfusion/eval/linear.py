"""Ridge and L2 logistic models in closed or batched form: one eigendecomposition a training set.

With the training rows X = T W' (T orthogonal columns, T'T = diag(lam), W orthonormal) every ridge
penalty, every target and every permutation of a target is a product in the basis W. Unpenalised
columns Z (the intercept, confounds) enter as generalised least squares,

    gamma = (Z'H Z)^-1 Z'H y,   H = I - T (lam + a)^-1 T',   beta = (lam + a)^-1 T'(y - Z gamma)

which is the same as residualising X and y for Z in the training set (Frisch and Waugh 1933). The
logistic loss is minimised by majorisation: its Hessian is at most diag(lam / 4 + a) in that basis
(Bohning and Lindsay 1988), which preconditions all columns at once; accelerated, with restarts
(O'Donoghue and Candes 2015).

Shape legend: n people, d width, r rank, q unpenalised columns, c columns (targets, permutations,
penalties), a penalties, k folds.
"""

from collections.abc import Iterator, Sequence
from itertools import combinations

import numpy as np

_RANK_TOLERANCE = 1e-11


class FeatureSpace:
    """Features of n people, and the eigenbasis of any training set made of whole folds.

    Features are centred and scaled by one number, so that the mean squared norm of a person is 1:
    a penalty means the same for every representation, and equal features give equal results in any
    unit. Columns are not scaled one by one.
    """

    def __init__(self, features: np.ndarray, folds: np.ndarray) -> None:
        """Store features [n, d] and fold numbers [n] (0 to k - 1)."""
        x = np.asarray(features, np.float64)
        x = x - x.mean(axis=0)
        scale = np.sqrt((x**2).sum() / len(x))
        self.x = x / scale if scale > 0 else x
        self.folds, self.n_folds = folds, int(folds.max()) + 1
        n, d = x.shape
        self._wide = d > n
        if self._wide:
            self._gram = self.x @ self.x.T
        else:
            parts = [self.x[folds == k] for k in range(self.n_folds)]
            self._gram = np.stack([part.T @ part for part in parts])

    def basis(self, left_out: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Eigenvalues [r] of the training set, and everyone's coordinates in its basis [n, r].

        Args:
            left_out: Folds that are not in the training set.
        """
        if self._wide:
            train = ~np.isin(self.folds, left_out)
            values, vectors = np.linalg.eigh(self._gram[np.ix_(train, train)])
            kept = values > max(values[-1], 0) * _RANK_TOLERANCE
            return values[kept], self._gram[:, train] @ (vectors[:, kept] / np.sqrt(values[kept]))
        inside = [k for k in range(self.n_folds) if k not in left_out]
        values, vectors = np.linalg.eigh(self._gram[inside].sum(axis=0))
        kept = values > max(values[-1], 0) * _RANK_TOLERANCE
        return values[kept], self.x @ vectors[:, kept]


def ridge_path(
    eigenvalues: np.ndarray,
    coordinates: np.ndarray,
    fixed: np.ndarray,
    y: np.ndarray,
    train: np.ndarray,
    penalties: np.ndarray,
    *,
    held_out: Sequence[np.ndarray],
) -> Iterator[list[np.ndarray]]:
    """Ridge predictions for one penalty after another.

    Args:
        eigenvalues: [r] of the training set.
        coordinates: Everyone's, [n, r].
        fixed: Unpenalised columns, intercept included, [n, q].
        y: Targets [n, c].
        train: bool [n].
        penalties: [a].
        held_out: Row numbers to predict, one array a held-out fold.

    Yields:
        For each penalty, the predictions [rows, c] of each held-out fold.
    """
    t, z, y_train = coordinates[train], fixed[train], y[train]
    t_y = t.T @ y_train
    # The small system for gamma is solved in float64 whatever the type of the products.
    t_z = (t.T @ z).astype(np.float64)
    t_y_exact = t_y.astype(np.float64)
    z_z, z_y = z.T.astype(np.float64) @ z, (z.T @ y_train).astype(np.float64)
    held_t = [np.ascontiguousarray(coordinates[rows]) for rows in held_out]
    for penalty in penalties:
        shrink = 1 / (np.asarray(eigenvalues, np.float64) + penalty)[:, None]
        shrunk = shrink * t_z
        gamma = np.linalg.pinv(z_z - t_z.T @ shrunk, rcond=1e-10, hermitian=True) @ (
            z_y - shrunk.T @ t_y_exact
        )
        gamma = gamma.astype(y.dtype)
        beta = t_y - t_z.astype(y.dtype) @ gamma
        beta *= shrink.astype(y.dtype)
        yield [
            held @ beta + fixed[rows] @ gamma for held, rows in zip(held_t, held_out, strict=True)
        ]


def least_squares(
    fixed: np.ndarray, y: np.ndarray, train: np.ndarray, rows: np.ndarray
) -> np.ndarray:
    """Predictions [rows, c] by the unpenalised columns alone; by an intercept, the train mean."""
    return fixed[rows] @ (np.linalg.pinv(fixed[train], rcond=1e-10) @ y[train])


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
        search.inner(pair, *space.basis(pair))
    for fold in range(space.n_folds):
        search.outer(fold, *space.basis((fold,)))
    return search.predictions, search.chosen


class RidgeSearch:
    """State of a nested search while training sets are visited: all pairs of folds, then each.

    Products are in the type of `y`; coordinates must be of the same type.
    """

    def __init__(
        self, folds: np.ndarray, fixed: np.ndarray, y: np.ndarray, penalties: np.ndarray
    ) -> None:
        self._folds, self.targets, self._penalties = folds, y, penalties
        self._fixed = fixed.astype(y.dtype)
        n_folds = int(folds.max()) + 1
        self._rows = [np.flatnonzero(folds == k) for k in range(n_folds)]
        self._error = np.zeros((n_folds, len(penalties), y.shape[1]))
        self.predictions = np.zeros_like(y)
        self.baseline = np.zeros_like(y)
        """Out-of-fold predictions by the unpenalised columns alone."""
        self.chosen = np.zeros((n_folds, y.shape[1]), np.int64)

    def inner(
        self, pair: tuple[int, int], eigenvalues: np.ndarray, coordinates: np.ndarray
    ) -> None:
        """Add the errors of the training set without these two folds."""
        i, j = pair
        train = ~np.isin(self._folds, pair)
        held_out = [self._rows[j], self._rows[i]]
        path = self._path(eigenvalues, coordinates, train, self.targets, self._penalties, held_out)
        for a, predicted in enumerate(path):
            for outer, rows, values in zip(pair, held_out, predicted, strict=True):
                values -= self.targets[rows]
                self._error[outer, a] += np.einsum("nc,nc->c", values, values) / len(rows)

    def outer(self, fold: int, eigenvalues: np.ndarray, coordinates: np.ndarray) -> None:
        """Choose penalties for this fold and predict it."""
        train, rows = self._folds != fold, self._rows[fold]
        chosen = self.chosen[fold] = self._error[fold].argmin(axis=0)
        for a in np.unique(chosen):
            columns = np.flatnonzero(chosen == a)
            path = self._path(
                eigenvalues,
                coordinates,
                train,
                self.targets[:, columns],
                self._penalties[a : a + 1],
                [rows],
            )
            self.predictions[np.ix_(rows, columns)] = next(iter(path))[0]
        self.baseline[rows] = least_squares(self._fixed, self.targets, train, rows)

    def _path(
        self,
        eigenvalues: np.ndarray,
        coordinates: np.ndarray,
        train: np.ndarray,
        y: np.ndarray,
        penalties: np.ndarray,
        held_out: Sequence[np.ndarray],
    ) -> Iterator[list[np.ndarray]]:
        return ridge_path(
            eigenvalues, coordinates, self._fixed, y, train, penalties, held_out=held_out
        )


def residualised(coordinates: np.ndarray, fixed: np.ndarray, train: np.ndarray) -> np.ndarray:
    """Coordinates [n, r] less what the fixed columns explain of them in the training set."""
    return coordinates - fixed @ (np.linalg.pinv(fixed[train], rcond=1e-10) @ coordinates[train])


def logistic_fit(
    eigenvalues: np.ndarray,
    coordinates: np.ndarray,
    labels: np.ndarray,
    penalties: np.ndarray,
    *,
    tolerance: float = 1e-9,
    max_steps: int = 1000,
) -> tuple[np.ndarray, np.ndarray]:
    """Minimise sum log loss + penalty / 2 |weights|^2 for all columns together.

    Args:
        eigenvalues: [r]; an upper bound of T'T in this basis is enough.
        coordinates: Of the training people, columns of mean 0, [n, r]; float32 halves the time.
        labels: 0 or 1, [n, c].
        penalties: Of each column [c], 1 / C of scikit-learn.
        tolerance: A column stops when its expected decrease is below this, in nats a person.
        max_steps: After which a column stops anyhow: without a minimum (separable classes and
            next to no penalty) the weights only grow.

    Returns:
        Intercepts [c] and weights [r, c].
    """
    t, dtype = coordinates, coordinates.dtype
    n, c = labels.shape
    y = labels.astype(dtype)
    rate = y.mean(axis=0)
    intercept, weights = np.log(rate / (1 - rate)), np.zeros((t.shape[1], c), dtype)
    bound = (eigenvalues[:, None] / 4 + penalties).astype(dtype)
    active = np.arange(c)
    a, w = intercept.copy(), weights.copy()
    a_ahead, w_ahead, momentum = a.copy(), w.copy(), np.ones(c, dtype)
    alpha = penalties.astype(dtype)
    for _ in range(max_steps):
        residual = y - 1 / (1 + np.exp(-np.clip(t @ w_ahead + a_ahead, -30, 30)))
        a_step, w_step = residual.mean(axis=0) * 4, t.T @ residual - alpha * w_ahead
        decrease = np.einsum("rc,rc->c", w_step, w_step / bound) / n + a_step**2 / 4
        w_step /= bound
        a_new, w_new = a_ahead + a_step, w_ahead + w_step
        # Momentum that points against the step has gone too far: start again from here.
        turned = np.einsum("rc,rc->c", w_step * bound, w_new - w) + n / 4 * a_step * (a_new - a) < 0
        momentum[turned] = 1
        grown = (1 + np.sqrt(1 + 4 * momentum**2)) / 2
        push = np.where(turned, 0, (momentum - 1) / grown).astype(dtype)
        a_ahead, w_ahead = a_new + push * (a_new - a), w_new + push * (w_new - w)
        a, w, momentum = a_new, w_new, grown.astype(dtype)
        going = decrease > tolerance
        if not going.all():
            intercept[active[~going]], weights[:, active[~going]] = a[~going], w[:, ~going]
            if not going.any():
                return intercept, weights
            active, y, alpha, bound = active[going], y[:, going], alpha[going], bound[:, going]
            a, w, a_ahead, w_ahead = a[going], w[:, going], a_ahead[going], w_ahead[:, going]
            momentum = momentum[going]
    intercept[active], weights[:, active] = a, w
    return intercept, weights


def log_loss(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Mean log loss of each column in nats, from logits and labels [n, c]."""
    return (np.logaddexp(0, logits) - labels * logits).mean(axis=0)


class LogisticSearch:
    """As `RidgeSearch`, for labels; chosen by the mean log loss of the inner folds.

    The fixed columns are taken out of the coordinates in each training set, not out of the labels.
    """

    def __init__(
        self, folds: np.ndarray, fixed: np.ndarray, labels: np.ndarray, penalties: np.ndarray
    ) -> None:
        self._folds, self._fixed, self._labels = folds, fixed, labels
        self._penalties = penalties
        n_folds = int(folds.max()) + 1
        self._error = np.zeros((n_folds, len(penalties), labels.shape[1]))
        self.logits = np.zeros(labels.shape)
        self.prevalence = np.zeros(labels.shape)
        """Share of positives in the training set of each person's fold."""
        self.chosen = np.zeros((n_folds, labels.shape[1]), np.int64)

    def inner(
        self, pair: tuple[int, int], eigenvalues: np.ndarray, coordinates: np.ndarray
    ) -> None:
        """Add the errors of the training set without these two folds."""
        train = ~np.isin(self._folds, pair)
        t = residualised(coordinates, self._fixed, train)
        n_penalties, n_columns = self._error.shape[1:]
        labels = np.repeat(self._labels[train], n_penalties, axis=1)
        penalties = np.tile(self._penalties, n_columns)
        intercept, weights = logistic_fit(eigenvalues, t[train], labels, penalties)
        for outer, held in (pair, pair[::-1]):
            rows = self._folds == held
            loss = log_loss(
                t[rows] @ weights + intercept,
                np.repeat(self._labels[rows], n_penalties, axis=1),
            )
            self._error[outer] += loss.reshape(n_columns, n_penalties).T

    def outer(
        self,
        fold: int,
        eigenvalues: np.ndarray,
        coordinates: np.ndarray,
        permuted: Sequence[np.ndarray],
    ) -> list[np.ndarray]:
        """Choose penalties for this fold, predict it, and refit on permuted labels.

        Args:
            fold: The outer fold.
            eigenvalues: Of its training set.
            coordinates: Of everyone in its basis.
            permuted: For each column, permuted labels of everyone [n, b].

        Returns:
            For each column, the logits [rows, b] of the permuted fits at the column's penalty.
        """
        train, rows = self._folds != fold, self._folds == fold
        t = residualised(coordinates, self._fixed, train)
        self.chosen[fold] = self._error[fold].argmin(axis=0)
        penalties = self._penalties[self.chosen[fold]]
        intercept, weights = logistic_fit(eigenvalues, t[train], self._labels[train], penalties)
        self.logits[rows] = t[rows] @ weights + intercept
        self.prevalence[rows] = self._labels[train].mean(axis=0)
        short = t.astype(np.float32)
        out = []
        for penalty, labels in zip(penalties, permuted, strict=True):
            again = np.full(labels.shape[1], penalty)
            intercept, weights = logistic_fit(
                eigenvalues, short[train], labels[train], again, tolerance=1e-5
            )
            out.append(short[rows] @ weights + intercept)
        return out
