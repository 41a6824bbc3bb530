"""Late fusion: representations joined by what their probes predict, not by their columns.

Every representation predicts the training people of an outer fold by models that have not seen
them (the inner folds); weights of 0 or more (Breiman 1996, Machine Learning 24) then say how much
each adds to the baseline: to the training mean, or to the logits of the class shares,

    prediction = baseline + sum_m w_m (prediction_m - baseline),   w >= 0

so that a representation which knows nothing gets 0, and two that know different things may both
count in full. The outer fold is predicted with the same weights. Permutations repeat all of it.

Shape legend: n people, c columns, g columns of logits, m representations, k folds.
"""

from collections.abc import Sequence
from itertools import combinations
from typing import Protocol

import numpy as np

from brainfusion.eval.probing.logistic import one_hot, probabilities

_MOST = 3.0
"""Weights above this only chase separable classes."""


class Search(Protocol):
    """A finished nested search that kept its inner predictions."""

    targets: np.ndarray
    predictions: np.ndarray
    baseline: np.ndarray
    inner_predictions: np.ndarray | None
    inner_baseline: np.ndarray | None


def stacked(
    parts: Sequence[Search], folds: np.ndarray, *, n_classes: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """Join finished searches of the same targets.

    Args:
        parts: One a representation.
        folds: [n].
        n_classes: None for continuous targets.

    Returns:
        Out-of-fold predictions [n, c] or logits [n, c, g], and the weights [k, m, c].
    """
    first = parts[0]
    out = first.baseline.copy()
    n_folds = int(folds.max()) + 1
    weights = np.zeros((n_folds, len(parts), first.targets.shape[1]))
    for fold in range(n_folds):
        train, rows = folds != fold, folds == fold
        assert first.inner_baseline is not None
        offset = first.inner_baseline[fold][train]
        added = [_inner(part, fold)[train] - offset for part in parts]
        y = first.targets[train]
        if n_classes is None:
            weights[fold] = _least_squares(added, y - offset)
        else:
            weights[fold] = _least_log_loss(added, offset, one_hot(y, n_classes, offset.dtype))
        for part, w in zip(parts, weights[fold], strict=True):
            w = w.astype(out.dtype)
            gained = part.predictions[rows] - first.baseline[rows]
            out[rows] += gained * (w if n_classes is None else w[:, None])
    return out, weights


def _inner(part: Search, fold: int) -> np.ndarray:
    assert part.inner_predictions is not None
    return part.inner_predictions[fold]


def _least_squares(added: Sequence[np.ndarray], left: np.ndarray) -> np.ndarray:
    hessian = np.stack([[_sum(a * b) for b in added] for a in added])
    return _nonnegative(hessian, np.stack([_sum(a * left) for a in added]))


def _least_log_loss(
    added: Sequence[np.ndarray], offset: np.ndarray, hot: np.ndarray, *, n_steps: int = 12
) -> np.ndarray:
    """Newton steps; each minimises the quadratic around the last weights without negative ones."""
    w = np.full((len(added), offset.shape[1]), 0.5)
    for _ in range(n_steps):
        p = probabilities(
            offset + sum(a * v[:, None].astype(a.dtype) for a, v in zip(added, w, strict=True))
        )
        gradient = np.stack([_sum(a * (hot - p)) for a in added])
        if p.shape[-1] == 1:
            curved = [p * (1 - p) * a for a in added]
        else:
            curved = [p * (a - (p * a).sum(axis=-1, keepdims=True)) for a in added]
        hessian = np.stack([[_sum(a * b) for b in curved] for a in added])
        target = gradient + np.einsum("mlc,lc->mc", hessian, w)
        step = np.minimum(_nonnegative(hessian, target), _MOST) - w
        w += step
        if np.abs(step).max(initial=0) < 1e-6:
            break
    return w


def _nonnegative(hessian: np.ndarray, gradient: np.ndarray) -> np.ndarray:
    """The w >= 0 [m, c] of least w'Hw / 2 - g'w: the best of all sets of weights that are not 0."""
    m, c = gradient.shape
    h, g = np.moveaxis(hessian, -1, 0), gradient.T
    best, out = np.zeros(c), np.zeros((c, m))
    ridge = 1e-9 * np.einsum("cmm->c", h) + 1e-12
    for size in range(1, m + 1):
        for chosen in combinations(range(m), size):
            some = h[:, chosen][:, :, chosen] + ridge[:, None, None] * np.eye(size)
            w = np.linalg.solve(some, g[:, chosen, None])[..., 0]
            value = -0.5 * (g[:, chosen] * w).sum(axis=1)
            better = (w >= 0).all(axis=1) & (value < best)
            best = np.where(better, value, best)
            row = np.zeros((c, m))
            row[:, chosen] = w
            out[better] = row[better]
    return out.T


def _sum(values: np.ndarray) -> np.ndarray:
    """Over people and columns of logits, [c]."""
    axes = (0,) if values.ndim == 2 else (0, 2)
    return values.sum(axis=axes, dtype=np.float64)
