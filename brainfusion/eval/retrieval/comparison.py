"""Is one alignment better than another on the same people? Paired comparison of retrieval.

A person enters the AUC of retrieval twice, as a query and as a competitor of all others; both count
in the paired test (`eval.paired`), by the same linear expansion (Hajek projection) as in
`retrieval`. Recall at k has no such expansion: its gallery is taken as given, and only queries
change sides.

Source: Benjamini and Hochberg 1995 (over pairs of models).

Shape legend: n people, d width, c statistics.
"""

from collections.abc import Mapping
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from brainfusion.eval.paired import paired_difference
from brainfusion.eval.retrieval.metrics import DIRECTIONS
from brainfusion.eval.retrieval.rank_summary import RECALL_AT, expected_hit
from brainfusion.eval.retrieval.ranking import Ranking, rank_pairs
from brainfusion.eval.retrieval.score_table import ScoreTable
from brainfusion.eval.statistics import (
    Labels,
    fdr,
)
from brainfusion.runtime.errors import UserError

Sides = tuple[ArrayLike, ArrayLike]
"""Queries [n, d] and gallery [n, d] of one model: row i of one belongs to row i of the other."""


def compare_retrieval(
    first: Sides,
    second: Sides,
    *,
    families: Labels | None = None,
    n_permutations: int = 9999,
    n_bootstrap: int = 2000,
    seed: int = 0,
    names: tuple[str, str] = ("first", "second"),
    tile: int = 1024,
) -> list[dict[str, Any]]:
    """Compare two models by how well they retrieve the same people.

    Args:
        first: Queries and gallery of one model; widths may differ between models.
        second: Those of the other, of the same people in the same order.
        families: Family of each person.
        n_permutations: Sign patterns drawn for `p_value`.
        n_bootstrap: Bootstrap samples of families for the interval.
        seed: Of both.
        names: What the models are called in the rows.
        tile: Size of a tile of scores.

    Returns:
        A row for each direction and metric ("auc", "recall_at_1", "recall_at_5", "recall_at_10"):
        `direction`, `metric`, `first`, `second` (names), `value_first`, `value_second`,
        `difference` (first minus second) with `ci_low`, `ci_high`, `standard_error`, the two-sided
        `p_value`, `n_permutations`, `n_queries`, `n_gallery`, `n_families`.

    Raises:
        UserError: The four sets of vectors are not of as many people.
    """
    sizes = [np.shape(side)[0] if np.ndim(side) else 0 for side in (*first, *second)]
    if len(set(sizes)) > 1:
        raise UserError(
            f"the models have {', '.join(map(str, sizes))} queries and gallery entries: a paired "
            "comparison needs the same people in the same order; select them first."
        )
    pairs = np.stack([np.arange(sizes[0])] * 2, axis=1)
    ranked = [
        rank_pairs(ScoreTable.from_vectors(*sides), pairs, tile=tile) for sides in (first, second)
    ]
    rows = []
    for side, direction in enumerate(DIRECTIONS):
        values, shares = (
            np.stack([kind(model[side]) for model in ranked]) for kind in (_values, _shares)
        )
        tests = paired_difference(
            shares[0], shares[1], families=families, n_permutations=n_permutations,
            n_bootstrap=n_bootstrap, seed=seed,
        )  # fmt: skip
        for at, (metric, test) in enumerate(zip(_METRICS, tests, strict=True)):
            mean = values[:, :, at].mean(axis=1)
            about = {"direction": direction, "metric": metric, "first": names[0]}
            about |= {"second": names[1], "value_first": float(mean[0])}
            row = {**about, "value_second": float(mean[1]), **test}
            rows.append({**row, "n_queries": sizes[0], "n_gallery": sizes[0]})
    return rows


def compare_models(
    models: Mapping[str, Sides], *, reference: str | None = None, **how: Any
) -> list[dict[str, Any]]:
    """`compare_retrieval` of several models: of all pairs, or of each with a reference.

    Args:
        models: Name -> queries and gallery, all of the same people.
        reference: The model that the others are compared with; None for all pairs.
        how: `families`, `n_permutations`, `n_bootstrap`, `seed`, as in `compare_retrieval`.

    Returns:
        Its rows with `q_value`: p adjusted for the false discovery rate over all rows of a metric.
    """
    if reference is not None and reference not in models:
        raise UserError(f"there is no model '{reference}' to compare with: {', '.join(models)}.")
    pairs = [
        (name, reference) for name in models if reference is not None and name != reference
    ] or list(combinations(models, 2))
    rows = [
        row
        for one, other in pairs
        for row in compare_retrieval(models[one], models[other], names=(one, other), **how)
    ]
    for metric in _METRICS:
        same = [row for row in rows if row["metric"] == metric]
        for row, q in zip(same, fdr([row["p_value"] for row in same]), strict=True):
            row["q_value"] = float(q)
    return rows


_METRICS = ("auc", *(f"recall_at_{k}" for k in RECALL_AT))


def _values(ranking: Ranking) -> np.ndarray:
    """What each query scores, [n, metrics]."""
    hits = [expected_hit(k, ranking.gt, ranking.eq, ranking.n_tied) for k in RECALL_AT]
    return np.stack([ranking.auc, *hits], axis=1)


def _shares(ranking: Ranking) -> np.ndarray:
    """Each person's part in each metric, [n, metrics]: means are those of `_values`.

    In the AUC that of a competitor is added.
    """
    values = _values(ranking)
    values[:, 0] += ranking.resisted - ranking.resisted.mean()
    return values
