"""Which ridge CCA: its ridges and components, chosen on people whom it was not fitted on.

Ridges and the number of components are those with the highest mean log density ratio of held-out
pairs (`brainfusion.data.oracle`), which is the information that the score has about who belongs to
whom. It is a sum over components, and it is cross-fitted: the correlations that a held-out person's
score is made with come from other held-out people, so nothing is rewarded for fitting the noise.

Shape legend: n people, d and e widths, r rank of a side, k components.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from brainfusion.data.cca import CCA, Views
from brainfusion.runtime.errors import UserError
from brainfusion.runtime.threads import one_thread

RIDGES = (0.0, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
N_COMPONENTS = (1, 2, 4, 8, 16, 32, 64, 128)

_GREATEST = 0.995
"""A correlation of 1 would make one component outweigh all others without bound."""
_PRIOR_PEOPLE = 4
"""Held-out people without correlation that are added to the true ones: few people say little."""


def choose_cca(
    x: np.ndarray,
    y: np.ndarray,
    x_val: np.ndarray,
    y_val: np.ndarray,
    *,
    ridges: Sequence[float] = RIDGES,
    n_components: Sequence[int] = N_COMPONENTS,
) -> tuple[CCA, np.ndarray]:
    """Fit on some people, choose the ridge of each side and the components on others.

    Args:
        x: [n, d], people to fit on.
        y: [n, e].
        x_val: [m, d], m >= 4 people to choose with.
        y_val: [m, e].
        ridges: Shares of the mean variance to try.
        n_components: Numbers of components to try.

    Returns:
        The fit, and its correlations [k] in the people chosen with (`held_out_correlations`).

    Raises:
        UserError: As `fit_cca`, or fewer than 4 people to choose with.
    """
    if len(x_val) != len(y_val) or len(x_val) < 4:
        raise UserError(
            f"{len(x_val)} and {len(y_val)} people to choose a ridge with: expected 4 pairs or "
            "more; make a larger validation split."
        )
    with one_thread():
        views = Views.of(x, y)
        held_out = [_HeldOut.of(views, x_val, y_val)]
        best = _search(held_out, ridges, n_components)
        cca = views.fit(best.k, best.ridge_x, best.ridge_y)
        return cca, _correlations(_moments(held_out, best.ridge_x, best.ridge_y, best.k).sum(0))


def cross_validated_cca(
    x: np.ndarray,
    y: np.ndarray,
    *,
    folds: np.ndarray,
    ridges: Sequence[float] = RIDGES,
    n_components: Sequence[int] = N_COMPONENTS,
) -> tuple[CCA, np.ndarray]:
    """Choose ridges and components by folds of the people, then fit on all of them.

    Args:
        x: [n, d].
        y: [n, e].
        folds: int [n]: people of one number are held out together (`fold_of`).
        ridges: Shares of the mean variance to try.
        n_components: Numbers of components to try.

    Returns:
        The fit on all people, scaled so that variates have variance 1 in the people held out, and
        the correlations [k] there, pooled over folds: a little low for the fit on more people.

    Raises:
        UserError: As `fit_cca`.
    """
    with one_thread():
        held_out = [
            _HeldOut.of(
                Views.of(x[folds != f], y[folds != f]), x[folds == f], y[folds == f], n_parts=1
            )
            for f in np.unique(folds)
        ]
        best = _search(held_out, ridges, n_components)
        cca = Views.of(x, y).fit(best.k, best.ridge_x, best.ridge_y)
        sums = _moments(held_out, best.ridge_x, best.ridge_y, best.k).sum(0)
        k = sums.shape[1]
        scale_x, scale_y = (np.where(v > 1e-12, np.sqrt(v), 1) for v in _centred(sums)[2:4])
        scaled = replace(
            cca,
            weights_x=cca.weights_x[:, :k] / scale_x,
            weights_y=cca.weights_y[:, :k] / scale_y,
            correlations=cca.correlations[:k],
        )
        return scaled, _correlations(sums)


def fold_of(n: int, *, n_folds: int = 5, groups: np.ndarray | None = None) -> np.ndarray:
    """A fold for each of n people, int64 [n]: the same at every call, people mixed.

    Args:
        n: People.
        n_folds: Folds at most; few people get fewer, of 3 people or more.
        groups: int [n]: people of one group (a family, one person's scans) stay in one fold.
    """
    groups = np.arange(n) if groups is None else np.unique(groups, return_inverse=True)[1]
    count = int(groups.max()) + 1
    n_folds = max(2, min(n_folds, count // 3))
    return (np.random.default_rng(0).permutation(count) % n_folds)[groups]


def held_out_correlations(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Canonical correlations [k] from people that the directions were not fitted on.

    What chance gives in so few people is taken out (Fisher's adjustment of the square, and a few
    people without any correlation added); the order of the directions says that they should fall,
    so the squares are made to (isotonic regression, Barlow et al. 1972). A direction that is no
    better than chance gets 0.

    Args:
        u: Variates of one view [n, k], in the order of the fit.
        v: Variates of the other [n, k], row-paired.
    """
    return _correlations(_sums(np.asarray(u, np.float64), np.asarray(v, np.float64)))


def information(u: np.ndarray, v: np.ndarray, *, n_parts: int = 2) -> float:
    """Mean log density ratio of held-out pairs in nats, cross-fitted; 0 where nothing is shared.

    Args:
        u: Variates of one view [n, k].
        v: Variates of the other [n, k], row-paired.
        n_parts: Correlations and variances for one part of the people come from the others.
    """
    parts = np.stack([_sums(u[part::n_parts], v[part::n_parts]) for part in range(n_parts)])
    return float(_ratios(parts).sum())


# -- one fit, every ridge, people held out ---------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _HeldOut:
    """A fit's path and the people held out from it, in its axes."""

    views: Views
    x: np.ndarray
    y: np.ndarray
    n_parts: int

    @classmethod
    def of(cls, views: Views, x: np.ndarray, y: np.ndarray, *, n_parts: int = 2) -> "_HeldOut":
        scores = [
            (np.asarray(values, np.float64) - side.mean) @ side.axes
            for side, values in ((views.x, x), (views.y, y))
        ]
        return cls(views, scores[0], scores[1], n_parts)

    def moments(self, ridge_x: float, ridge_y: float, k: int) -> Iterator[np.ndarray]:
        a, b = self.views.directions(ridge_x, ridge_y, k)
        u, v = self.x @ a, self.y @ b
        for part in range(self.n_parts):
            yield _sums(u[part :: self.n_parts], v[part :: self.n_parts])


# -- what held-out people say ---------------------------------------------------------------------


class _Choice(NamedTuple):
    value: float
    ridge_x: float
    ridge_y: float
    k: int


def _search(
    held_out: list[_HeldOut], ridges: Sequence[float], n_components: Sequence[int]
) -> _Choice:
    """The same ridge on both sides first, then each side's own, then a finer step.

    Of equals the greatest ridge is taken: where nothing is found, the least is fitted.
    """
    tried: dict[tuple[float, float], _Choice] = {}

    def best_of(pairs: list[tuple[float, float]]) -> _Choice:
        for pair in pairs:
            if pair not in tried:
                gained = _ratios(_moments(held_out, *pair, max(n_components))).cumsum()
                counts = sorted({min(k, len(gained)) for k in n_components})
                k = max(counts, key=lambda k: gained[k - 1] - 1e-12 * k)
                tried[pair] = _Choice(float(gained[k - 1]), *pair, k)
        return max(tried.values(), key=lambda choice: choice.value)

    falling = sorted(ridges, reverse=True)
    best = best_of([(ridge, ridge) for ridge in falling])
    best = best_of([(ridge, best.ridge_y) for ridge in falling])
    best = best_of([(best.ridge_x, ridge) for ridge in falling])
    if len(falling) == 1:
        return best
    finer = (1.7, 1 / 1.7)
    best = best_of([(best.ridge_x * f, best.ridge_y * f) for f in finer])
    best = best_of([(best.ridge_x * f, best.ridge_y) for f in finer])
    return best_of([(best.ridge_x, best.ridge_y * f) for f in finer])


def _moments(held_out: list[_HeldOut], ridge_x: float, ridge_y: float, k: int) -> np.ndarray:
    """Sums of each part of the held-out people, [parts, 6, k]."""
    found = [part for one in held_out for part in one.moments(ridge_x, ridge_y, k)]
    least = min(part.shape[1] for part in found)
    return np.stack([part[:, :least] for part in found])


def _sums(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Count, sums, sums of squares and of products of each component, [6, k]."""
    count = np.full(u.shape[1], float(len(u)))
    return np.stack([count, u.sum(0), v.sum(0), (u**2).sum(0), (v**2).sum(0), (u * v).sum(0)])


def _centred(sums: np.ndarray) -> tuple[np.ndarray, ...]:
    """Means, variances and correlation of each component."""
    n, u, v, uu, vv, uv = sums
    n = np.maximum(n, 1)
    mean_u, mean_v = u / n, v / n
    var_u = np.maximum(uu / n - mean_u**2, np.finfo(float).tiny)
    var_v = np.maximum(vv / n - mean_v**2, np.finfo(float).tiny)
    r = (uv / n - mean_u * mean_v) / np.sqrt(var_u * var_v)
    return mean_u, mean_v, var_u, var_v, np.clip(r, -1, 1)


def _correlations(sums: np.ndarray) -> np.ndarray:
    from scipy.optimize import isotonic_regression

    n = sums[0]
    r = _centred(sums)[4] * n / (n + _PRIOR_PEOPLE)
    square = np.sign(r) * np.maximum(r**2 - (1 - r**2) / np.maximum(n - 2, 1), 0)
    falling = isotonic_regression(square, increasing=False).x
    return np.clip(np.sqrt(np.maximum(falling, 0)), 0, _GREATEST)


def _ratios(parts: np.ndarray) -> np.ndarray:
    """Mean log density ratio of pairs that each component gives, [k], cross-fitted over parts."""
    total = np.zeros(parts.shape[2])
    for part in parts:
        others = parts.sum(axis=0) - part
        rho = _correlations(others)
        mean_u, mean_v, var_u, var_v, _ = _centred(others)
        n, u, v, uu, vv, uv = part
        size_u = (uu - 2 * mean_u * u + n * mean_u**2) / var_u
        size_v = (vv - 2 * mean_v * v + n * mean_v**2) / var_v
        product = (uv - mean_u * v - mean_v * u + n * mean_u * mean_v) / np.sqrt(var_u * var_v)
        rest = 1 - rho**2
        total += rho / rest * product - rho**2 / (2 * rest) * (size_u + size_v)
        total -= n / 2 * np.log(rest)
    return total / parts[:, 0, 0].sum()
