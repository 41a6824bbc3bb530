"""Many logistic models to their minima at once, in products of matrices that all of them share.

The Hessian of a model with probabilities p is X'WX + penalty. It is approximated by

    X'WX ~ mean(W) X'X,   X'X = V diag(lam) V',   W = p (1 - p); diag(p) - p p' of several classes

which is exact for normal features but for one direction (Stein's lemma; Erdogdu 2015, Newton-Stein
method), and costs one eigendecomposition for all penalties, labels and training sets. Each step is
the minimum of the exact quadratic in the plane of the scaled gradient and the step before (Yuan and
Stoer 1995, a subspace study on conjugate gradients), which takes one product with X; a step that
goes beyond the minimum of its line is shortened (the approximate Wolfe condition of Hager and Zhang
2005). Products run over tiles of people: of [n, g, c] only the logits of the point and of two
directions are kept.

Shape legend: n people, m people of a tile, d columns of X, r rank, c models, g columns of logits a
model (1 for two classes).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

import numpy as np

_TILE = 2**18
"""Cells of [m, g, c] worked on at once: few temporaries, long products."""
_FEWEST_ROWS = 256
"""Of a tile, however many columns there are: shorter products are slow."""
_GOING = 0.8
"""Share of models that are not finished, below which they are moved together."""
_MOST_CUTS = 30
"""Times that a step is shortened."""
_LEAST_SPREAD = 1e-6
"""Of mean(W) as it is divided by; that of sure models tends to 0."""


@dataclass(frozen=True, eq=False)
class Metric:
    """X'X of all people as eigenvalues and directions; close to it is enough."""

    values: np.ndarray
    """[r]"""
    axes: np.ndarray | None = None
    """Directions [d, r]; None if the columns of X are the eigenbasis."""

    def solve(
        self, weights: np.ndarray, levels: np.ndarray, spread: "Spread", penalties: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """The inverse of the approximate Hessian times weights [d, g, c] and levels [g, c]."""
        d, dtype = len(weights), weights.dtype
        w = weights if self.axes is None else self._product(self.axes.T, weights)
        w, level = spread.turned(w), spread.turned(levels[None])[0]
        curve = self.values[:, None, None] * (spread.values * spread.share)
        w = w / (curve + penalties).astype(dtype)
        level = level / (spread.values * spread.size).astype(dtype)
        w, level = spread.turned(w, back=True), spread.turned(level[None], back=True)[0]
        w = w if self.axes is None else self._product(self.axes, w)
        return w.reshape(d, *levels.shape), level

    @staticmethod
    def _product(axes: np.ndarray, weights: np.ndarray) -> np.ndarray:
        flat = axes.astype(weights.dtype, copy=False) @ weights.reshape(len(weights), -1)
        return flat.reshape(-1, *weights.shape[1:])


@dataclass(frozen=True, eq=False)
class Spread:
    """mean(W) of each model, over the people it is fitted to."""

    values: np.ndarray
    """[g, c], eigenvalues of mean(W)."""
    axes: np.ndarray | None
    """Its directions [g, g, c]; None of two classes."""
    size: np.ndarray
    """People of each model [c]."""
    share: np.ndarray
    """The same, of all people."""

    @classmethod
    def of(cls, total: np.ndarray, size: np.ndarray, n: int) -> Self:
        """From the sum of W over people, [g, g, c]."""
        mean = total / size
        g = len(mean)
        if g == 1:
            return cls(np.maximum(mean[0], _LEAST_SPREAD), None, size, size / n)
        # W is 0 along (1, ..., 1), where weights never go: any other number there will do.
        mean = mean + np.einsum("ggc->c", mean) / g
        values, axes = np.linalg.eigh(np.moveaxis(mean, -1, 0))
        values = np.maximum(values.T, _LEAST_SPREAD)
        return cls(values, np.moveaxis(axes, 0, -1), size, size / n)

    def turned(self, x: np.ndarray, *, back: bool = False) -> np.ndarray:
        """Columns of logits of x [r, g, c] in the directions of mean(W), or back."""
        if self.axes is None:
            return x
        axes = self.axes.astype(x.dtype)
        return np.einsum("rhc,ghc->rgc" if back else "rgc,ghc->rhc", x, axes)


def minimise(
    rows: np.ndarray,
    labels: np.ndarray,
    penalties: np.ndarray,
    metric: Metric,
    *,
    n_classes: int = 2,
    members: np.ndarray | None = None,
    start: tuple[np.ndarray, np.ndarray] | None = None,
    tolerance: float,
    max_steps: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Fit all models.

    Args:
        rows: X [n, d], of mean 0 unless `members` are given.
        labels: Class numbers [n, c / k].
        penalties: [c], the labels one after another, k times.
        metric: Of the rows.
        n_classes: Of every model.
        members: bool [n, c / k], whom the models of a column are fitted to; everyone if None.
        start: Intercepts [g, c] and weights [d, g, c] to start from; the shares of the classes and
            no weights if None.
        tolerance: A model stops when its expected decrease is below this, in nats a person.
        max_steps: After which models stop anyhow.

    Returns:
        Intercepts [g, c] and weights [d, g, c].
    """
    models = _Models(rows, labels, n_classes, members)
    times = len(penalties) // labels.shape[1]
    if start is None:
        models.look()  # Without weights all penalties see the same.
    if times > 1:
        models.keep(np.tile(np.arange(labels.shape[1]), times))
    models.penalties = penalties.astype(rows.dtype)
    if start is not None:
        models.start(*start)
    intercepts, weights = np.empty_like(models.levels), np.empty_like(models.weights)
    active, share = np.arange(len(penalties)), np.ones(len(penalties), rows.dtype)
    for step in range(max_steps + 1):
        spread = Spread.of(models.total, models.size, len(rows))
        ahead = metric.solve(*models.downhill, spread, models.penalties)
        gain = _dot(models.downhill, ahead)
        near = gain <= tolerance * models.size
        going = ~near & (step < max_steps)
        # Finished models go along until it pays to move the others together.
        if going.mean() < _GOING:
            left = active[~going]
            # So close to the minimum the way ahead needs no measuring.
            share = np.where(near, share, 0)
            end = models.after(share * ahead[0], share * ahead[1])
            intercepts[:, left], weights[..., left] = (v[..., ~going] for v in end)
            if not going.any():
                break
            active, gain = active[going], gain[going]
            ahead = ahead[0][..., going], ahead[1][..., going]
            models.keep(going)
        share = models.step(ahead, gain)
    return intercepts, weights


class _Models:
    """Models that are not finished: where they are, and what they see from there."""

    def __init__(
        self,
        rows: np.ndarray,
        labels: np.ndarray,
        n_classes: int,
        members: np.ndarray | None,
    ) -> None:
        """Take arguments of `minimise`: a model a column of labels, with no penalty or weights."""
        (n, c), dtype = labels.shape, rows.dtype
        self.g = 1 if n_classes == 2 else n_classes
        self.rows, self.labels, self.members = rows, labels.astype(np.int16), members
        self.classes = np.arange(n_classes, dtype=np.int16)[-self.g :, None]
        self.penalties, self.size = np.zeros(c, dtype), np.full(c, float(n))
        self.means: np.ndarray | None = None
        """Of each model's people [d, c]; None if 0."""
        if members is not None:
            self.size = members.sum(axis=0, dtype=float)
            self.means = rows.T @ members.astype(dtype) / self.size.astype(dtype)
        self.levels = self._share_logits().astype(dtype)
        """[g, c]; logits are levels + (rows - means) weights."""
        self.weights = np.zeros((rows.shape[1], self.g, c), dtype)
        self.logits = np.tile(self.levels, (n, 1, 1))
        self.inside = np.empty_like(self.logits)
        """p (1 - p) of the people that a model is fitted to; of several classes p alone."""
        self.total = np.zeros((self.g, self.g, c))
        """Sum of W, [g, g, c]."""
        self.downhill = self.weights, self.levels
        """Minus the gradient, of weights and levels."""
        self.last: tuple[np.ndarray, np.ndarray] | None = None
        """The last step, of weights and levels; None before the first."""
        self.last_logits: np.ndarray | None = None

    def start(self, intercepts: np.ndarray, weights: np.ndarray) -> None:
        """Go to intercepts [g, c] and weights [d, g, c], and look around."""
        self.weights[:] = weights
        self.levels[:] = intercepts + self._offset(self.weights)
        for part in self._tiles():
            self.logits[part] = self._seen(part, self.weights, self.levels)
        self.look()

    def after(self, weights: np.ndarray, levels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Intercepts, for rows as they are, and weights, once these were added."""
        there = self.weights + weights
        return self.levels + levels - self._offset(there), there

    def keep(self, kept: np.ndarray) -> None:
        """Only these models [c]."""
        for name in ("labels", "members", "penalties", "size", "means", "levels", "weights",
                     "logits", "inside", "total", "last_logits"):  # fmt: skip
            value = getattr(self, name)
            if value is not None:
                setattr(self, name, value[..., kept])
        self.downhill = self.downhill[0][..., kept], self.downhill[1][..., kept]
        if self.last is not None:
            self.last = self.last[0][..., kept], self.last[1][..., kept]

    def step(self, ahead: tuple[np.ndarray, np.ndarray], gain: np.ndarray) -> np.ndarray:
        """To the minimum in the plane of this direction and the last step.

        Args:
            ahead: The scaled gradient, of weights and levels.
            gain: Its product with the gradient [c].

        Returns:
            How much of the direction the step took [c].
        """
        logits, curve = self._curve(ahead)
        before = np.zeros(len(gain)) if self.last is None else _dot(self.downhill, self.last)
        share, again = _plane_minimum(curve, gain, before)
        slope = share * gain + again * before
        share, again = share.astype(self.rows.dtype), again.astype(self.rows.dtype)
        taken = share * ahead[0], share * ahead[1]
        for part in self._tiles():
            logits[part] *= share
        if self.last is not None and self.last_logits is not None:
            taken = taken[0] + again * self.last[0], taken[1] + again * self.last[1]
            for part in self._tiles():
                logits[part] += again * self.last_logits[part]
        self.last, self.last_logits = taken, logits
        length = np.ones(len(gain))
        found = self._go(length)
        for _ in range(_MOST_CUTS):
            # Uphill by half of what went down before: the minimum of the line is well behind.
            far = -found > slope / 2
            if not far.any():
                break
            shorter = np.where(far, length * slope / (slope - np.minimum(found, 0)), length)
            found = self._go(shorter - length)
            length = shorter
        return share

    def _curve(self, ahead: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Logits of a direction [n, g, c], and curvature along it and the last step [3, c]."""
        logits, curve = np.empty_like(self.logits), np.zeros((3, len(self.size)))
        for part in self._tiles():
            logits[part] = new = self._seen(part, *ahead)
            bent = self._bent(part, new)
            curve[0] += _each(bent, new)
            if self.last_logits is not None:
                old = self.last_logits[part]
                curve[1] += _each(bent, old)
                curve[2] += _each(self._bent(part, old), old)
        curve[0] += self.penalties * _each(ahead[0], ahead[0])
        if self.last is not None:
            curve[1] += self.penalties * _each(ahead[0], self.last[0])
            curve[2] += self.penalties * _each(self.last[0], self.last[0])
        return logits, curve

    def _go(self, length: np.ndarray) -> np.ndarray:
        """Take the last step this many times [c]; returns minus the slope along it there [c]."""
        assert self.last is not None
        assert self.last_logits is not None
        length = length.astype(self.rows.dtype)
        self.weights += length * self.last[0]
        self.levels += length * self.last[1]
        for part in self._tiles():
            self.logits[part] += length * self.last_logits[part]
        self.look()
        return _dot(self.downhill, self.last)

    def look(self) -> None:
        """The gradient and W where the models are."""
        gradient, level = np.zeros_like(self.weights), np.zeros(self.levels.shape)
        self.total = np.zeros(self.total.shape)
        for part in self._tiles():
            p = self._probabilities(part)
            residual = (self.labels[part, None] == self.classes) - p
            if self.members is not None:
                residual *= self.members[part, None]
            level += residual.sum(axis=0)
            gradient += (self.rows[part].T @ residual.reshape(len(p), -1)).reshape(gradient.shape)
            self.total += self._spread(part, p)
        gradient -= self.penalties * self.weights
        level = level.astype(self.rows.dtype)
        if self.means is not None:
            gradient -= self.means[:, None] * level
        self.downhill = gradient, level

    def _seen(self, part: slice, weights: np.ndarray, levels: np.ndarray) -> np.ndarray:
        """Logits of some people [m, g, c]."""
        rows = self.rows[part]
        out = (rows @ weights.reshape(len(weights), -1)).reshape(len(rows), *levels.shape)
        out += levels - self._offset(weights)
        return out

    def _offset(self, weights: np.ndarray) -> np.ndarray | float:
        """What the means say, [g, c]."""
        return 0.0 if self.means is None else np.einsum("dc,dgc->gc", self.means, weights)

    def _probabilities(self, part: slice) -> np.ndarray:
        logits = self.logits[part]
        if self.g == 1:
            p = logits / 2
            np.tanh(p, out=p)
            p += 1
            p /= 2
            return p
        p = logits - _over_columns(np.maximum, logits)
        np.exp(p, out=p)
        p /= _over_columns(np.add, p)
        return p

    def _bent(self, part: slice, logits: np.ndarray) -> np.ndarray:
        """W times logits [m, g, c]."""
        inside = self.inside[part]
        if self.g == 1:
            return inside * logits
        out = logits - _over_columns(np.add, inside * logits)
        out *= inside
        if self.members is not None:
            out *= self.members[part, None]
        return out

    def _spread(self, part: slice, p: np.ndarray) -> np.ndarray:
        """The sum of W over some people [g, g, c]; keeps what W takes."""
        inside = self.inside[part]
        if self.g == 1:
            np.subtract(1, p, out=inside)
            inside *= p
            if self.members is not None:
                inside *= self.members[part, None]
            return inside.sum(axis=0)[None]
        inside[:] = p
        mine = p if self.members is None else p * self.members[part, None]
        pairs = np.matmul(mine.transpose(2, 1, 0), p.transpose(2, 0, 1)).transpose(1, 2, 0)
        return np.eye(self.g)[..., None] * mine.sum(axis=0) - pairs

    def _share_logits(self) -> np.ndarray:
        """Of the shares of the classes [g, c]; a class that nobody has counts as half a person."""
        hot = self.labels[:, None] == self.classes
        if self.members is not None:
            hot &= self.members[:, None]
        share = np.clip(hot.sum(axis=0) / self.size, 0.5 / self.size, 1 - 0.5 / self.size)
        return np.log(share / (1 - share)) if self.g == 1 else np.log(share)

    def _tiles(self) -> Iterator[slice]:
        step = max(_FEWEST_ROWS, _TILE // (self.g * len(self.size)))
        for start in range(0, len(self.rows), step):
            yield slice(start, start + step)


def _over_columns(operation: np.ufunc, x: np.ndarray) -> np.ndarray:
    """Over the logits of a model [m, g, c], to [m, 1, c]; for few of them quicker than a reduce."""
    out = x[:, 0].copy()
    for i in range(1, x.shape[1]):
        operation(out, x[:, i], out=out)
    return out[:, None]


def _each(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Products of two [x, g, c], summed within each model [c]."""
    return np.einsum("xgc,xgc->c", a, b)


def _dot(a: tuple[np.ndarray, np.ndarray], b: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """Products of weights [d, g, c] and levels [g, c], of each model [c]."""
    return _each(a[0], b[0]) + np.einsum("gc,gc->c", a[1], b[1])


def _plane_minimum(
    curve: np.ndarray, new: np.ndarray, old: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """How far along two directions the minimum of a quadratic is, [c] each.

    Args:
        curve: Of new and new, new and old, old and old, [3, c].
        new: Minus the slope along the new direction [c].
        old: And along the old one.
    """
    nn, no, oo = curve
    determinant = nn * oo - no**2
    plane = determinant > 1e-6 * nn * oo
    by_old = np.where(plane, (nn * old - no * new) / np.where(plane, determinant, 1), 0)
    return (new - no * by_old) / np.maximum(nn, np.finfo(np.float32).tiny), by_old
