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


def average_precision(scores: np.ndarray, positives: Sequence[int]) -> dict[str, float]:
    """Precision at the places of the positives: mean over the orders of equals, and its extremes.

    Every order of equals that differs in where positives stand is written out and counted.
    """
    orders: list[tuple[bool, ...]] = [()]
    for value in sorted(set(scores.tolist()), reverse=True):
        level = [j for j in range(len(scores)) if scores[j] == value]
        n_own = sum(j in positives for j in level)
        places = combinations(range(len(level)), n_own)
        marks = [tuple(i in place for i in range(len(level))) for place in places]
        orders = [order + mark for order in orders for mark in marks]
    precisions = []
    for order in orders:
        at = [sum(order[: i + 1]) / (i + 1) for i, own in enumerate(order) if own]
        precisions.append(sum(at) / len(at))
    return {
        "map": float(np.mean(precisions)),
        "map_optimistic": max(precisions),
        "map_pessimistic": min(precisions),
    }


def metrics(scores: np.ndarray, positives: Sequence[Sequence[int]]) -> dict[str, float]:
    """Every metric of one direction by definition; queries without positives stay out."""
    rows = [(scores[i], list(p)) for i, p in enumerate(positives) if len(p)]
    ranks = [rank_distribution(row, own) for row, own in rows]
    precision = [average_precision(row, own) for row, own in rows]
    out = {name: float(np.mean([one[name] for one in precision])) for name in precision[0]}
    # A hair for or against positives wins or loses their ties, and changes nothing else: tests have
    # scores that differ by 1 or more.
    for ending, hair in (("", 0.0), ("_optimistic", 0.25), ("_pessimistic", -0.25)):
        moved = [(row + hair * np.isin(np.arange(len(row)), own), own) for row, own in rows]
        out[f"auc{ending}"] = float(np.mean([query_auc(row, own) for row, own in moved]))
    bounds = {"_optimistic": [min(one)[0] for one in ranks], "_pessimistic": []}
    # All equals of the best positive that are negatives stand before it.
    bounds["_pessimistic"] = [max(r for r, _ in one) for one in ranks]
    for ending, best in bounds.items():
        out[f"median_rank{ending}"] = float(np.median(best))
        out[f"mean_rank{ending}"] = float(np.mean(best))
        out[f"mrr{ending}"] = float(np.mean([1 / rank for rank in best]))
        out |= {f"recall_at_{k}{ending}": float(np.mean(np.array(best) <= k)) for k in (1, 5, 10)}
    expected = [float(sum(r * w for r, w in distribution)) for distribution in ranks]
    out |= {"median_rank": float(np.median(expected)), "mean_rank": float(np.mean(expected))}
    out["mrr"] = float(np.mean([float(sum(w / r for r, w in one)) for one in ranks]))
    for k in (1, 5, 10):
        hits = [float(sum(w for r, w in one if r <= k)) for one in ranks]
        out[f"recall_at_{k}"] = float(np.mean(hits))
    return out


def turned(positives: Sequence[Sequence[int]], n_gallery: int) -> list[list[int]]:
    """The queries that each gallery entry belongs to."""
    return [[i for i, own in enumerate(positives) if j in own] for j in range(n_gallery)]


def permuted_auc(scores: np.ndarray, partner: Sequence[int]) -> float:
    """AUC if query i belonged to gallery entry `partner[i]`."""
    return metrics(scores, [[j] for j in partner])["auc"]
