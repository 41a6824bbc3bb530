"""L2 logistic models of two or more classes in batched form: all penalties, targets, permutations.

The loss is minimised by majorisation in the eigenbasis of the training set
(`eval.probing.linear`): with T'T = diag(lam) its Hessian is at most diag(lam / 4 + a) for two
classes (Bohning and Lindsay 1988) and diag(lam / 2 + a) for more (Bohning 1992), which
preconditions all columns at once; accelerated, with restarts (O'Donoghue and Candes 2015). The
number of steps does not grow on ill-conditioned features.

Two classes are one column of logits, K > 2 are K columns whose weights sum to 0, as in
scikit-learn.

Shape legend: n people, r rank, q unpenalised columns, c models (targets, permutations, penalties),
g columns of logits a model (1 for two classes), k folds.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from brainfusion.eval.probing.linear import Basis

_MAX_COLUMNS = 4096
"""Columns of logits fitted at once: what they take is this times the people."""


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
    start: tuple[np.ndarray, np.ndarray] | None = None,
    tolerance: float = 1e-9,
    max_steps: int = 1000,
) -> tuple[np.ndarray, np.ndarray]:
    """Minimise sum log loss + penalty / 2 |weights|^2 for all models together.

    Models of different people share their products: a bound for everyone is one for some.

    Args:
        eigenvalues: [r]; an upper bound of T'T in this basis is enough.
        coordinates: Of the training people, [n, r]; float32 halves the time. Columns have mean 0,
            unless `members` are given.
        labels: Class numbers [n, c].
        penalties: Of each model [c], 1 / C of scikit-learn.
        n_classes: Of every model.
        members: bool [n, c], whom each model is fitted to; everyone if omitted.
        start: Intercepts and weights to start from, as returned.
        tolerance: A model stops when its expected decrease is below this, in nats a person.
        max_steps: After which a model stops anyhow: without a minimum (separable classes and
            next to no penalty) the weights only grow.

    Returns:
        Intercepts [c g] and weights [r, c g], the columns of one model side by side.
    """
    t, dtype = coordinates, coordinates.dtype
    n, c = labels.shape
    g, curve = n_logits(n_classes), 4 if n_classes == 2 else 2
    y = one_hot(labels, n_classes, dtype)
    means = np.zeros((1, c * g), dtype)
    mask, size = None, np.full(c * g, n, dtype)
    if members is None:
        intercept = share_logits(y)
    else:
        intercept = np.stack([share_logits(y[m, i]) for i, m in enumerate(members.T)])
        mask = np.repeat(members, g, axis=1).astype(dtype)
        size = mask.sum(axis=0)
        means = t.T @ mask / size
    y = y.reshape(n, c * g)
    intercept = intercept.reshape(c * g).astype(dtype)
    weights = np.zeros((t.shape[1], c * g), dtype)
    if start is not None:
        weights[:] = start[1]
        intercept[:] = start[0] + (means * weights).sum(axis=0)
    state = _State(means, y, mask, size, np.repeat(penalties, g).astype(dtype))
    bound = (eigenvalues[:, None] / curve + state.penalties).astype(dtype)
    active = np.arange(c * g)
    a, w = intercept.copy(), weights.copy()
    a_ahead, w_ahead, momentum = a.copy(), w.copy(), np.ones(c, dtype)
    for _ in range(max_steps):
        slope, w_step = state.gradient(t, a_ahead, w_ahead, g)
        a_step = slope * curve
        decrease = np.einsum("rc,rc->c", w_step, w_step / bound) / state.size
        decrease += slope**2 * curve
        w_step /= bound
        a_new, w_new = a_ahead + a_step, w_ahead + w_step
        # Momentum that points against the step has gone too far: start again from here.
        along = np.einsum("rc,rc->c", w_step * bound, w_new - w)
        along += state.size / curve * a_step * (a_new - a)
        momentum[along.reshape(-1, g).sum(axis=1) < 0] = 1
        grown = (1 + np.sqrt(1 + 4 * momentum**2)) / 2
        push = np.repeat((momentum - 1) / grown, g).astype(dtype)
        a_ahead, w_ahead = a_new + push * (a_new - a), w_new + push * (w_new - w)
        a, w, momentum = a_new, w_new, grown.astype(dtype)
        going = decrease.reshape(-1, g).sum(axis=1) > tolerance
        if not going.all():
            momentum, going = momentum[going], np.repeat(going, g)
            intercept[active[~going]], weights[:, active[~going]] = a[~going], w[:, ~going]
            active, bound, state = active[going], bound[:, going], state.of(going)
            a, w, a_ahead, w_ahead = a[going], w[:, going], a_ahead[going], w_ahead[:, going]
            if not len(active):
                break
    intercept[active], weights[:, active] = a, w
    return intercept - (means * weights).sum(axis=0), weights


@dataclass(eq=False)
class _State:
    """What the models that are not finished are fitted to; columns of logits are flat."""

    means: np.ndarray
    """Of the coordinates of each model's people, [r, c g]; [1, c g] of zeros if all are centred."""
    y: np.ndarray
    mask: np.ndarray | None
    size: np.ndarray
    penalties: np.ndarray

    def gradient(
        self, t: np.ndarray, a: np.ndarray, w: np.ndarray, g: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Mean residuals [c g], and minus the gradient of the weights [r, c g]."""
        logits = t @ w
        logits += a if self.mask is None else a - np.einsum("rc,rc->c", self.means, w)
        residual = probabilities(logits.reshape(len(t), -1, g)).reshape(len(t), -1)
        np.subtract(self.y, residual, out=residual)
        if self.mask is not None:
            residual *= self.mask
        total = residual.sum(axis=0)
        step = t.T @ residual
        step -= self.penalties * w
        if self.mask is not None:
            step -= self.means * total
        return total / self.size, step

    def of(self, kept: np.ndarray) -> "_State":
        """The same for some columns of logits."""
        return _State(
            self.means[:, kept],
            self.y[:, kept],
            None if self.mask is None else self.mask[:, kept],
            self.size[kept],
            self.penalties[kept],
        )


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
            labels = np.repeat(self.targets[:, part], n_penalties, axis=1)
            penalties = np.tile(self._penalties, labels.shape[1] // n_penalties)
            fitted = self._fit(basis[0], t[train], labels[train], penalties)
            for outer, held in (pair, pair[::-1]):
                rows = (self._folds == held) & self._learners
                loss = log_loss(self._apply(fitted, t[rows]), labels[rows]).mean(axis=0)
                self._error[outer, :, part] += loss.reshape(-1, n_penalties).T

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
        step = max(1, _MAX_COLUMNS // (n_models * n_logits(self.n_classes)))
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
