"""Which genes and which parcels a result rests on: hide one, and see how much is lost.

Of each test person the AUC is the share of other people whom the person's own partner outranks, the
mean of both directions. Hiding a unit (a gene, a parcel, a functional network) changes the vectors
of one modality; the drop of that share, person by person, is the unit's contribution. Whether a
drop is more than noise is a Wilcoxon signed-rank test over families (Wilcoxon 1945), one-sided, and
the units of one table are corrected together (Benjamini & Hochberg 1995).

Of a phenotype that a probe predicts from all genes, the loss is in squared errors, which of a rare
label are so skewed that their ranks say "greater" where their mean is not (of labels of 5% without
any link, the signed-rank test alone finds 15% at p < 0.05). There the mean must be above 0, too, by
a t-test, and the larger of the two p-values counts.

What is measured is what this model rests on. Two units that carry the same thing cover for each
other; a unit that the model does not use may still be linked.

Shape legend: n people, d width, u units.
"""

import math
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import polars as pl

from brainfusion.eval.probing.leave_out import BlocksOut
from brainfusion.eval.retrieval.ranking import rank_pairs
from brainfusion.eval.retrieval.score_table import ScoreTable
from brainfusion.eval.statistics import Labels, family_bootstrap, family_codes, fdr, interval
from brainfusion.runtime.errors import UserError


def person_auc(queries: np.ndarray, gallery: np.ndarray) -> np.ndarray:
    """Share of others whom a person's own partner outranks, ties half, mean of both directions.

    Args:
        queries: [n, d]; the score is the inner product of the rows as they are.
        gallery: [n, d], row-paired.

    Returns:
        float64 [n]; 0.5 on average where nothing is told apart.
    """
    n = len(queries)
    if gallery.shape != queries.shape or n < 2:
        raise UserError(
            f"vectors of shapes {queries.shape} and {gallery.shape}: expected two of one shape, "
            "paired row by row, and 2 people or more."
        )
    pairs = np.stack([np.arange(n)] * 2, axis=1)
    both = rank_pairs(ScoreTable.from_vectors(queries, gallery), pairs)
    return (both[0].auc + both[1].auc) / 2


def contributions(
    whole: tuple[np.ndarray, np.ndarray],
    hidden: Iterable[tuple[str, np.ndarray, np.ndarray]],
    *,
    families: Labels | None = None,
    n_bootstrap: int = 1000,
    seed: int = 0,
) -> pl.DataFrame:
    """How much AUC is lost with each unit hidden.

    Args:
        whole: Vectors [n, d] of both modalities of the test people with nothing hidden.
        hidden: Of each unit its name and both modalities' vectors with it hidden.
        families: Family of each person.
        n_bootstrap: Bootstrap samples of families for the intervals.
        seed: Of the bootstrap; the same samples for every unit.

    Returns:
        One row a unit, the largest drop first: unit, auc (with it hidden), drop, ci_low, ci_high,
        p_value, q_value.
    """
    before = person_auc(*whole)
    families_of = family_codes(families, len(before))
    rows = []
    for unit, queries, gallery in hidden:
        after = person_auc(queries, gallery)
        drops = before - after
        low, high = interval(family_bootstrap(drops, families, n_bootstrap, seed))
        rows.append(
            {
                "unit": unit,
                "auc": float(after.mean()),
                "drop": float(drops.mean()),
                "ci_low": low,
                "ci_high": high,
                "p_value": drop_p_value(drops, families_of),
            }
        )
    if not rows:
        raise UserError("no unit to hide: expected at least one gene, parcel or network.")
    return _ranked(rows)


def target_contributions(
    units: Sequence[str],
    y: np.ndarray,
    found: BlocksOut,
    *,
    families: Labels | None = None,
    n_bootstrap: int = 1000,
    seed: int = 0,
) -> tuple[float, pl.DataFrame]:
    """How much of a target's R2 is lost with each unit left out of the probe.

    R2 is of what the unpenalised columns leave unexplained (with an intercept alone, of all). A
    drop is the mean over people of what their squared error grows by, as a share of the mean
    squared error of the unpenalised columns, so that R2 with a unit less its drop is R2 without.

    Args:
        units: A name for each block of `found`.
        y: The target [n].
        found: Out-of-fold predictions with all units and without each.
        families: Family of each person.
        n_bootstrap: Bootstrap samples of families for the intervals, of the predictions as given.
        seed: Of the bootstrap.

    Returns:
        R2 with all units; and one row a unit, the largest drop first: unit, r2 (without it), drop,
        ci_low, ci_high, p_value, q_value.
    """
    families_of = family_codes(families, len(y))
    nothing, whole = (y - found.baseline) ** 2, (y - found.whole) ** 2
    size = float(nothing.mean()) or 1.0
    rows = []
    for unit, without in zip(units, found.without.T, strict=True):
        grown = (y - without) ** 2 - whole
        draws = family_bootstrap(np.stack([grown, nothing], axis=1), families, n_bootstrap, seed)
        low, high = interval(draws[:, 0] / np.maximum(draws[:, 1], 1e-300))
        rows.append(
            {
                "unit": unit,
                "r2": 1 - float((whole + grown).mean()) / size,
                "drop": float(grown.mean()) / size,
                "ci_low": low,
                "ci_high": high,
                "p_value": max(
                    drop_p_value(grown / size, families_of), mean_p_value(grown, families_of)
                ),
            }
        )
    return 1 - float(whole.mean()) / size, _ranked(rows)


def _ranked(rows: Sequence[dict[str, Any]]) -> pl.DataFrame:
    """Rows as a table with `q_value`, the largest drop first."""
    table = pl.DataFrame(rows)
    corrected = pl.Series("q_value", fdr(table["p_value"].to_numpy()))
    return table.with_columns(corrected).sort("drop", "unit", descending=[True, False])


def mean_p_value(drops: np.ndarray, families: np.ndarray) -> float:
    """One-sided t-test's p of drops [n] above 0, on the mean of each family [n]."""
    from scipy.stats import t

    means = _family_means(drops, families)
    error = means.std(ddof=1) / math.sqrt(len(means))
    return float(t.sf(means.mean() / error, len(means) - 1)) if error > 0 else 1.0


def _family_means(drops: np.ndarray, families: np.ndarray) -> np.ndarray:
    return np.bincount(families, weights=drops) / np.bincount(families)


def drop_p_value(drops: np.ndarray, families: np.ndarray) -> float:
    """One-sided Wilcoxon signed-rank p of drops [n] above 0, on the mean of each family [n]."""
    from scipy.stats import wilcoxon

    means = _family_means(drops, families)
    means[np.abs(means) < 1e-12] = 0.0
    if not means.any():
        return 1.0
    with warnings.catch_warnings():
        # With many ties scipy takes the normal approximation, and says so.
        warnings.simplefilter("ignore", UserWarning)
        test: Any = wilcoxon(means, alternative="greater", zero_method="zsplit")
    p = float(test.pvalue)
    return 1.0 if math.isnan(p) else p


def found(table: pl.DataFrame, level: float = 0.05) -> pl.DataFrame:
    """The units whose drop survives the correction at this false discovery rate."""
    return table.filter((pl.col("q_value") < level) & (pl.col("drop") > 0))
