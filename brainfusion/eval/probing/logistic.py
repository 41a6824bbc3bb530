"""L2 logistic models of two or more classes in batched form: all penalties, targets, permutations.

The eigenbasis of the training set (`eval.probing.linear`) scales the gradients of all columns at
once (`eval.probing.newton`); the number of steps does not grow on ill-conditioned features.

Two classes are one column of logits, K > 2 are K columns whose weights sum to 0, as in
scikit-learn.

Shape legend: n people, r rank, q unpenalised columns, c models (targets, permutations, penalties),
g columns of logits a model (1 for two classes), k folds.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from brainfusion.eval.probing.linear import Basis
from brainfusion.eval.probing.newton import Metric, minimise

_MAX_CELLS = 2**23
"""Of [n, c, g] fitted at once; each takes some 20 bytes in float32 and 36 in float64."""


def n_logits(n_classes: int) -> int:
    """Columns of logits of a model: one for two classes."""
    return 1 if n_classes == 2 else n_classes


def residualised(coordinates: np.ndarray, fixed: np.ndarray, train: np.ndarray) -> np.ndarray:
    """Coordinates [n, r] less what the fixed columns explain of them in the training set."""
    return coordinates - fixed @ (np.linalg.pinv(fixed[train], rcond=1e-10) @ coordinates[train])


def logistic_fit(
    eigenvalues: np.ndarray,
    coordinates: np.ndarray,
    labels: np.ndarray,
    penalties: np.ndarray,
    *,
    n_classes: int = 2,
    members: np.ndarray | None = None,
    axes: np.ndarray | None = None,
    start: tuple[np.ndarray, np.ndarray] | None = None,
    tolerance: float = 1e-9,
    max_steps: int = 1000,
) -> tuple[np.ndarray, np.ndarray]:
    """Minimise sum log loss + penalty / 2 |weights|^2 for all models together.

    Args:
        eigenvalues: [r] of T'T; close to them is enough.
        coordinates: T, of the training people, [n, r]; float32 halves the time. Columns have mean
            0, unless `members` are given.
        labels: Class numbers [n, c], or [n, c / k] for columns that repeat k times.
        penalties: Of each model [c], 1 / C of scikit-learn.
        n_classes: Of every model.
        members: bool, as the labels: whom the models of a column are fitted to; everyone if
            omitted. They share the products of everyone.
        axes: If coordinates are not in the eigenbasis: its directions [d, r], coordinates [n, d].
        start: Intercepts and weights to start from, as returned.
        tolerance: A model stops when its expected decrease is below this, in nats a person.
        max_steps: After which a model stops anyhow: without a minimum (separable classes and
            next to no penalty) the weights only grow.

    Returns:
        Intercepts [c g] and weights [r, c g], the columns of one model side by side.
    """
    c, g = len(penalties), n_logits(n_classes)
    if start is not None:
        start = start[0].reshape(-1, g).T, start[1].reshape(-1, c, g).swapaxes(1, 2)
    intercepts, weights = minimise(
        coordinates, labels, penalties, Metric(eigenvalues, axes),
        n_classes=n_classes, members=members, start=start,
        tolerance=tolerance, max_steps=max_steps,
    )  # fmt: skip
    return intercepts.T.reshape(-1), weights.swapaxes(1, 2).reshape(-1, c * g)


def one_hot(labels: np.ndarray, n_classes: int, dtype: type | np.dtype = np.float64) -> np.ndarray:
    """Class numbers [...] as 0 and 1, [..., g]: of two classes, the second alone."""
    if n_classes == 2:
        return labels.astype(dtype)[..., None]
    return (labels[..., None] == np.arange(n_classes)).astype(dtype)


def share_logits(hot: np.ndarray) -> np.ndarray:
    """Logits of the class shares, [..., g], of classes as 0 and 1, [n, ..., g].

    A class that nobody has, as can happen when labels are permuted, counts as half a person.
    """
    least = 0.5 / len(hot)
    share = np.clip(hot.mean(axis=0, dtype=np.float64), least, 1 - least)
    return np.log(share / (1 - share)) if hot.shape[-1] == 1 else np.log(share)


def probabilities(logits: np.ndarray) -> np.ndarray:
    """Of logits [..., g], in the same shape: of the second class, or of each of several."""
    if logits.shape[-1] == 1:
        return 1 / (1 + np.exp(-np.clip(logits, -30, 30)))
    out = np.exp(logits - logits.max(axis=-1, keepdims=True))
    out /= out.sum(axis=-1, keepdims=True)
    return out


def log_loss(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Log loss in nats of each person and model [n, c], from logits [n, c, g] and class numbers."""
    if logits.shape[-1] == 1:
        return np.logaddexp(0, logits[..., 0]) - labels * logits[..., 0]
    top = logits.max(axis=-1)
    total = np.log(np.exp(logits - top[..., None]).sum(axis=-1)) + top
    return total - np.take_along_axis(logits, labels[..., None].astype(np.int64), axis=-1)[..., 0]


class LogisticSearch:
    """As `RidgeSearch`, for class numbers; chosen by the mean log loss of the inner folds.

    The fixed columns are taken out of the coordinates in each training set, not out of the labels.
    """

    def __init__(
        self,
        folds: np.ndarray,
        fixed: np.ndarray,
        labels: np.ndarray,
        penalties: np.ndarray,
        *,
        n_classes: int = 2,
        learners: np.ndarray | None = None,
        dtype: type = np.float64,
        tolerance: float = 1e-9,
    ) -> None:
        """Start.

        Args:
            folds: Fold numbers [n].
            fixed: Unpenalised columns [n, q].
            labels: Class numbers [n, c].
            penalties: [a], 1 / C.
            n_classes: Of every column.
            learners: bool [n], who may be trained on and chosen with; everyone if None.
            dtype: Of the products.
            tolerance: Of `logistic_fit`.
        """
        self._folds, self._fixed, self.targets = folds, fixed, labels
        self._penalties, self.n_classes = penalties, n_classes
        self._dtype, self._tolerance = dtype, tolerance
        self._learners = np.ones(len(labels), bool) if learners is None else learners
        self._n_folds = int(folds.max()) + 1
        self._error = np.zeros((self._n_folds, len(penalties), labels.shape[1]))
        self.predictions = np.zeros((*labels.shape, n_logits(n_classes)), dtype)
        """Logits, out of fold."""
        self.baseline = np.zeros((*labels.shape, n_logits(n_classes)), dtype)
        """Logits of the class shares in the training set of each person's fold."""
        self.inner_predictions: np.ndarray | None = None
        """[k, n, c, g]: for outer fold k, of its training people by models without their fold."""
        self.inner_baseline: np.ndarray | None = None

    @property
    def chosen(self) -> np.ndarray:
        """The index of the penalty for each fold and column, [k, c]."""
        return self._error.argmin(axis=1)

    def use(self, chosen: np.ndarray) -> None:
        """Take these penalties [k, c] instead of searching."""
        self._error = (np.arange(len(self._penalties))[:, None] != chosen[:, None]).astype(float)

    def inner(self, pair: tuple[int, int], basis: Basis) -> None:
        """Add the errors of the training set without these two folds."""
        t, train = self._coordinates(pair, basis)
        n_penalties = len(self._penalties)
        for part in self._parts(n_penalties):
            labels = self.targets[:, part]
            penalties = np.repeat(self._penalties, labels.shape[1])
            fitted = self._fit(basis[0], t[train], labels[train], penalties)
            for outer, held in (pair, pair[::-1]):
                rows = (self._folds == held) & self._learners
                loss = log_loss(
                    self._apply(fitted, t[rows]), np.tile(labels[rows], n_penalties)
                ).mean(axis=0)
                self._error[outer, :, part] += loss.reshape(n_penalties, -1)

    def again(self, pair: tuple[int, int], basis: Basis) -> None:
        """After all pairs: what their models say of the two folds, by the penalties chosen."""
        if self.inner_predictions is None:
            self.inner_predictions = np.zeros((self._n_folds, *self.predictions.shape), self._dtype)
            self.inner_baseline = np.zeros_like(self.inner_predictions)
        assert self.inner_baseline is not None
        t, train = self._coordinates(pair, basis)
        for outer, held in (pair, pair[::-1]):
            rows = np.flatnonzero(self._folds == held)
            self.inner_predictions[outer, rows] = self._predict(basis[0], t, train, rows, outer)
            self.inner_baseline[outer, rows] = self._prior(train)

    def outer(self, fold: int, basis: Basis) -> None:
        """Choose penalties for this fold and predict it."""
        t, train = self._coordinates((fold,), basis)
        rows = np.flatnonzero(self._folds == fold)
        self.predictions[rows] = self._predict(basis[0], t, train, rows, fold)
        self.baseline[rows] = self._prior(train)

    def _coordinates(self, left_out: Sequence[int], basis: Basis) -> tuple[np.ndarray, np.ndarray]:
        train = ~np.isin(self._folds, left_out) & self._learners
        return residualised(basis[1], self._fixed, train).astype(self._dtype), train

    def _parts(self, n_models: int) -> Iterator[slice]:
        """Columns of labels to fit at once, if each takes `n_models`."""
        cells = len(self.targets) * n_models * n_logits(self.n_classes)
        step = max(1, _MAX_CELLS // cells)
        for start in range(0, self.targets.shape[1], step):
            yield slice(start, start + step)

    def _predict(
        self, values: np.ndarray, t: np.ndarray, train: np.ndarray, rows: np.ndarray, outer: int
    ) -> np.ndarray:
        penalties = self._penalties[self._error[outer].argmin(axis=0)]
        out = [
            self._apply(
                self._fit(values, t[train], self.targets[train, part], penalties[part]), t[rows]
            )
            for part in self._parts(1)
        ]
        return np.concatenate(out, axis=1)

    def _fit(
        self, values: np.ndarray, t: np.ndarray, labels: np.ndarray, penalties: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        return logistic_fit(
            values, t, labels, penalties, n_classes=self.n_classes, tolerance=self._tolerance
        )

    def _apply(self, fitted: tuple[np.ndarray, np.ndarray], t: np.ndarray) -> np.ndarray:
        intercept, weights = fitted
        return (t @ weights + intercept).reshape(len(t), -1, n_logits(self.n_classes))

    def _prior(self, train: np.ndarray) -> np.ndarray:
        return share_logits(one_hot(self.targets[train], self.n_classes))
