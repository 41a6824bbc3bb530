"""Ridge probes with one block of columns left out at a time, in closed form.

Of a training set with rows X (unpenalised columns taken out of it, Frisch and Waugh 1933), penalty
a and P = (X'X + a)^-1, ridge without the columns g has the coefficients

    b - P[:, g] P[g, g]^-1 b[g]

so that one eigendecomposition of a training set serves every penalty and every block, and a block
costs a system of its own size. With X'X = W diag(lam) W' and D = (lam + a)^-1,

    P[:, g] = W D W[g]'

and with fewer people than columns, from XX' = S diag(lam) S' and B = S'X[:, g],

    a P[g, g] = I - B'DB,   a P[:, g] = [columns g of the unit matrix] - X'S DB

where a cancels. Blocks are first written in their own principal axes, which changes no prediction:
vectors of few distinct haplotypes become few columns.

Source: the block inverse of a bordered matrix; Cook 1977 (Technometrics 19) for one column.

Shape legend: n people, c columns of all blocks, r columns of a block, b blocks, q unpenalised
columns, a penalties, k folds, l coordinates.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from brainfusion.runtime.errors import UserError

_RANK_TOLERANCE = 1e-14


@dataclass(frozen=True, kw_only=True, eq=False)
class BlocksOut:
    """Out-of-fold predictions of nested cross-validation, with all blocks and without each."""

    whole: np.ndarray
    """float64 [n]."""
    without: np.ndarray
    """float64 [n, b]."""
    baseline: np.ndarray
    """float64 [n]: by the unpenalised columns alone."""
    chosen: np.ndarray
    """int64 [k, 1 + b]: the penalty of each fold, with all blocks first, by its place."""


def principal_columns(values: np.ndarray, known: np.ndarray | None = None) -> np.ndarray:
    """A block in its own principal axes: as many columns as it has dimensions, float64 [n, r].

    Args:
        values: [n, d].
        known: Who has the block, bool [n]; the others get the mean, which is 0.
    """
    known = np.ones(len(values), bool) if known is None else known
    x = np.zeros(values.shape)
    x[known] = values[known]
    if known.any():
        x[known] -= x[known].mean(axis=0)
    wide = values.shape[1] > len(values)
    sizes, vectors = np.linalg.eigh(x @ x.T if wide else x.T @ x)
    kept = sizes > max(float(sizes[-1]), 0.0) * _RANK_TOLERANCE
    columns = vectors[:, kept] * np.sqrt(sizes[kept]) if wide else x @ vectors[:, kept]
    columns[~known] = 0.0
    return columns


def blocks_out(
    blocks: Sequence[np.ndarray],
    y: np.ndarray,
    folds: np.ndarray,
    *,
    fixed: np.ndarray,
    penalties: np.ndarray,
) -> BlocksOut:
    """Nested cross-validation with all blocks, and without each; the penalty is chosen anew.

    The penalty of an outer fold has the least mean squared error, averaged over the other folds as
    inner folds. Blocks share one scale, the mean squared norm of a person is 1 (as
    `FeatureSpace`); it stays what it is when a block is left out.

    Args:
        blocks: Columns [n, r] of each block, in their principal axes.
        y: Values [n].
        folds: Fold numbers [n], 0 to k - 1.
        fixed: Unpenalised columns [n, q], intercept included.
        penalties: [a], above 0.

    Raises:
        UserError: Fewer than 3 folds, or fewer than 2 blocks.
    """
    n_folds = int(folds.max()) + 1
    if n_folds < 3:
        raise UserError(f"{n_folds} folds: nested cross-validation needs 3 or more.")
    if len(blocks) < 2:
        raise UserError(f"{len(blocks)} blocks that vary: leaving one out needs 2 or more.")
    x = np.concatenate(blocks, axis=1).astype(np.float64)
    x /= np.sqrt(np.einsum("nc,nc->", x, x) / len(x)) or 1.0
    ends = np.cumsum([block.shape[1] for block in blocks])
    places = [slice(end - block.shape[1], end) for end, block in zip(ends, blocks, strict=True)]

    def learnt(*left_out: int) -> _TrainingSet:
        return _TrainingSet(x, places, y, fixed, ~np.isin(folds, left_out))

    error = np.zeros((n_folds, len(penalties), 1 + len(blocks)))
    for pair in combinations(range(n_folds), 2):
        one = learnt(*pair)
        for a, penalty in enumerate(penalties):
            coefficients = one.coefficients(float(penalty))
            for outer, held in (pair, pair[::-1]):
                rows = np.flatnonzero(folds == held)
                left = y[rows, None] - one.predict(coefficients, rows)
                error[outer, a] += (left**2).mean(axis=0)
    chosen = error.argmin(axis=1)
    found, baseline = np.empty((len(y), 1 + len(blocks))), np.empty(len(y))
    for fold in range(n_folds):
        rows, one = np.flatnonzero(folds == fold), learnt(fold)
        baseline[rows] = one.baseline(rows)
        for a in np.unique(chosen[fold]):
            columns = chosen[fold] == a
            every = one.predict(one.coefficients(float(penalties[a])), rows)
            found[np.ix_(rows, columns)] = every[:, columns]
    return BlocksOut(whole=found[:, 0], without=found[:, 1:], baseline=baseline, chosen=chosen)


class _TrainingSet:
    """Ridge of one training set by any penalty, with all blocks and without each."""

    def __init__(
        self,
        x: np.ndarray,
        places: Sequence[slice],
        y: np.ndarray,
        fixed: np.ndarray,
        train: np.ndarray,
    ) -> None:
        inverse = np.linalg.pinv(fixed[train], rcond=1e-10)
        self._fixed, self._gamma = fixed, inverse @ y[train]
        self._x, self._places = x - fixed @ (inverse @ x[train]), places
        rows, y_train = self._x[train], y[train] - fixed[train] @ self._gamma
        self._dual = rows.shape[1] > rows.shape[0]
        if self._dual:
            sizes, axes = np.linalg.eigh(rows @ rows.T)
            self._coordinates = self._x @ (rows.T @ axes)
            self._t, self._blocks = axes.T @ y_train, axes.T @ rows
        else:
            sizes, axes = np.linalg.eigh(rows.T @ rows)
            self._coordinates = self._x @ axes
            self._t, self._blocks = axes.T @ (rows.T @ y_train), axes.T
        self._sizes = np.maximum(sizes, 0.0)

    def baseline(self, rows: np.ndarray) -> np.ndarray:
        """Predictions by the unpenalised columns alone."""
        return self._fixed[rows] @ self._gamma

    def coefficients(self, penalty: float) -> tuple[np.ndarray, np.ndarray]:
        """Of the coordinates [l, 1 + b], and what is taken off the blocks' own columns [c, b]."""
        d = 1 / (self._sizes + penalty)
        out = np.empty((len(d), 1 + len(self._places)))
        own = np.zeros((self._x.shape[1], len(self._places)))
        out[:, 0] = d * self._t
        for g, place in enumerate(self._places):
            block = self._blocks[:, place]
            shrunk = d[:, None] * block
            system = block.T @ shrunk
            if self._dual:
                system = np.eye(len(system)) - system
            weights = np.linalg.solve(system, shrunk.T @ self._t)
            taken = shrunk @ weights
            if self._dual:
                own[place, g], taken = weights, -taken
            out[:, 1 + g] = out[:, 0] - taken
        return out, own

    def predict(self, coefficients: tuple[np.ndarray, np.ndarray], rows: np.ndarray) -> np.ndarray:
        """Predictions [rows, 1 + b]."""
        shared, own = coefficients
        out = self._coordinates[rows] @ shared + self.baseline(rows)[:, None]
        if self._dual:
            out[:, 1:] -= self._x[rows] @ own
        return out
