"""Linear probes: what a representation knows about a trait, beyond age, sex, site and motion.

For each target three kinds of row: the confounds alone, the features, and the features with the
confounds taken out. Everything that is fitted (confound regression, penalty, model) is fitted in
the training people of an outer fold, families stay on one side, and all representations share the
folds.

Continuous targets: ridge; R2 against the mean of the training people (the coefficient of
determination, not a squared correlation; below 0 is worse than guessing the mean). For
"name | confounds", R2 is of what the confounds leave unexplained. Labels: L2 logistic regression,
of two classes or several; AUROC over pairs of people of one held-out fold, of several classes the
mean of each against the rest; "name | confounds" takes the confounds out of the features. The other
metrics are in `brainfusion.eval.probing.metrics`.

p-values: whole families of equal size exchange their targets within a site and everything is fitted
again, B times. Ridge: the penalty is chosen again in each. Logistic: each refit keeps the penalty
that the fold chose for the true labels, unless `Extras.rechoose`, in float32 and to 1e-5 nats.
"name | confounds" of a continuous target permutes what the confounds leave (Freedman and Lane
1983). The null is thus: within a site, families could swap targets without changing how well the
features predict them. `q_value` is the p-value adjusted for all targets of a representation
(Benjamini and Hochberg 1995). Intervals: bootstrap over families of the out-of-fold predictions,
the fitted models taken as given.

Shape legend: n people, d width.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from brainfusion.eval.probing.differences import adjust as adjust_comparisons
from brainfusion.eval.probing.differences import check_names
from brainfusion.eval.probing.extras import Extras, check_extras, row_names
from brainfusion.eval.probing.groups import probe_group
from brainfusion.eval.probing.jobs import PENALTIES, Plan
from brainfusion.eval.probing.targets import (
    CONFOUNDS,
    Target,
    TargetError,
    known_confounds,
    named_features,
    parse_target,
)
from brainfusion.eval.statistics import fdr
from brainfusion.runtime.errors import UserError
from brainfusion.runtime.threads import one_thread

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["CONFOUNDS", "PENALTIES", "SCHEMA", "Extras", "TargetError", "probe", "tidy"]

_METRIC = {
    "metric": pl.String,
    "value": pl.Float64,
    "ci_low": pl.Float64,
    "ci_high": pl.Float64,
    "p_value": pl.Float64,
    "chance": pl.Float64,
}

SCHEMA: dict[str, Any] = {
    "target": pl.String,
    "kind": pl.String,
    "features": pl.String,
    "model": pl.String,
    **_METRIC,
    "q_value": pl.Float64,
    "n": pl.Int64,
    "n_positive": pl.Int64,
    "n_classes": pl.Int64,
    "n_missing": pl.Int64,
    "penalty": pl.Float64,
    "confounds": pl.String,
    "metrics": pl.List(pl.Struct(_METRIC)),
    "reliability": pl.List(
        pl.Struct(
            {
                "predicted": pl.Float64,
                "observed": pl.Float64,
                "ci_low": pl.Float64,
                "ci_high": pl.Float64,
                "n": pl.Int64,
            }
        )
    ),
    "learning_curve": pl.List(
        pl.Struct(
            {
                "n_train": pl.Int64,
                "value": pl.Float64,
                "ci_low": pl.Float64,
                "ci_high": pl.Float64,
            }
        )
    ),
    "comparisons": pl.List(
        pl.Struct(
            {
                "against": pl.String,
                "difference": pl.Float64,
                "ci_low": pl.Float64,
                "ci_high": pl.Float64,
                "p_value": pl.Float64,
                "q_value": pl.Float64,
                "test": pl.String,
            }
        )
    ),
}


def probe(
    features: dict[str, np.ndarray] | np.ndarray,
    subjects: "pl.DataFrame | pd.DataFrame",
    targets: Sequence[str],
    *,
    confounds: Sequence[str] = CONFOUNDS,
    n_folds: int = 5,
    penalties: Sequence[float] | np.ndarray | None = None,
    n_permutations: int = 200,
    n_bootstrap: int = 500,
    seed: int = 0,
    extras: Extras | None = None,
) -> pl.DataFrame:
    """Predict targets from frozen features, by nested cross-validation.

    Args:
        features: Name -> [n, d], or one array. Columns are not scaled one by one.
        subjects: A row a person, in the order of the features, in polars or pandas. `family` keeps
            relatives in one fold, `site` is what permutations stay within; both may be absent.
        targets: Columns of `subjects`: numbers, two values (the higher one, in sorting order, is
            positive), or labels; people without a value are left out and counted.
        confounds: Columns to hold against the features. The target itself is left out of them. The
            defaults that `subjects` lacks are left out and said; a missing value is a level (or an
            indicator) of its own.
        n_folds: Outer folds; the inner ones are the others.
        penalties: Ridge penalties and 1 / C; `PENALTIES` if omitted.
        n_permutations: For `p_value`; 0 for none.
        n_bootstrap: For `ci_low` and `ci_high` (95 %); 0 for none.
        seed: Of folds, permutations and bootstrap.
        extras: Fusion, principal components, neighbours, learning curves; none if omitted.

    Returns:
        A row for each target and representation, columns as in `SCHEMA`: `value` is R2 or AUROC
        (`metric`), `chance` 0 or 0.5; `metrics` has all metrics, that one first; `penalty` is the
        median over folds (of neighbours, their number); `confounds` are those used. Of labels,
        `reliability` has predicted and observed shares; `comparisons` those of `extras.compare`.
    """
    if not isinstance(subjects, pl.DataFrame):
        subjects = pl.from_pandas(subjects)
    extras = extras or Extras()
    named = named_features(features, subjects.height)
    check_extras(extras, named)
    known = known_confounds(subjects, confounds)
    check_names(extras.compare, row_names(list(named), known, extras))
    parsed = [parse_target(subjects, name) for name in dict.fromkeys(targets)]
    grid = PENALTIES if penalties is None else np.asarray(penalties, np.float64)
    if n_folds < 3:
        raise UserError(f"n_folds={n_folds}: nested cross-validation needs 3 folds or more.")
    plan = Plan(
        penalties=grid,
        label_penalties=grid[::2] if penalties is None else grid,
        n_folds=n_folds,
        n_permutations=n_permutations,
        n_bootstrap=n_bootstrap,
        rechoose=extras.rechoose,
        seed=seed,
    )
    groups: dict[tuple[bytes, bool], list[Target]] = {}
    for target in parsed:
        groups.setdefault((target.known.tobytes(), target.name == "site"), []).append(target)
    rows: list[dict[str, Any]] = []
    with one_thread() if subjects.height <= 4000 else nullcontext():
        for group in groups.values():
            rows += probe_group(named, subjects, group, known, plan, extras)
    place = {target.name: i for i, target in enumerate(parsed)}
    rows.sort(key=lambda row: place[row["target"]])
    _adjust(rows)
    adjust_comparisons((row["features"], row["comparisons"]) for row in rows)
    empty = dict.fromkeys(SCHEMA)
    return pl.DataFrame([empty | row for row in rows], schema=SCHEMA, orient="row")


def tidy(table: pl.DataFrame) -> pl.DataFrame:
    """The table of `probe` with a row for each metric, without what is nested."""
    about = ["target", "kind", "features", "model", "n", "n_missing", "confounds", "metrics"]
    return table.select(about).explode("metrics").unnest("metrics")


def _adjust(rows: Sequence[dict[str, Any]]) -> None:
    """`q_value`: over the targets of each representation."""
    by_features: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_features.setdefault(row["features"], []).append(row)
    for members in by_features.values():
        p = [np.nan if row.get("p_value") is None else row["p_value"] for row in members]
        for row, q in zip(members, fdr(p), strict=True):
            row["q_value"] = None if np.isnan(q) else float(q)
