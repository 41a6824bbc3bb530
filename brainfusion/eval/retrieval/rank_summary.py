"""Recall, ranks, reciprocal ranks and average precision of a ranking, with ties and chance levels.

Ties count as an encoder deserves. With `gt` negatives better and `eq` negatives equal to a query's
one positive, and random order among equals,

    E[hit@k] = clip((k - gt) / (eq + 1), 0, 1),     rank = 1 + gt + eq / 2
    AUC = 1 - (gt + eq / 2) / negatives

so a collapsed encoder scores chance in every metric. `_optimistic` puts positives before their
equals, `_pessimistic` behind them: a wide gap between the two says that scores tie. With several
positives the best one counts for recall, ranks and MRR; AUC is their mean; MAP counts each,

    AP = mean over positives p of (positives at or above p) / (entries at or above p),

and is the MRR where there is one positive. Chance levels are exact, for the numbers of positives at
hand.
"""

from typing import Any

import numpy as np

from brainfusion.eval.retrieval.ranking import Ranking, pair_precision

RECALL_AT = (1, 5, 10)
TIES = ("", "_optimistic", "_pessimistic")
"""Endings of a metric's keys by tie rule; the expected value has none."""


def rank_summary(ranking: Ranking) -> dict[str, Any]:
    """Every metric of one direction under the three tie rules, beside chance.

    Returns:
        `recall_at_k`, `median_rank`, `mean_rank`, `mrr`, `map`: each alone (expected over the
        orders of equals), with `_optimistic`, `_pessimistic` and `_chance`; `auc_optimistic`,
        `auc_pessimistic`, `chance` (the AUC's), `n_queries`, `n_gallery`. Ranks start at 1.
    """
    gt, eq, tied, n = ranking.gt, ranking.eq, ranking.n_tied, ranking.n_gallery
    ranks = (1 + gt + eq / (tied + 1), 1 + gt, 1 + gt + eq)
    reciprocal = (_expected_reciprocal(gt, eq, tied, n), 1 / ranks[1], 1 / ranks[2])
    out: dict[str, Any] = {"chance": 0.5}
    for at, ending in enumerate(TIES):
        for k in RECALL_AT:
            hit = expected_hit(k, gt, eq, tied) if not ending else ranks[at] <= k
            out[f"recall_at_{k}{ending}"] = float(hit.mean())
        out[f"median_rank{ending}"] = float(np.median(ranks[at]))
        out[f"mean_rank{ending}"] = float(ranks[at].mean())
        out[f"mrr{ending}"] = float(reciprocal[at].mean())
        out[f"map{ending}"] = float(ranking.average_precision[:, at].mean())
        if ending:
            out[f"auc{ending}"] = float(ranking.auc_bounds[:, at - 1].mean())
    return {**out, **_chance(n, ranking.n_positives), "n_queries": len(gt), "n_gallery": n}


def _chance(n: int, n_positives: np.ndarray) -> dict[str, float]:
    """What random order gives, mean over queries of these numbers of positives."""
    survival = _chance_survival(n, n_positives)
    found = 1 - survival
    above_half = np.flatnonzero(found > 0.5 + 1e-12)[0]
    at_half = np.flatnonzero(found >= 0.5 - 1e-12)[0]
    none = np.zeros(len(n_positives))
    precision = pair_precision(none, n - n_positives, none, n_positives, n)[0]
    return {
        **{f"recall_at_{k}_chance": float(found[min(k, n)]) for k in RECALL_AT},
        "median_rank_chance": float((at_half + above_half) / 2),
        "mean_rank_chance": float(survival[:-1].sum()),
        "mrr_chance": float((-np.diff(survival) / np.arange(1, n + 1)).sum()),
        "map_chance": float(precision.mean()),
    }


def expected_hit(k: int, gt: np.ndarray, eq: np.ndarray, tied: np.ndarray) -> np.ndarray:
    """Chance that one of `tied` positives, shuffled among `eq` equals, is in the first k."""
    places = np.clip(k - gt, 0, eq + tied)
    miss = np.ones(len(gt))
    for drawn in range(int(tied.max())):
        left = np.maximum(eq + tied - places - drawn, 0) / np.maximum(eq + tied - drawn, 1)
        miss *= np.where(drawn < tied, left, 1.0)
    return 1 - miss


def _expected_reciprocal(gt: np.ndarray, eq: np.ndarray, tied: np.ndarray, n: int) -> np.ndarray:
    """Mean of 1 / rank over the orders of equals."""
    harmonic = np.r_[0.0, np.cumsum(1 / np.arange(1, n + 1))]
    first, last = gt.astype(np.int64), (gt + eq).astype(np.int64) + 1
    out = (harmonic[last] - harmonic[first]) / (last - first)
    for i in np.flatnonzero((tied > 1) & (eq > 0)):
        n_level = int(eq[i] + tied[i])
        survival = _chance_survival(n_level, np.array([int(tied[i])]))
        out[i] = (-np.diff(survival) / (gt[i] + np.arange(1, n_level + 1))).sum()
    # Positives that tie only with one another: the first of them takes the first place.
    return np.where((tied > 1) & (eq == 0), 1 / (gt + 1), out)


def _chance_survival(n: int, n_positives: np.ndarray) -> np.ndarray:
    """P(no positive among the first k of n in random order), k = 0 to n; mean over queries."""
    out = np.zeros(n + 1)
    sizes, counts = np.unique(n_positives, return_counts=True)
    k = np.arange(n + 1)
    for size, count in zip(sizes, counts, strict=True):
        none = np.ones(n + 1)
        for drawn in range(int(size)):
            none *= np.maximum(n - k - drawn, 0) / (n - drawn)
        out += none * count / len(n_positives)
    return out
