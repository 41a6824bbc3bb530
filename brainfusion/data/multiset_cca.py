"""Canonical correlations of two views or more, with ridge, where people may lack views.

Every view is whitened with ridge over the people who have it; the leading eigenvectors of the
matrix whose blocks are the whitened cross-covariances of two views, over the people who have both,
are the directions. That is the generalisation of Kettenring 1971 (Biometrika 58) that maximises the
sum of covariances between whitened views; of two views it is ridge CCA.

Shape legend: n people, d width of a view, r rank of a view, k components.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from brainfusion.data.cca import Axes
from brainfusion.runtime.errors import UserError
from brainfusion.runtime.threads import one_thread

Pairs = Sequence[tuple[int, int]]
"""Pairs of views, by number."""


@dataclass(frozen=True, eq=False)
class Directions:
    """A view's directions; variates have variance 1 where they were fitted."""

    mean: np.ndarray
    """float64 [d]."""
    weights: np.ndarray
    """float64 [d, k]."""

    def variates(self, view: np.ndarray) -> np.ndarray:
        """Variates [n, k] of rows [n, d]."""
        return (view - self.mean) @ self.weights


def fit_multiset(
    views: Sequence[np.ndarray],
    present: Sequence[np.ndarray],
    *,
    ridges: Sequence[float],
    n_components: int,
    joined: Pairs | None = None,
) -> list[Directions]:
    """Directions of each view, in matching order.

    Args:
        views: [n, d] each, row-paired; rows of people who lack the view are not looked at.
        present: bool [n] a view: who has it.
        ridges: A view's share of the mean variance that is added to each of its columns.
        n_components: Components, at most the smallest rank of a view.
        joined: Pairs of views whose covariance is maximised; every pair if omitted. What two views
            share that are not joined plays no part, however much it is.

    Raises:
        UserError: Two views that nobody has both of in a chain that joins all, or no variance.
    """
    from scipy.linalg import eigh

    with one_thread():
        axes = [Axes.of(view[has]) for view, has in zip(views, present, strict=True)]
        whiten = [a.whitening(ridge) for a, ridge in zip(axes, ridges, strict=True)]
        starts = np.cumsum([0, *(len(w) for w in whiten)])
        blocks = np.zeros((starts[-1], starts[-1]))
        met = np.eye(len(views), dtype=bool)
        for i, j in joined or combinations(range(len(views)), 2):
            both = present[i] & present[j]
            if both.sum() < 2:
                continue
            met[i, j] = met[j, i] = True
            first, second = (
                ((views[m][both] - axes[m].mean) @ axes[m].axes) * whiten[m] for m in (i, j)
            )
            block = first.T @ second / both.sum()
            blocks[starts[i] : starts[i + 1], starts[j] : starts[j + 1]] = block
            blocks[starts[j] : starts[j + 1], starts[i] : starts[i + 1]] = block.T
        if not np.linalg.matrix_power(met.astype(int), len(views)).all():
            raise UserError(
                "some views share nobody with the others, not even through a third: expected "
                "people who have several."
            )
        k = min(n_components, *(len(w) for w in whiten))
        size = len(blocks)
        vectors = eigh(blocks, subset_by_index=[size - k, size - 1])[1][:, ::-1]
        # The sign of a direction is arbitrary; fixed, so that machines agree.
        vectors = vectors * np.sign(vectors[np.abs(vectors).argmax(0), np.arange(k)])
        found = []
        for i, (own, scale) in enumerate(zip(axes, whiten, strict=True)):
            part = scale[:, None] * vectors[starts[i] : starts[i + 1]]
            found.append(Directions(own.mean, own.axes @ own.unit(part)))
        return found


def out_of_fold(
    views: Sequence[np.ndarray],
    present: Sequence[np.ndarray],
    fitted: Sequence[Directions],
    *,
    ridges: Sequence[float],
    folds: np.ndarray,
    joined: Pairs | None = None,
) -> list[np.ndarray]:
    """Variates of each person from directions that were fitted without that person's fold.

    Components of a fold come in another order and with other signs; they are put into those of
    `fitted` as they agree over the people of the other folds. They are not rotated, too: a rotation
    towards a fit that has seen the person would let in what the fold keeps out.

    Args:
        views: As in `fit_multiset`.
        present: As in `fit_multiset`.
        fitted: Its result on all people.
        ridges: As in `fit_multiset`.
        folds: int [n]: the fold of each person.
        joined: As in `fit_multiset`.

    Returns:
        [n, k] a view, variance as it comes out of the fold; 0 where a person lacks the view.
    """
    from scipy.optimize import linear_sum_assignment

    k = min(f.weights.shape[1] for f in fitted)
    found = [np.zeros((len(view), k)) for view in views]
    for fold in np.unique(folds):
        others, own = folds != fold, folds == fold
        parts = fit_multiset(
            [v[others] for v in views],
            [has[others] for has in present],
            ridges=ridges,
            n_components=k,
            joined=joined,
        )
        agreement = np.zeros((parts[0].weights.shape[1], k))
        for view, has, part, whole in zip(views, present, parts, fitted, strict=True):
            rows = others & has
            agreement += part.variates(view[rows]).T @ whole.variates(view[rows]) / rows.sum()
        here, there = linear_sum_assignment(-np.abs(agreement))
        turn = np.zeros_like(agreement)
        turn[here, there] = np.where(agreement[here, there] < 0, -1.0, 1.0)
        for values, view, has, part in zip(found, views, present, parts, strict=True):
            rows = own & has
            values[rows] = part.variates(view[rows]) @ turn
    return found
