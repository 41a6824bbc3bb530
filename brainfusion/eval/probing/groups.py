"""All rows of targets that are known for the same people: representations, one after another.

Shape legend: n people, d width.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import polars as pl

from brainfusion.eval.design import covariate_matrix, group_folds
from brainfusion.eval.probing.differences import Predictions, differences
from brainfusion.eval.probing.extras import CONFOUNDS_ONLY, Extras
from brainfusion.eval.probing.jobs import Found, Job, People, Plan, fused, main_draws, row_of, run
from brainfusion.eval.probing.knn import Neighbours
from brainfusion.eval.probing.learning_curve import learning_curves
from brainfusion.eval.probing.linear import FeatureSpace
from brainfusion.eval.probing.targets import Target, check_classes
from brainfusion.eval.statistics import (
    block_permutations,
    bootstrap_weights,
    family_codes,
    interval,
)

_MAX_VALUES = 4e7
"""People times permuted targets held at once; more targets are done in turns."""


def probe_group(
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
