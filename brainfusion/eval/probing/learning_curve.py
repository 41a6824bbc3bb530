"""Learning curves: what a representation predicts when trained on a share of the people.

Gains of a representation show where few people are there to learn from. Whole families are taken
from every fold, a smaller share is part of a larger one, and the penalty is chosen again at each
size; everyone of the outer fold is predicted, so that all points are of the same people. Below the
whole sample, three draws of families are averaged.

Shape legend: n people, b bootstrap draws.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any

import numpy as np

from brainfusion.eval.probing.jobs import Job, People, Plan, main_draws, run
from brainfusion.eval.probing.linear import FeatureSpace
from brainfusion.eval.probing.targets import Target
from brainfusion.eval.statistics import interval
from brainfusion.runtime.logs import say

N_DRAWS = 3
"""Draws of families that a point is the mean of."""


def learners_of(people: People, share: float, seed: int) -> np.ndarray:
    """A share of each fold's families, at least one: bool [n]; larger shares contain smaller."""
    out = np.zeros(len(people.folds), bool)
    rng = np.random.default_rng([seed, 5])
    for fold in range(int(people.folds.max()) + 1):
        families = rng.permutation(np.unique(people.family[people.folds == fold]))
        kept = families[: max(1, round(share * len(families)))]
        out |= (people.folds == fold) & np.isin(people.family, kept)
    return out


def learning_curves(
    space: FeatureSpace,
    targets: Sequence[Target],
    people: People,
    plan: Plan,
    shares: Sequence[float],
    *,
    loud: bool = True,
) -> dict[str, list[dict[str, Any]]]:
    """R2 or AUROC of each target by the number of people to learn from.

    Args:
        space: Of the features.
        targets: Known for all of `people`.
        people: With folds and bootstrap weights.
        plan: With the penalties.
        shares: Of the training people, above 0 and below 1.
        loud: Whether points that cannot be made are said; they are the same for all features.

    Returns:
        For each target, points with `n_train` (mean over folds), `value`, `ci_low`, `ci_high`. A
        share that leaves a training set without one of the classes has no point, which is said.
    """
    out: dict[str, list[dict[str, Any]]] = {target.name: [] for target in targets}
    nobody = replace(people, moves=people.moves[:0])
    ones = np.ones((len(people.folds), 1))
    for share in sorted(shares):
        found: dict[str, list[tuple[float, np.ndarray]]] = {}
        sizes = []
        for draw in range(N_DRAWS):
            learners = learners_of(people, share, plan.seed + 1000 * draw)
            able = [t for t in targets if _can_learn(t, people.folds, learners)]
            if not able:
                continue
            job = Job("", ones, able, "", nobody, plan, learners=learners)
            run(space.among(learners), [job])
            n_folds = int(people.folds.max()) + 1
            sizes.append(learners.sum() * (n_folds - 1) / n_folds)
            for one in job.found():
                found.setdefault(one.target.name, []).append(main_draws(one, people))
        short = [name for name in out if len(found.get(name, [])) < N_DRAWS]
        if short and loud:
            say(
                f"learning curve: no point at {share:.0%} for {', '.join(short)}: a training set "
                "of so few people lacks a class."
            )
        for name, draws in found.items():
            if name not in short:
                out[name].append(_point(draws, float(np.mean(sizes))))
    return out


def _point(draws: Sequence[tuple[float, np.ndarray]], n_train: float) -> dict[str, Any]:
    point: dict[str, Any] = {
        "n_train": round(n_train),
        "value": float(np.mean([value for value, _ in draws])),
        "ci_low": None,
        "ci_high": None,
    }
    mean = np.mean([boot for _, boot in draws], axis=0)
    if len(mean):
        point["ci_low"], point["ci_high"] = interval(mean)
    return point


def _can_learn(target: Target, folds: np.ndarray, learners: np.ndarray) -> bool:
    """Whether every training set, the inner ones too, has every class, or two different values."""
    for pair in combinations(range(int(folds.max()) + 1), 2):
        values = target.values[~np.isin(folds, pair) & learners]
        wanted = target.n_classes or 2
        if len(np.unique(values)) < wanted:
            return False
    return True
