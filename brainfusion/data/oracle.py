"""The best that retrieval can do on a paired linear-Gaussian cohort, and how far anyone got.

With canonical variates u and v of the two modalities and canonical correlations rho, the log
density ratio of a pair (its pointwise mutual information) is a sum over variates:

    s(u, v) = sum [ rho u v / (1 - rho^2)
                    - rho^2 (u^2 + v^2) / (2 (1 - rho^2)) - log(1 - rho^2) / 2 ]

By Bayes, ranking a gallery by s maximises the expected recall at every k and minimises the expected
rank; no score that looks at one pair at a time can beat it. Its mean over pairs is the mutual
information.

Shapes: n queries, m gallery entries, k canonical variates.
"""

from collections.abc import Sequence

import numpy as np

from brainfusion.runtime.errors import UserError

RECALL_AT = (1, 5, 10)


def pmi_scores(u: np.ndarray, v: np.ndarray, rho: np.ndarray | Sequence[float]) -> np.ndarray:
    """Log density ratio of every query with every gallery entry.

    Args:
        u: Canonical variates of the queries [n, k], unit variance.
        v: Canonical variates of the gallery [m, k], unit variance.
        rho: Canonical correlations [k], strictly between -1 and 1.

    Returns:
        Scores in nats [n, m]; all zero when every correlation is zero.
    """
    u, v, rho = _check(u, v, rho)
    slope, weight = rho / (1 - rho**2), rho**2 / (2 * (1 - rho**2))
    scores = (u * slope) @ v.T
    scores -= (u**2 @ weight)[:, None]
    scores -= v**2 @ weight
    scores -= 0.5 * np.log1p(-(rho**2)).sum()
    return scores


def inner_product_form(
    u: np.ndarray, v: np.ndarray, rho: np.ndarray | Sequence[float]
) -> tuple[np.ndarray, np.ndarray]:
    """Vectors whose inner products rank a gallery as `pmi_scores` does, for any exact or ANN index.

    Args:
        u: Canonical variates of the queries [n, k].
        v: Canonical variates of the gallery [m, k].
        rho: Canonical correlations [k].

    Returns:
        Query vectors [n, k + 1] and gallery vectors [m, k + 1]. Their products differ from
        `pmi_scores` by a constant in each row. For the other direction swap `u` and `v`.
    """
    u, v, rho = _check(u, v, rho)
    queries = np.concatenate([u * (rho / (1 - rho**2)), np.ones((len(u), 1))], axis=1)
    penalty = v**2 @ (rho**2 / (2 * (1 - rho**2)))
    return queries, np.concatenate([v, -penalty[:, None]], axis=1)


def mutual_information(rho: np.ndarray | Sequence[float]) -> float:
    """Mutual information in nats; log N minus an InfoNCE loss can reach no more in the mean."""
    return float(-0.5 * np.log1p(-(_check_rho(rho) ** 2)).sum())


def attainable(
    rho: np.ndarray | Sequence[float], *, n_gallery: int, n_draws: int = 4000, seed: int = 0
) -> dict[str, float]:
    """What the optimal score reaches in a gallery of `n_gallery`, by Monte Carlo.

    Args:
        rho: Canonical correlations.
        n_gallery: People in the gallery, the partner among them.
        n_draws: Queries drawn. They share galleries, `n_gallery` to each at most.
        seed: Of the draws.

    Returns:
        `auc` (the mean share of others that the partner outranks), `recall_at_1`, `recall_at_5`,
        `recall_at_10`, `median_rank`. Without any correlation these are the chance levels, exactly.
    """
    rho = _check_rho(rho)
    if n_gallery < 2:
        raise UserError(f"n_gallery={n_gallery}: a gallery needs 2 people or more.")
    rho = rho[rho != 0]
    if not len(rho):
        chance = {f"recall_at_{k}": min(k / n_gallery, 1.0) for k in RECALL_AT}
        return {"auc": 0.5, **chance, "median_rank": (n_gallery + 1) / 2}
    rng = np.random.default_rng(seed)
    drawn: list[np.ndarray] = []
    n_left = n_draws
    while n_left > 0:
        u = rng.standard_normal((n_gallery, len(rho)))
        v = rho * u + np.sqrt(1 - rho**2) * rng.standard_normal(u.shape)
        queries, gallery = inner_product_form(u, v, rho)
        n_queries = min(n_left, n_gallery)
        # A tile of scores stays under 64 MiB whatever the gallery.
        step = max(1, 2**23 // n_gallery)
        for start in range(0, n_queries, step):
            rows = np.arange(start, min(start + step, n_queries))
            drawn.append(_ranks(queries[rows] @ gallery.T, rows))
        n_left -= n_queries
    summary = _summary(np.concatenate(drawn), n_gallery)
    return {key: summary[key] for key in summary if key not in ("n_gallery", "standard_error")}


def matched_pair_metrics(scores: np.ndarray) -> dict[str, float]:
    """Retrieval of partner i by query i from a square score matrix [n, n]; ties count half.

    Returns:
        `auc`, `recall_at_1`, `recall_at_5`, `recall_at_10`, `median_rank`, `n_gallery` and
        `standard_error` (of the AUC, queries taken as independent).
    """
    if scores.ndim != 2 or scores.shape[0] != scores.shape[1] or len(scores) < 2:
        raise UserError(
            f"scores have shape {scores.shape}: expected a square matrix of 2 pairs or more, "
            "entry (i, i) for the pair of query i."
        )
    return _summary(_ranks(scores, np.arange(len(scores))), len(scores))


def both_directions(scores: np.ndarray) -> dict[str, float]:
    """`matched_pair_metrics` of rows and of columns, averaged; scores must be those of pairs."""
    rows, columns = matched_pair_metrics(scores), matched_pair_metrics(scores.T)
    mean = {key: (rows[key] + columns[key]) / 2 for key in rows}
    # The two directions look at the same people: their errors do not average out.
    mean["n_gallery"] = rows["n_gallery"]
    mean["standard_error"] = max(rows["standard_error"], columns["standard_error"])
    return mean


def check_below_oracle(
    auc: float, *, standard_error: float, oracle_auc: float, name: str = "the learner"
) -> None:
    """Hold a learner against its oracle.

    Raises:
        AssertionError: `auc` lies more than 3 standard errors above the oracle. That is no
            discovery but a bug or a leak: a test person seen in training, an id in the features,
            a gallery in the order of the queries.
    """
    if not auc <= oracle_auc + 3 * standard_error:
        raise AssertionError(
            f"{name} reached AUC {auc:.3f} +- {standard_error:.3f}, above its oracle's "
            f"{oracle_auc:.3f}: there is a bug or a leak."
        )


def _ranks(scores: np.ndarray, partners: np.ndarray) -> np.ndarray:
    """Rank of the partner in each row, 1 for the best, and how many others tie with it: [n, 2]."""
    own = scores[np.arange(len(scores)), partners][:, None]
    n_better = (scores > own).sum(axis=1)
    n_tied = (scores == own).sum(axis=1) - 1
    return np.stack([1 + n_better, n_tied], axis=1)


def _summary(ranks: np.ndarray, n_gallery: int) -> dict[str, float]:
    best, n_tied = ranks[:, 0], ranks[:, 1]
    middle = best + n_tied / 2
    outranked = 1 - (middle - 1) / (n_gallery - 1)
    # A tie is broken by a coin: the partner is within the first k with this probability.
    recall = {
        f"recall_at_{k}": float(np.clip((k + 1 - best) / (n_tied + 1), 0, 1).mean())
        for k in RECALL_AT
    }
    return {
        "auc": float(outranked.mean()),
        **recall,
        "median_rank": float(np.median(middle)),
        "n_gallery": n_gallery,
        "standard_error": float(outranked.std(ddof=1) / np.sqrt(len(outranked)))
        if len(outranked) > 1
        else 0.0,
    }


def _check(
    u: np.ndarray, v: np.ndarray, rho: np.ndarray | Sequence[float]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rho = _check_rho(rho)
    u, v = np.asarray(u, dtype=np.float64), np.asarray(v, dtype=np.float64)
    if u.ndim != 2 or v.ndim != 2 or not u.shape[1] == v.shape[1] == len(rho):
        raise UserError(
            f"canonical variates of shapes {u.shape} and {v.shape} with {len(rho)} correlations: "
            "expected [n, k], [m, k] and k."
        )
    return u, v, rho


def _check_rho(rho: np.ndarray | Sequence[float]) -> np.ndarray:
    values = np.asarray(rho, dtype=np.float64).reshape(-1)
    if not (np.abs(values) < 1).all():
        raise UserError("a canonical correlation is not strictly between -1 and 1.")
    return values
