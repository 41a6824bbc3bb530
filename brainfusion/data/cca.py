"""Canonical correlation analysis with ridge, in closed form (chosen in `data.cca_choice`).

With Sxx + ridge_x tr(Sxx)/d I (and the same of y) in place of the covariances, the directions come
from the singular vectors of the whitened cross-covariance. One eigendecomposition a side serves
every ridge: it is that of the smaller of the covariance and the Gram matrix of people, which gives
the same directions (Vinod 1976, J. Econometrics 4; Leurgans et al. 1993, JRSS B 55).

Shape legend: n people, d and e widths, r rank of a side, k components.
"""

from dataclasses import dataclass

import numpy as np

from brainfusion.runtime.errors import UserError
from brainfusion.runtime.threads import one_thread

_SOLID = 1e-10
"""Eigenvalues of a Gram matrix below this share of the largest are rounding."""


@dataclass(frozen=True, kw_only=True, eq=False)
class CCA:
    """Directions in two views, in pairs; variates have variance 1 where it was fitted."""

    mean_x: np.ndarray
    """float64 [d]."""
    mean_y: np.ndarray
    """float64 [e]."""
    weights_x: np.ndarray
    """float64 [d, k], in the order of the regularised correlations."""
    weights_y: np.ndarray
    """float64 [e, k]."""
    correlations: np.ndarray
    """float64 [k]: of the variates of the people it was fitted on; too high for anyone else."""
    ridge_x: float
    """As a share of the mean variance."""
    ridge_y: float
    """As a share of the mean variance."""

    def variates_x(self, x: np.ndarray) -> np.ndarray:
        """Variates [n, k] of rows of the first view."""
        return (np.asarray(x, np.float64) - self.mean_x) @ self.weights_x

    def variates_y(self, y: np.ndarray) -> np.ndarray:
        """Variates [n, k] of rows of the second view."""
        return (np.asarray(y, np.float64) - self.mean_y) @ self.weights_y


def fit_cca(
    x: np.ndarray, y: np.ndarray, *, n_components: int, ridge_x: float, ridge_y: float
) -> CCA:
    """Fit in closed form.

    Args:
        x: [n, d], row i and row i of `y` are one person.
        y: [n, e].
        n_components: Pairs of directions, at most the smaller rank.
        ridge_x: Share of the mean variance of the columns of `x` that is added to each; 0 is plain
            CCA, of the space that the people span.
        ridge_y: The same of `y`.

    Raises:
        UserError: Rows that are no pairs, fewer than 3, no variance, or a negative ridge.
    """
    if n_components < 1 or ridge_x < 0 or ridge_y < 0:
        raise UserError(
            f"n_components={n_components}, ridges {ridge_x} and {ridge_y}: expected one component "
            "or more and ridges of 0 or more."
        )
    with one_thread():
        return Views.of(x, y).fit(n_components, ridge_x, ridge_y)


# -- one eigendecomposition a side, every ridge ---------------------------------------------------


@dataclass(frozen=True, eq=False)
class Axes:
    """Principal axes of a view, from the smaller of its two Gram matrices."""

    mean: np.ndarray
    axes: np.ndarray
    """[d, r], orthonormal."""
    variances: np.ndarray
    """[r], falling."""
    scores: np.ndarray
    """[n, r], of the people it was fitted on."""

    @classmethod
    def of(cls, values: np.ndarray) -> "Axes":
        """Of rows [n, d]; axes without variance are left out."""
        values = np.asarray(values, np.float64)
        mean = values.mean(axis=0)
        values = values - mean
        wide = values.shape[1] > len(values)
        found, vectors = np.linalg.eigh(values @ values.T if wide else values.T @ values)
        found, vectors = found[::-1], vectors[:, ::-1]
        solid = found > _SOLID * max(found[0], 0)
        if not solid.any():
            raise UserError("all people have the same features: nothing can be correlated.")
        found, vectors = found[solid], vectors[:, solid]
        axes = values.T @ (vectors / np.sqrt(found)) if wide else vectors
        scores = vectors * np.sqrt(found) if wide else values @ axes
        return cls(mean, axes, found / len(values), scores)

    def whitening(self, ridge: float) -> np.ndarray:
        """[r]: one over the standard deviation of each axis with ridge."""
        mean_variance = self.variances.sum() / len(self.mean)
        return 1 / np.sqrt(self.variances + ridge * mean_variance)

    def unit(self, directions: np.ndarray) -> np.ndarray:
        """The same directions [r, k] with variance 1; one without any stays 0."""
        spread = np.sqrt(self.variances @ directions**2)
        return directions / np.where(spread > 0, spread, 1)


@dataclass(frozen=True, eq=False)
class Views:
    """Two row-paired views in their principal axes, ready for any ridge."""

    x: Axes
    y: Axes
    cross: np.ndarray
    """[r, r'], covariance of the scores."""

    @classmethod
    def of(cls, x: np.ndarray, y: np.ndarray) -> "Views":
        """Of rows [n, d] and [n, e].

        Raises:
            UserError: Rows that are no pairs, fewer than 3, or no variance.
        """
        if x.ndim != 2 or y.ndim != 2 or len(x) != len(y) or len(x) < 3:
            raise UserError(
                f"views of shapes {x.shape} and {y.shape}: expected 3 rows or more, row i of both "
                "from one person."
            )
        sides = Axes.of(x), Axes.of(y)
        return cls(*sides, sides[0].scores.T @ sides[1].scores / len(x))

    def directions(self, ridge_x: float, ridge_y: float, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The leading k directions of both sides in their axes, [r, k] and [r', k]."""
        from scipy.linalg import eigh

        left, right = self.x.whitening(ridge_x), self.y.whitening(ridge_y)
        whitened = left[:, None] * self.cross * right
        flip = whitened.shape[0] > whitened.shape[1]
        if flip:
            whitened = whitened.T
        size = len(whitened)
        k = min(k, size)
        found, vectors = eigh(whitened @ whitened.T, subset_by_index=[size - k, size - 1])
        vectors = vectors[:, ::-1]
        # The sign of a direction is arbitrary; fixed, so that machines agree.
        vectors = vectors * np.sign(vectors[np.abs(vectors).argmax(0), np.arange(k)])
        values = np.sqrt(np.maximum(found[::-1], 0))
        others = whitened.T @ vectors / np.maximum(values, np.finfo(float).tiny ** 0.25)
        first, second = (others, vectors) if flip else (vectors, others)
        return self.x.unit(left[:, None] * first), self.y.unit(right[:, None] * second)

    def fit(self, n_components: int, ridge_x: float, ridge_y: float) -> CCA:
        """Ridge CCA with these ridges, as `fit_cca`."""
        a, b = self.directions(ridge_x, ridge_y, n_components)
        return CCA(
            mean_x=self.x.mean,
            mean_y=self.y.mean,
            weights_x=self.x.axes @ a,
            weights_y=self.y.axes @ b,
            correlations=np.einsum("rk,rs,sk->k", a, self.cross, b, optimize=True),
            ridge_x=ridge_x,
            ridge_y=ridge_y,
        )
