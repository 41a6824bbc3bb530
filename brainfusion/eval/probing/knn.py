"""k-nearest-neighbour probes: what features know, linear or not, with k chosen in the fold.

Neighbours are the nearest people in Euclidean distance. A continuous target is the mean of the
neighbours' values; a class has (its neighbours + its share in training) / (k + 1), so that no
probability is 0. The nearest people of each fold are found once: those of any training set made of
whole folds are among them.

Shape legend: n people, c columns (targets, permutations), g columns of logits, k folds.
"""

from collections.abc import Iterator, Sequence
from functools import cached_property

import numpy as np

from brainfusion.eval.probing.linear import FeatureSpace
from brainfusion.eval.probing.logistic import log_loss, one_hot, probabilities, share_logits

COUNTS = (1, 3, 5, 10, 20, 40)
"""Numbers of neighbours that are tried."""

_TILE = 1024


class Neighbours:
    """The nearest people of each fold, for everyone."""

    def __init__(self, space: FeatureSpace, counts: Sequence[int] = COUNTS) -> None:
        """Counts beyond the smallest training set are left out."""
        self.folds, self.n_folds = space.folds, space.n_folds
        sizes = np.sort(np.bincount(space.folds))
        most = int(sizes[:-2].sum())
        self.counts = [count for count in counts if count <= most] or [1]
        self._x = space.x

    @cached_property
    def _nearest(self) -> tuple[np.ndarray, np.ndarray]:
        """Rows [n, k, count] and squared distances, by fold; short folds are padded with inf."""
        x, most = self._x, max(self.counts)
        size = (x**2).sum(axis=1)
        rows = np.zeros((len(x), self.n_folds, most), np.int32)
        distances = np.full(rows.shape, np.inf, np.float32)
        for fold in range(self.n_folds):
            members = np.flatnonzero(self.folds == fold)
            n_kept = min(most, len(members))
            for start in range(0, len(x), _TILE):
                some = slice(start, start + _TILE)
                away = size[some, None] - 2 * x[some] @ x[members].T + size[members]
                near = np.argpartition(away, n_kept - 1, axis=1)[:, :n_kept]
                rows[some, fold, :n_kept] = members[near]
                distances[some, fold, :n_kept] = np.take_along_axis(away, near, axis=1)
        return rows, distances

    def among(self, people: np.ndarray, left_out: Sequence[int]) -> np.ndarray:
        """The nearest people [m, count] in the training set, nearest first."""
        rows, distances = self._nearest
        inside = np.setdiff1d(np.arange(self.n_folds), left_out)
        away = distances[np.ix_(people, inside)].reshape(len(people), -1)
        order = np.argsort(away, axis=1, kind="stable")[:, : max(self.counts)]
        return np.take_along_axis(rows[np.ix_(people, inside)].reshape(len(people), -1), order, 1)


class NeighbourSearch:
    """As `RidgeSearch` and `LogisticSearch`: k is chosen by squared error or by log loss."""

    def __init__(
        self, neighbours: Neighbours, targets: np.ndarray, *, n_classes: int | None = None
    ) -> None:
        """Start.

        Args:
            neighbours: Of the features.
            targets: Values or class numbers [n, c].
            n_classes: Of every column; None for continuous targets.
        """
        self._near, self.targets, self.n_classes = neighbours, targets, n_classes
        self._error = np.zeros((neighbours.n_folds, len(neighbours.counts), targets.shape[1]))
        if n_classes is None:
            self._values = targets
        else:
            self._values = one_hot(targets, n_classes, np.float32)
        self.predictions = np.zeros(self._values.shape, self._values.dtype)
        """[n, c], or logits [n, c, g]."""
        self.baseline = np.zeros_like(self.predictions)
        """The training mean, or the logits of the class shares."""

    @property
    def chosen(self) -> np.ndarray:
        """The index of the count for each fold and column, [k, c]."""
        return self._error.argmin(axis=1)

    def inner(self, pair: tuple[int, int], basis: object = None) -> None:
        """Add the errors of the training set without these two folds."""
        for outer, held in (pair, pair[::-1]):
            rows = np.flatnonzero(self._near.folds == held)
            for i, predicted in enumerate(self._path(rows, pair)):
                if self.n_classes is None:
                    error = (predicted - self.targets[rows]) ** 2
                else:
                    error = log_loss(predicted, self.targets[rows])
                self._error[outer, i] += error.mean(axis=0)

    def outer(self, fold: int, basis: object = None) -> None:
        """Choose k for this fold and predict it."""
        rows = np.flatnonzero(self._near.folds == fold)
        chosen = self._error[fold].argmin(axis=0)
        for i, predicted in enumerate(self._path(rows, (fold,))):
            columns = np.flatnonzero(chosen == i)
            self.predictions[np.ix_(rows, columns)] = predicted[:, columns]
        self.baseline[rows] = self._share((fold,))

    def _share(self, left_out: Sequence[int]) -> np.ndarray:
        values = self._values[~np.isin(self._near.folds, left_out)]
        if self.n_classes is None:
            return values.mean(axis=0, dtype=np.float64)
        return share_logits(values)

    def _path(self, rows: np.ndarray, left_out: Sequence[int]) -> Iterator[np.ndarray]:
        near = self._near.among(rows, left_out)
        total = np.zeros((len(rows), *self._values.shape[1:]), self._values.dtype)
        prior = None if self.n_classes is None else probabilities(self._share(left_out))
        for place in range(near.shape[1]):
            total += self._values[near[:, place]]
            if (count := place + 1) in self._near.counts:
                if prior is None:
                    yield total / count
                else:
                    share = (total + prior) / (count + 1)
                    yield np.log(share / (1 - share)) if share.shape[-1] == 1 else np.log(share)
