"""What probes are judged by: for many columns at once, or for many bootstrap weights of one column.

Every metric is of out-of-fold predictions. AUROC and average precision compare people of one
held-out fold only, because scores of different models do not compare; several classes are each held
against the rest and averaged. Class decisions hold probabilities against the class shares in the
training set: a threshold of 0.5 never calls a rare class.

Calibration: the slope is that of a logistic regression of the outcome on the logits, 1 if
probabilities are as extreme as they should be (below 1: too extreme), the intercept that of one
with the slope held at 1, 0 if they are right on average (Cox 1958); of a continuous target, the
slope of the outcome on the prediction. The expected calibration error compares predicted and
observed shares in bins of equal counts. It has no interval: resampling adds noise to every bin, and
the error with it.

Shape legend: n people, c columns, g columns of logits, b bootstrap weights.
"""

from typing import Any

import numpy as np

from brainfusion.eval.probing.logistic import log_loss, one_hot, probabilities
from brainfusion.eval.statistics import interval, midranks

BETTER = {
    "r2": 1, "r": 1, "mae": -1, "auroc": 1, "auprc": 1, "balanced_accuracy": 1, "log_loss": -1,
    "brier": -1,
}  # fmt: skip
"""Metrics that get a p-value: 1 where more is better, -1 where less is."""

_MAX_BINS = 10
_MIN_IN_BIN = 20


def continuous_metrics(
    y: np.ndarray,
    predicted: np.ndarray,
    baseline: np.ndarray,
    folds: np.ndarray,
    weights: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
    """R2, r, MAE and calibration slope of each column [c], or of one column by weights [b].

    Args:
        y: [n, c].
        predicted: Out of fold, [n, c].
        baseline: By the unpenalised columns alone (the training mean, the confounds), [n, c]. R2 is
            of what it leaves; r and the slope are of what it leaves and what is added to it.
        folds: [n].
        weights: [b, n], with one column.
    """
    added, left = predicted - baseline, y - baseline
    error, spread = _total((left - added) ** 2, weights), _total(left**2, weights)
    both = np.zeros((3, len(error)))
    for fold in np.unique(folds):
        rows = folds == fold
        x, u, w = added[rows], left[rows], None if weights is None else weights[:, rows]
        size = np.maximum(_total(np.ones_like(x), w), 1e-12)
        x_sum, u_sum = _total(x, w), _total(u, w)
        both[0] += _total(x * x, w) - x_sum**2 / size
        both[1] += _total(u * u, w) - u_sum**2 / size
        both[2] += _total(x * u, w) - x_sum * u_sum / size
    size = np.sqrt(np.maximum(both[0] * both[1], 0))
    solid = both[0] > 1e-12 * np.maximum(both[1], 1e-300)
    return {
        "r2": 1 - error / spread,
        "r": np.divide(both[2], size, out=np.zeros_like(size), where=size > 1e-12),
        "mae": _total(np.abs(y - predicted), weights) / _total(np.ones_like(y), weights),
        "calibration_slope": np.divide(
            both[2], both[0], out=np.full_like(size, np.nan), where=solid
        ),
    }


def class_metrics(
    labels: np.ndarray,
    logits: np.ndarray,
    prior: np.ndarray,
    folds: np.ndarray,
    weights: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
    """AUROC, average precision, balanced accuracy, log loss, Brier: [c], or [b] for one column.

    Args:
        labels: Class numbers [n, c].
        logits: Out of fold, [n, c, g].
        prior: Logits of the class shares in each person's training set, [n, c, g].
        folds: [n].
        weights: [b, n], with one column.
    """
    n, c, g = logits.shape
    n_classes = max(g, 2)
    hot = one_hot(labels, n_classes)
    found = probabilities(logits)
    # Logits order as probabilities do where there are two classes, and do not saturate.
    scores = (logits if g == 1 else found).reshape(n, -1)
    flat = hot.reshape(n, -1)
    auroc = fold_auroc(scores, flat, folds, weights).reshape(-1, g) if weights is None else None
    if weights is None:
        precision = fold_average_precision(scores, flat, folds).reshape(-1, g)
    else:
        columns = [(scores[:, [j]], flat[:, [j]]) for j in range(g)]
        auroc = np.stack([fold_auroc(*one, folds, weights) for one in columns], axis=1)
        precision = np.stack(
            [fold_average_precision(*one, folds, weights) for one in columns], axis=1
        )
    assert auroc is not None
    called = (logits - prior).argmax(axis=-1) if g > 1 else logits[..., 0] > prior[..., 0]
    right = (called == labels).astype(np.float64)
    recalls = []
    for k in range(n_classes):
        mine = labels == k
        recalls.append(_total(right * mine, weights) / np.maximum(_total(mine, weights), 1e-12))
    squared = ((found - hot) ** 2).sum(axis=-1)
    size = _total(np.ones((n, c)), weights)
    return {
        "auroc": auroc.mean(axis=1),
        "auprc": precision.mean(axis=1),
        "balanced_accuracy": np.mean(recalls, axis=0),
        "log_loss": _total(log_loss(logits, labels), weights) / size,
        "brier": _total(squared, weights) / size,
    }


def fold_auroc(
    scores: np.ndarray, labels: np.ndarray, folds: np.ndarray, weights: np.ndarray | None = None
) -> np.ndarray:
    """AUROC over pairs of people of the same fold, [c]; with weights [b, n] of one column, [b].

    Args:
        scores: [n, c].
        labels: 0 and 1, [n, c].
        folds: [n].
        weights: How often each person counts.
    """
    if weights is not None:
        return _weighted_auroc(scores[:, 0], labels[:, 0] > 0, folds, weights)
    wins, pairs = np.zeros(scores.shape[1]), np.zeros(scores.shape[1])
    for fold in np.unique(folds):
        rows = folds == fold
        positive = labels[rows].T > 0
        n_positive = positive.sum(axis=1)
        rank_sum = (midranks(scores[rows].T) * positive).sum(axis=1, dtype=np.float64)
        wins += rank_sum - n_positive * (n_positive + 1) / 2
        pairs += n_positive * (positive.shape[1] - n_positive)
    return np.divide(wins, pairs, out=np.full(len(wins), 0.5), where=pairs > 0)


def _weighted_auroc(
    scores: np.ndarray, positive: np.ndarray, folds: np.ndarray, weights: np.ndarray
) -> np.ndarray:
    wins, pairs = np.zeros(len(weights)), np.zeros(len(weights))
    for fold in np.unique(folds):
        ahead = np.flatnonzero((folds == fold) & positive)
        behind = np.flatnonzero((folds == fold) & ~positive)
        difference = scores[ahead][:, None] - scores[behind]
        won = (difference > 0) + 0.5 * (difference == 0)
        wins += np.einsum("bn,bn->b", weights[:, ahead] @ won, weights[:, behind])
        pairs += weights[:, ahead].sum(axis=1) * weights[:, behind].sum(axis=1)
    return np.divide(wins, pairs, out=np.full(len(wins), np.nan), where=pairs > 0)


def fold_average_precision(
    scores: np.ndarray, labels: np.ndarray, folds: np.ndarray, weights: np.ndarray | None = None
) -> np.ndarray:
    """Mean precision at each positive among people of its fold, [c] or [b]; ties come together.

    Arguments as of `fold_auroc`. In one fold it is the average precision of scikit-learn.
    """
    total = np.zeros(scores.shape[1] if weights is None else len(weights))
    n_positive = np.zeros_like(total)
    for fold in np.unique(folds):
        rows = folds == fold
        order = np.argsort(-scores[rows], axis=0, kind="stable")
        ordered = np.take_along_axis(scores[rows], order, axis=0)
        place = np.broadcast_to(np.arange(len(ordered))[:, None], ordered.shape)
        ends = np.ones(ordered.shape, bool)
        ends[:-1] = ordered[1:] != ordered[:-1]
        last = np.where(ends, place, len(ordered) - 1)
        last = np.minimum.accumulate(last[::-1], axis=0)[::-1]
        hit = np.take_along_axis(labels[rows] > 0, order, axis=0).astype(np.float64)
        if weights is None:
            precision = np.cumsum(hit, axis=0) / (place + 1)
            total += (np.take_along_axis(precision, last, axis=0) * hit).sum(axis=0)
            n_positive += hit.sum(axis=0)
        else:
            w = weights[:, rows][:, order[:, 0]]
            w_hit = w * hit[:, 0]
            precision = np.cumsum(w_hit, axis=1) / np.maximum(np.cumsum(w, axis=1), 1e-12)
            total += (precision[:, last[:, 0]] * w_hit).sum(axis=1)
            n_positive += w_hit.sum(axis=1)
    return np.divide(total, n_positive, out=np.full(len(total), np.nan), where=n_positive > 0)


def cox_calibration(
    labels: np.ndarray, logits: np.ndarray, weights: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """Calibration slope and intercept of two classes, [1] or, by weights [b, n], [b].

    Args:
        labels: 0 and 1, [n].
        logits: [n].
        weights: How often each person counts.
    """
    w = np.ones((1, len(labels))) if weights is None else weights
    centre, spread = logits.mean(), logits.std()
    if spread < 1e-8:
        return {
            "calibration_slope": np.full(len(w), np.nan),
            "calibration_intercept": _offset(labels, logits, w),
        }
    x = (logits - centre) / spread
    level, slope = np.zeros(len(w)), np.full(len(w), spread)
    level += centre
    for _ in range(25):
        p = 1 / (1 + np.exp(-np.clip(level[:, None] + slope[:, None] * x, -30, 30)))
        left, curve = w * (labels - p), w * p * (1 - p)
        gradient = left.sum(axis=1), left @ x
        h00, h01, h11 = curve.sum(axis=1) + 1e-9, curve @ x, curve @ x**2 + 1e-9
        determinant = np.maximum(h00 * h11 - h01**2, 1e-12)
        step = (
            (h11 * gradient[0] - h01 * gradient[1]) / determinant,
            (h00 * gradient[1] - h01 * gradient[0]) / determinant,
        )
        # Newton's step, kept short: far from the minimum it can overshoot.
        level, slope = level + np.clip(step[0], -2, 2), slope + np.clip(step[1], -2, 2)
        if max(np.abs(step[0]).max(), np.abs(step[1]).max()) < 1e-9:
            break
    return {
        "calibration_slope": slope / spread,
        "calibration_intercept": _offset(labels, logits, w),
    }


def _offset(labels: np.ndarray, logits: np.ndarray, w: np.ndarray) -> np.ndarray:
    """What has to be added to all logits for the expected count to be the observed one, [b]."""
    shift = np.zeros(len(w))
    for _ in range(50):
        p = 1 / (1 + np.exp(-np.clip(logits + shift[:, None], -30, 30)))
        slope = np.maximum((w * p * (1 - p)).sum(axis=1), 1e-9)
        step = np.clip((w * (labels - p)).sum(axis=1) / slope, -2, 2)
        shift += step
        if np.abs(step).max() < 1e-9:
            break
    return shift


def reliability(
    labels: np.ndarray, logits: np.ndarray, weights: np.ndarray
) -> tuple[float, list[dict[str, Any]]]:
    """The expected calibration error, and predicted against observed shares in bins.

    Args:
        labels: Class numbers [n].
        logits: [n, g]. Of several classes, the likeliest is judged.
        weights: Bootstrap weights [b, n]; b = 0 for no intervals.

    Returns:
        The error, and for each bin `predicted`, `observed`, `ci_low`, `ci_high`, `n`.
    """
    p = probabilities(logits)
    if p.shape[1] == 1:
        sure, right = p[:, 0], (labels > 0).astype(np.float64)
    else:
        sure, right = p.max(axis=1), (p.argmax(axis=1) == labels).astype(np.float64)
    n_bins = int(np.clip(len(sure) // _MIN_IN_BIN, 1, _MAX_BINS))
    edges = np.unique(np.quantile(sure, np.arange(1, n_bins) / n_bins))
    bins, rows, error = np.searchsorted(edges, sure, side="left"), [], 0.0
    for number in np.unique(bins):
        mine = bins == number
        predicted, observed = float(sure[mine].mean()), float(right[mine].mean())
        error += mine.sum() * abs(predicted - observed) / len(sure)
        row = {"predicted": predicted, "observed": observed, "ci_low": None, "ci_high": None}
        if len(weights):
            size = weights[:, mine].sum(axis=1)
            draws = np.divide(
                weights[:, mine] @ right[mine], size, out=np.full(len(size), np.nan), where=size > 0
            )
            row["ci_low"], row["ci_high"] = interval(draws)
        rows.append(row | {"n": int(mine.sum())})
    return float(error), rows


def _total(values: np.ndarray, weights: np.ndarray | None) -> np.ndarray:
    """Sums of columns [c], or of the one column by weights [b]; float64."""
    if weights is None:
        return values.sum(axis=0, dtype=np.float64)
    return weights @ values[:, 0].astype(np.float64)
