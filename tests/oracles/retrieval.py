"""Retrieval metrics by definition: slow, query by query, every order of equal scores counted."""

from collections.abc import Sequence
from fractions import Fraction
from itertools import combinations

import numpy as np


def rank_distribution(scores: np.ndarray, positives: Sequence[int]) -> list[tuple[int, Fraction]]:
    """The possible ranks (from 1) of the best positive of one query, with their probabilities.

    Entries of equal score stand in random order: all placings of the best positives among their
    equals are listed.
    """
    best = max(scores[p] for p in positives)
    negatives = [scores[j] for j in range(len(scores)) if j not in positives]
    n_better = sum(s > best for s in negatives)
    n_positive = sum(scores[p] == best for p in positives)
    n_level = n_positive + sum(s == best for s in negatives)
    placings = list(combinations(range(n_level), n_positive))
    return [(int(n_better) + min(p) + 1, Fraction(1, len(placings))) for p in placings]


def query_auc(scores: np.ndarray, positives: Sequence[int]) -> float:
    """Mean over positives of the share of negatives below, ties half."""
    negatives = [scores[j] for j in range(len(scores)) if j not in positives]
    wins = [
        [float(scores[p] > s) + 0.5 * float(scores[p] == s) for s in negatives] for p in positives
    ]
    return float(np.mean(wins))


def metrics(scores: np.ndarray, positives: Sequence[Sequence[int]]) -> dict[str, float]:
    """AUC, recall, ranks and MRR of one direction; queries without positives stay out."""
    rows = [(scores[i], list(p)) for i, p in enumerate(positives) if len(p)]
    ranks = [rank_distribution(row, own) for row, own in rows]
    expected = [float(sum(r * w for r, w in distribution)) for distribution in ranks]
    out = {
        "auc": float(np.mean([query_auc(row, own) for row, own in rows])),
        "median_rank": float(np.median(expected)),
        "mean_rank": float(np.mean(expected)),
        "mrr": float(np.mean([float(sum(w / r for r, w in one)) for one in ranks])),
    }
    for k in (1, 5, 10):
        hits = [float(sum(w for r, w in one if r <= k)) for one in ranks]
        out[f"recall_at_{k}"] = float(np.mean(hits))
        out[f"recall_at_{k}_optimistic"] = float(np.mean([min(one)[0] <= k for one in ranks]))
        # All equals of the best positive that are negatives stand before it.
        last = [max(r for r, _ in one) for one in ranks]
        out[f"recall_at_{k}_pessimistic"] = float(np.mean([rank <= k for rank in last]))
    return out


def turned(positives: Sequence[Sequence[int]], n_gallery: int) -> list[list[int]]:
    """The queries that each gallery entry belongs to."""
    return [[i for i, own in enumerate(positives) if j in own] for j in range(n_gallery)]


def permuted_auc(scores: np.ndarray, partner: Sequence[int]) -> float:
    """AUC if query i belonged to gallery entry `partner[i]`."""
    return metrics(scores, [[j] for j in partner])["auc"]
