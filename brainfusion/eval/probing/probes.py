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
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from brainfusion.eval.design import covariate_matrix, group_folds
from brainfusion.eval.probing.differences import Predictions, check_names, differences
from brainfusion.eval.probing.differences import adjust as adjust_comparisons
from brainfusion.eval.probing.jobs import (
    PENALTIES,
    Found,
    Job,
    People,
    Plan,
    fused,
    main_draws,
    row_of,
    run,
)
from brainfusion.eval.probing.knn import Neighbours
from brainfusion.eval.probing.learning_curve import learning_curves
from brainfusion.eval.probing.linear import FeatureSpace
from brainfusion.eval.probing.targets import (
    CONFOUNDS,
    Target,
    TargetError,
    check_classes,
    known_confounds,
    named_features,
    parse_target,
)
from brainfusion.eval.statistics import (
    block_permutations,
    bootstrap_weights,
    family_codes,
    fdr,
    interval,
)
from brainfusion.runtime.errors import UserError, nearest
from brainfusion.runtime.threads import one_thread

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["CONFOUNDS", "PENALTIES", "SCHEMA", "Extras", "TargetError", "probe", "tidy"]

CONFOUNDS_ONLY = "confounds only"

_MAX_VALUES = 4e7
"""People times permuted targets held at once; more targets are done in turns."""

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


@dataclass(frozen=True, kw_only=True)
class Extras:
    """Further rows, and columns of rows, that cost time."""

    fusion: Sequence[Sequence[str]] = ()
    """Names of features to join by late fusion (`eval.probing.stacking`), a row each."""
    pca: Sequence[str] = ()
    """Features to probe once more by their leading principal components."""
    n_pcs: int = 128
    """How many; at most half of the people in the smallest training set."""
    neighbours: bool = False
    """Whether all features are probed by k nearest neighbours as well."""
    learning_curve: Sequence[float] = ()
    """Shares of the training people to learn from, above 0 and below 1."""
    rechoose: bool = False
    """Whether the penalty is chosen again for each permutation of labels, as for numbers."""
    on_confounds: bool = field(default=True)
    """Whether fusion, too, gets a row with the confounds taken out."""
    compare: Sequence[tuple[str, str]] = ()
    """Pairs of rows, by name: is the first better than the second (`eval.probing.differences`)?"""


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
    _check(extras, named)
    known = known_confounds(subjects, confounds)
    check_names(extras.compare, _row_names(list(named), known, extras))
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
            rows += _probe_group(named, subjects, group, known, plan, extras)
    place = {target.name: i for i, target in enumerate(parsed)}
    rows.sort(key=lambda row: place[row["target"]])
    _adjust(rows)
    adjust_comparisons((row["features"], row["comparisons"]) for row in rows)
    empty = dict.fromkeys(SCHEMA)
    return pl.DataFrame([empty | row for row in rows], schema=SCHEMA, orient="row")


def _row_names(named: Sequence[str], confounds: Sequence[str], extras: Extras) -> list[str]:
    """The representations that get rows, but for those of principal components."""
    names = [*named, *(" + ".join(names) for names in extras.fusion)]
    if confounds:
        names += [CONFOUNDS_ONLY, *(f"{name} | confounds" for name in names)]
    return [*names, *(f"{name}, kNN" for name in named if extras.neighbours)]


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


def _check(extras: Extras, named: dict[str, np.ndarray]) -> None:
    for name in (*extras.pca, *(name for names in extras.fusion for name in names)):
        if name not in named:
            raise UserError(f"'{name}' is no name of features. {nearest(name, list(named))}")
    for names in extras.fusion:
        if len(set(names)) != len(names) or not 2 <= len(names) <= 6:
            raise UserError(
                f"fusion of {len(names)} features ({', '.join(names)}): expected 2 to 6 different "
                "ones."
            )
    if extras.n_pcs < 1:
        raise UserError(f"n_pcs={extras.n_pcs}: expected 1 or more.")
    for share in extras.learning_curve:
        if not 0 < share < 1:
            raise UserError(
                f"a learning curve at {share:g} of the training people: expected shares above 0 "
                "and below 1; the whole is there anyhow."
            )


def _probe_group(
    named: dict[str, np.ndarray],
    subjects: pl.DataFrame,
    targets: Sequence[Target],
    confounds: Sequence[str],
    plan: Plan,
    extras: Extras,
) -> list[dict[str, Any]]:
    """All rows of targets that are known for the same people."""
    known = targets[0].known
    people = _people(subjects.filter(pl.Series(known)), targets, plan)
    size = max(1, int(_MAX_VALUES / (len(people.folds) * (1 + plan.n_permutations))))
    rows: list[dict[str, Any]] = []
    for start in range(0, len(targets), size):
        group = _Group(targets[start : start + size], people, confounds, plan, extras)
        rows += group.rows({name: values[known] for name, values in named.items()})
    return rows


class _Group:
    """Targets that share people and are held in memory together."""

    def __init__(
        self,
        targets: Sequence[Target],
        people: People,
        confounds: Sequence[str],
        plan: Plan,
        extras: Extras,
    ) -> None:
        self.targets, self.people, self.plan, self.extras = targets, people, plan, extras
        self.ones = np.ones((len(people.folds), 1))
        self.kept: Predictions = {}
        self.by_confounds: dict[tuple[str, ...], list[Target]] = {}
        for target in targets:
            names = tuple(name for name in confounds if name != target.name)
            self.by_confounds.setdefault(names, []).append(target)
        self.matrices = {
            names: covariate_matrix(people.subjects, names) for names in self.by_confounds
        }

    def rows(self, named: dict[str, np.ndarray]) -> list[dict[str, Any]]:
        """Of all representations."""
        rows = [self._row(found) for found in self._confounds_only()]
        wanted = {name for names in self.extras.fusion for name in names}
        kept: dict[str, list[Job]] = {}
        for name, values in named.items():
            space = FeatureSpace(values, self.people.folds)
            jobs = self._jobs(name)
            run(space, jobs, keep_inner=name in wanted)
            mine = [self._row(found) for job in jobs for found in job.found()]
            if self.extras.learning_curve:
                self._add_curves(space, mine, loud=name == next(iter(named)))
            rows += mine
            rows += [self._row(found) for found in self._others(name, space)]
            if name in wanted:
                kept[name] = jobs
        for names in self.extras.fusion:
            rows += self._fused(names, kept)
        compared = differences(self.kept, self.extras.compare, self.people, seed=self.plan.seed)
        for row in rows:
            row["comparisons"] = compared.get((row["features"], row["target"]), [])
        return rows

    def _row(self, found: Found) -> dict[str, Any]:
        """Its row; its predictions are kept where they are to be compared."""
        if any(found.name in names for names in self.extras.compare):
            self.kept[found.name, found.target.name] = replace(found, null=None)
        return row_of(found, self.people)

    def _confounds_only(self) -> list[Found]:
        found: list[Found] = []
        for names, members in self.by_confounds.items():
            if self.matrices[names].shape[1]:
                job = self._job(CONFOUNDS_ONLY, members, ", ".join(names))
                run(FeatureSpace(self.matrices[names], self.people.folds), [job])
                found += job.found()
        return found

    def _jobs(self, name: str) -> list[Job]:
        """With the intercept alone, and with each set of confounds unpenalised."""
        jobs = [self._job(name, self.targets, "")]
        for names, members in self.by_confounds.items():
            if self.matrices[names].shape[1]:
                fixed = np.concatenate([self.ones, self.matrices[names]], axis=1)
                about = (f"{name} | confounds", members, ", ".join(names))
                jobs.append(self._job(*about, fixed=fixed))
        return jobs

    def _job(
        self,
        name: str,
        targets: Sequence[Target],
        confounds: str,
        *,
        fixed: np.ndarray | None = None,
        neighbours: Neighbours | None = None,
    ) -> Job:
        return Job(
            name,
            self.ones if fixed is None else fixed,
            targets,
            confounds,
            self.people,
            self.plan,
            neighbours=neighbours,
        )

    def _others(self, name: str, space: FeatureSpace) -> list[Found]:
        """By principal components and by neighbours."""
        found: list[Found] = []
        if name in self.extras.pca:
            sizes = np.sort(np.bincount(space.folds))
            n_pcs = min(self.extras.n_pcs, space.x.shape[1], int(sizes[:-2].sum()) // 2)
            jobs = self._jobs(f"{name}, {n_pcs} PCs")
            run(space.narrowed(n_pcs), jobs)
            found += [one for job in jobs for one in job.found()]
        if self.extras.neighbours:
            near = Neighbours(space)
            job = self._job(f"{name}, kNN", self.targets, "", neighbours=near)
            run(space, [job])
            found += job.found()
        return found

    def _add_curves(
        self, space: FeatureSpace, rows: Sequence[dict[str, Any]], *, loud: bool
    ) -> None:
        shares = self.extras.learning_curve
        curves = learning_curves(space, self.targets, self.people, self.plan, shares, loud=loud)
        n_train = len(self.people.folds) * (space.n_folds - 1) / space.n_folds
        for row in rows:
            if not row["confounds"]:
                whole = {key: row.get(key) for key in ("value", "ci_low", "ci_high")}
                last = {"n_train": round(n_train), **whole}
                row["learning_curve"] = [*curves[row["target"]], last]

    def _fused(self, names: Sequence[str], kept: dict[str, list[Job]]) -> list[dict[str, Any]]:
        rows = []
        n_jobs = len(kept[names[0]]) if self.extras.on_confounds else 1
        for i in range(n_jobs):
            parts = [kept[name][i] for name in names]
            label = " + ".join(names) + (" | confounds" if i else "")
            singles = [{one.target.name: one for one in job.found()} for job in parts]
            for found in fused(label, parts):
                row = self._row(found)
                row["metrics"].append(
                    _gain(found, [single[found.target.name] for single in singles], self.people)
                )
                rows.append(row)
        return rows


def _gain(found: Found, parts: Sequence[Found], people: People) -> dict[str, Any]:
    """What fusion adds to the best of its parts, with the interval of the paired bootstrap."""
    value, draws = main_draws(found, people)
    best, others = max((main_draws(part, people) for part in parts), key=lambda one: one[0])
    gain = {"metric": "gain_over_best_part", "value": value - best, "chance": 0.0}
    if len(draws):
        gain["ci_low"], gain["ci_high"] = interval(draws - others)
    return gain


def _people(subjects: pl.DataFrame, targets: Sequence[Target], plan: Plan) -> People:
    n = subjects.height
    families = subjects["family"].to_list() if "family" in subjects.columns else None
    site = subjects["site"].to_list() if "site" in subjects.columns else None
    family = family_codes(families, n)
    even = [
        (target.values == k).astype(np.float64)
        for target in targets
        for k in range(int(target.n_classes == 2), len(target.classes))
    ]
    if site is not None:
        labels = np.array([str(s) for s in site])
        even += [(labels == level).astype(np.float64) for level in np.unique(labels)]
    balance = np.stack(even, axis=1) if even else np.empty((n, 0))
    folds = group_folds(family, plan.n_folds, balance=balance, seed=plan.seed)
    for target in targets:
        check_classes(target, folds)
    # Within a site nobody could swap sites: where the site is predicted, families swap everywhere.
    blocks = None if any(target.name == "site" for target in targets) else site
    moves = block_permutations(n, families, blocks, plan.n_permutations, plan.seed)
    weights = bootstrap_weights(int(family.max()) + 1, plan.n_bootstrap, plan.seed)
    return People(subjects, family, folds, moves, weights[:, family].astype(np.float64))
