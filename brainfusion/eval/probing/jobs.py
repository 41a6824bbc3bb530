"""Fitting: representations against targets and their permutations, and a row from what came out.

Shape legend: n people, c columns, g columns of logits, b permutations or bootstrap draws.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import numpy as np
import polars as pl

from brainfusion.eval.probing.knn import Neighbours, NeighbourSearch
from brainfusion.eval.probing.linear import Basis, FeatureSpace, RidgeSearch
from brainfusion.eval.probing.logistic import LogisticSearch, one_hot
from brainfusion.eval.probing.metrics import (
    BETTER,
    class_metrics,
    continuous_metrics,
    cox_calibration,
    reliability,
)
from brainfusion.eval.probing.stacking import stacked
from brainfusion.eval.probing.targets import Target
from brainfusion.eval.statistics import interval, p_value

PENALTIES = np.logspace(-2, 5, 15)
"""Of ridge, for features of mean squared norm 1; logistic regression takes every second."""

_MAX_CACHED = 2**27
"""Bytes of coordinates kept for a second pass; beyond that they are made again."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How targets are predicted and judged."""

    penalties: np.ndarray
    label_penalties: np.ndarray
    n_folds: int
    n_permutations: int
    n_bootstrap: int
    rechoose: bool
    """Whether the penalty of each permutation of labels is searched for."""
    seed: int


@dataclass(frozen=True, eq=False)
class People:
    """The people of a group of targets, and all that the representations share."""

    subjects: pl.DataFrame
    family: np.ndarray
    folds: np.ndarray
    moves: np.ndarray
    """Permutations [b, n]."""
    weights: np.ndarray
    """Bootstrap weight of each person [b, n]."""


Search = RidgeSearch | LogisticSearch | NeighbourSearch


@dataclass(eq=False)
class Block:
    """Targets that are fitted together: all continuous ones, or all of so many classes."""

    targets: list[Target]
    true: Search
    null: Search | None = None
    """Of permuted targets, the permutations of one target side by side."""
    kept: bool = False
    """Whether the permuted refits keep the penalties of the true targets."""

    @property
    def n_classes(self) -> int | None:
        """None for continuous targets."""
        return self.targets[0].n_classes

    def keep_penalties(self) -> None:
        """Once all pairs of folds were visited."""
        if self.kept and isinstance(self.null, LogisticSearch):
            n_moves = self.null.targets.shape[1] // len(self.targets)
            self.null.use(np.repeat(self.true.chosen, n_moves, axis=1))


@dataclass(frozen=True, kw_only=True, eq=False)
class Found:
    """Out-of-fold predictions of one target by one representation."""

    target: Target
    name: str
    model: str
    confounds: str
    true: tuple[np.ndarray, np.ndarray, np.ndarray]
    """Targets [n, 1], predictions and baseline [n, 1] or logits [n, 1, g]."""
    null: tuple[np.ndarray, np.ndarray, np.ndarray] | None
    """The same of permutations."""
    penalty: float | None


@dataclass(eq=False)
class Job:
    """One representation with one set of unpenalised columns, for some targets."""

    name: str
    fixed: np.ndarray
    targets: Sequence[Target]
    confounds: str
    people: People
    plan: Plan
    learners: np.ndarray | None = None
    """bool [n], who may be trained on; everyone if None."""
    neighbours: Neighbours | None = None
    """For a k-nearest-neighbour probe in place of a linear one."""
    blocks: list[Block] = field(init=False)

    def __post_init__(self) -> None:
        """Group the targets and permute them."""
        kinds: dict[int, list[Target]] = {}
        for target in self.targets:
            kinds.setdefault(target.n_classes or 0, []).append(target)
        self.blocks = [
            self._classes(members, kind) if kind else self._continuous(members)
            for kind, members in sorted(kinds.items())
        ]

    def _continuous(self, targets: list[Target]) -> Block:
        y = np.stack([t.values for t in targets], axis=1)
        moves, folds, grid = self.people.moves, self.people.folds, self.plan.penalties
        columns = None
        if len(moves):
            # Freedman-Lane: with the intercept alone this is a plain permutation.
            fitted = self.fixed @ (np.linalg.pinv(self.fixed, rcond=1e-10) @ y)
            parts = [fitted[:, [i]] + (y - fitted)[moves.T, i] for i in range(y.shape[1])]
            columns = np.concatenate(parts, axis=1).astype(np.float32)
        if self.neighbours is not None:
            null = None if columns is None else NeighbourSearch(self.neighbours, columns)
            return Block(targets, NeighbourSearch(self.neighbours, y), null)
        true = RidgeSearch(folds, self.fixed, y, grid, learners=self.learners)
        if columns is None:
            return Block(targets, true)
        return Block(targets, true, RidgeSearch(folds, self.fixed, columns, grid))

    def _classes(self, targets: list[Target], n_classes: int) -> Block:
        labels = np.stack([t.values for t in targets], axis=1)
        moves, folds, grid = self.people.moves, self.people.folds, self.plan.label_penalties
        columns = None
        if len(moves):
            columns = np.concatenate([t.values[moves.T] for t in targets], axis=1)
        if self.neighbours is not None:
            null = None
            if columns is not None:
                null = NeighbourSearch(self.neighbours, columns, n_classes=n_classes)
            true = NeighbourSearch(self.neighbours, labels, n_classes=n_classes)
            return Block(targets, true, null)
        true = LogisticSearch(
            folds, self.fixed, labels, grid, n_classes=n_classes, learners=self.learners
        )
        if columns is None:
            return Block(targets, true)
        null = LogisticSearch(
            folds, self.fixed, columns, grid,
            n_classes=n_classes, dtype=np.float32, tolerance=1e-5,
        )  # fmt: skip
        return Block(targets, true, null, kept=not self.plan.rechoose)

    def inner(self, pair: tuple[int, int], basis: Basis) -> None:
        """Visit the training set without two folds."""
        for block in self.blocks:
            block.true.inner(pair, basis)
            if block.null is not None and not block.kept:
                block.null.inner(pair, basis)

    def again(self, pair: tuple[int, int], basis: Basis) -> None:
        """Visit it again, with penalties chosen."""
        for block in self.blocks:
            for search in (block.true, block.null):
                if search is not None and not isinstance(search, NeighbourSearch):
                    search.again(pair, basis)

    def outer(self, fold: int, basis: Basis) -> None:
        """Visit the training set without one fold."""
        for block in self.blocks:
            block.true.outer(fold, basis)
            if block.null is not None:
                block.null.outer(fold, basis)

    def found(self) -> list[Found]:
        """One a target, once all folds were visited."""
        out = []
        for block in self.blocks:
            out += _found(block, self, block.true.predictions, _null_predictions(block))
        return out

    @property
    def model(self) -> str:
        """Ridge and logistic regression, or neighbours."""
        return "linear" if self.neighbours is None else "kNN"

    def penalty(self, block: Block, i: int) -> float:
        """The median over folds of what was chosen: a penalty, or a number of neighbours."""
        chosen = block.true.chosen[:, i]
        if self.neighbours is not None:
            return float(np.median(np.asarray(self.neighbours.counts)[chosen]))
        grid = self.plan.penalties if block.n_classes is None else self.plan.label_penalties
        return float(np.median(grid[chosen]))


def run(space: FeatureSpace, jobs: Sequence[Job], *, keep_inner: bool = False) -> None:
    """Visit every training set once for all jobs; twice for jobs that are stacked later."""
    pairs = list(combinations(range(space.n_folds), 2))
    cached: dict[tuple[int, int], Basis] = {}
    room = 8 * len(pairs) * space.x.shape[0] * min(space.x.shape) <= _MAX_CACHED
    for pair in pairs:
        basis = space.basis(pair)
        if keep_inner and room:
            cached[pair] = basis
        for job in jobs:
            job.inner(pair, basis)
    for job in jobs:
        for block in job.blocks:
            block.keep_penalties()
    for pair in pairs if keep_inner else []:
        basis = cached[pair] if pair in cached else space.basis(pair)
        for job in jobs:
            job.again(pair, basis)
    for fold in range(space.n_folds):
        basis = space.basis((fold,))
        for job in jobs:
            job.outer(fold, basis)


def fused(name: str, parts: Sequence[Job]) -> list[Found]:
    """The stack of jobs that kept their inner predictions, one a target."""
    first, out = parts[0], []
    for blocks in zip(*(job.blocks for job in parts), strict=True):
        block, folds = blocks[0], first.people.folds
        join = {"folds": folds, "n_classes": block.n_classes}
        true, _ = stacked([b.true for b in blocks], **join)  # pyright: ignore[reportArgumentType]
        nulls = [b.null for b in blocks if b.null is not None]
        null = stacked(nulls, **join)[0] if nulls else None  # pyright: ignore[reportArgumentType]
        out += _found(block, first, true, null, name=name, model="stacked")
    return out


def _null_predictions(block: Block) -> np.ndarray | None:
    return None if block.null is None else block.null.predictions


def _found(
    block: Block,
    job: Job,
    predictions: np.ndarray,
    null: np.ndarray | None,
    *,
    name: str = "",
    model: str = "",
) -> list[Found]:
    out = []
    for i, target in enumerate(block.targets):
        one, others = slice(i, i + 1), None
        if block.null is not None and null is not None:
            n_moves = len(job.people.moves)
            mine = slice(i * n_moves, (i + 1) * n_moves)
            others = block.null.targets[:, mine], null[:, mine], block.null.baseline[:, mine]
        true = block.true.targets[:, one], predictions[:, one], block.true.baseline[:, one]
        out.append(
            Found(
                target=target,
                name=name or job.name,
                model=model or job.model,
                confounds=job.confounds,
                true=true,
                null=others,
                penalty=None if model else job.penalty(block, i),
            )
        )
    return out


# -- a row ----------------------------------------------------------------------------------------


def main_draws(found: Found, people: People) -> tuple[float, np.ndarray]:
    """R2 or AUROC, and its bootstrap draws [b]."""
    compute = continuous_metrics if found.target.n_classes is None else class_metrics
    metric = "r2" if found.target.n_classes is None else "auroc"
    value = float(compute(*found.true, people.folds)[metric][0])
    if not len(people.weights):
        return value, np.empty(0)
    return value, compute(*found.true, people.folds, people.weights)[metric]


def row_of(found: Found, people: People) -> dict[str, Any]:
    """All metrics with intervals, p-values and chance levels; the main one in front."""
    target, folds, weights = found.target, people.folds, people.weights
    classes = target.n_classes
    compute = continuous_metrics if classes is None else class_metrics
    values, chance = compute(*found.true, folds), _chance(found)
    draws = compute(*found.true, folds, weights) if len(weights) else {}
    if classes == 2:
        labels, logits = found.true[0][:, 0], found.true[1][:, 0, 0].astype(np.float64)
        values |= cox_calibration(labels, logits)
        draws |= cox_calibration(labels, logits, weights) if len(weights) else {}
    null = compute(*found.null, folds) if found.null else {}
    metrics = []
    for name, value in values.items():
        metric = {"metric": name, "value": float(value[0]), "chance": chance.get(name)}
        if name in draws and np.isfinite(draws[name]).any():
            metric["ci_low"], metric["ci_high"] = interval(draws[name])
        if null and name in BETTER:
            metric["p_value"] = p_value(BETTER[name] * value[0], BETTER[name] * null[name])
        metrics.append(metric)
    row = {
        "target": target.name,
        "kind": target.kind,
        "features": found.name,
        "model": found.model,
        **metrics[0],
        "n": len(target.values),
        "n_missing": int((~target.known).sum()),
        "penalty": found.penalty,
        "confounds": found.confounds,
        "metrics": metrics,
    }
    if classes:
        error, row["reliability"] = reliability(
            found.true[0][:, 0], found.true[1][:, 0].astype(np.float64), weights
        )
        metrics.append({"metric": "expected_calibration_error", "value": error})
        row["n_classes"] = classes
        row["n_positive"] = int(target.values.sum()) if classes == 2 else None
    return row


def _chance(found: Found) -> dict[str, float]:
    """What a model that knows nothing of the features would get."""
    y, _, baseline = found.true
    if found.target.n_classes is None:
        return {"r2": 0.0, "r": 0.0, "mae": float(np.abs(y - baseline).mean())}
    n_classes = found.target.n_classes
    nothing = class_metrics(y, baseline, baseline, np.zeros(len(y), int))
    hot = one_hot(y, n_classes)
    return {
        "auroc": 0.5,
        "auprc": float(hot.mean(axis=0).mean()),
        "balanced_accuracy": 1 / n_classes,
        "log_loss": float(nothing["log_loss"][0]),
        "brier": float(nothing["brier"][0]),
    }
