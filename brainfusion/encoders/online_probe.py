"""A cheap probe while an encoder trains: does what it learns help to predict a trait?

Ridge regression from features of training people's first windows, its penalty by leave-one-out,
scored on validation people: Pearson r for numbers, the area under the ROC curve for two groups. It
says whether training helps, on a few hundred recordings; `brainfusion probe` says how much.

Shape legend: n recordings, f features.
"""

import numpy as np
import polars as pl
import torch
from jaxtyping import Float

from brainfusion.data.cohort import Cohort
from brainfusion.encoders.brainlm_image import BrainLMImage
from brainfusion.encoders.objectives import Objective
from brainfusion.encoders.pretrain_config import PretrainConfig
from brainfusion.encoders.pretrain_inputs import PretrainInputs
from brainfusion.runtime.distributed import Ranks, gather_rows
from brainfusion.runtime.errors import UserError, nearest
from brainfusion.runtime.logs import say

DEFAULT_COLUMNS = ("age", "sex")
PENALTIES = np.logspace(-4, 4, 17)
"""Of the ridge, as shares of the kernel's mean eigenvalue."""
MIN_PEOPLE = 8
_CHUNK = 16


class OnlineProbe:
    """Probes of one run; recordings and targets are chosen once."""

    def __init__(
        self,
        settings: PretrainConfig,
        inputs: PretrainInputs,
        cohort: Cohort,
        objective: Objective,
        ranks: Ranks,
    ) -> None:
        watch = settings.watch
        self._objective, self._ranks = objective, ranks
        image = isinstance(objective.encoder, BrainLMImage)
        self._pooling = "mean" if image else watch.probe_pooling
        n_ranks = ranks.world_size
        picked = np.random.default_rng(settings.run.seed).permutation(inputs.train_rows)
        sides = picked[: watch.n_probe], np.asarray(inputs.validation_rows[: watch.n_probe])
        train, test = (rows[: len(rows) - len(rows) % n_ranks] for rows in sides)
        self._n_train = len(train)
        rows = np.concatenate([train, test])
        self._targets: dict[str, tuple[np.ndarray, bool]] = {}
        for column in watch.probe_columns or DEFAULT_COLUMNS:
            if column not in cohort.subjects.columns:
                if watch.probe_columns:
                    raise UserError(
                        f"--probe-columns {column}: the people's table has no such column. "
                        f"{nearest(column, cohort.subjects.columns)}"
                    )
                continue
            values, binary = _numbers(cohort, column, rows)
            known = np.isfinite(values)
            enough = all(
                known[side].sum() >= MIN_PEOPLE and len(np.unique(values[side][known[side]])) > 1
                for side in (slice(0, self._n_train), slice(self._n_train, None))
            )
            if enough:
                self._targets[column] = values, binary
            else:
                say(
                    f"no online probe of '{column}': expected numbers or two groups, and "
                    f"{MIN_PEOPLE} people on each side with values that differ."
                )
        if not self._targets:
            return
        mine = rows[ranks.rank :: n_ranks]
        self._bold = torch.from_numpy(np.stack([inputs.first_window(int(row)) for row in mine]))

    @torch.no_grad()
    def __call__(self) -> dict[str, float]:
        """`probe_<column>_r` for each column of numbers, `probe_<column>_auc` of two groups."""
        if not self._targets:
            return {}
        self._objective.eval()
        parts = [
            self._objective.pooled(part.to(self._ranks.device), self._pooling)
            for part in self._bold.split(_CHUNK)
        ]
        self._objective.train()
        x = gather_rows(torch.cat(parts).double(), self._ranks).cpu().numpy()
        return {
            f"probe_{column}_{'auc' if binary else 'r'}": score(
                x, values, n_train=self._n_train, binary=binary
            )
            for column, (values, binary) in self._targets.items()
        }


def score(x: Float[np.ndarray, "n f"], y: np.ndarray, *, n_train: int, binary: bool) -> float:
    """Fit a ridge on the first `n_train` rows, score it on the others; NaN in `y` is left out.

    Returns:
        Pearson r, or for a binary `y` (0 and 1) the area under the ROC curve; 0 or 0.5 where the
        prediction is constant.
    """
    known = np.isfinite(y)
    train, test = known.copy(), known.copy()
    train[n_train:] = False
    test[:n_train] = False
    level, scale = x[train].mean(0), x[train].std(0)
    x = (x - level) / np.where(scale > 1e-12 * np.abs(level).max(initial=1e-300), scale, np.inf)
    predicted = _ridge(x[train], y[train], x[test])
    return _auc(predicted, y[test] > 0.5) if binary else _correlation(predicted, y[test])


def _ridge(x: np.ndarray, y: np.ndarray, x_test: np.ndarray) -> np.ndarray:
    """Ridge in its dual form, the penalty chosen by the closed form of leave-one-out."""
    level = y.mean()
    values, vectors = np.linalg.eigh(x @ x.T)
    values = values.clip(min=0.0)
    turned = vectors.T @ (y - level)
    best, weights = np.inf, np.zeros(len(y))
    for penalty in PENALTIES * max(values.mean(), 1e-300):
        shrunk = values / (values + penalty)
        leverage = (vectors**2 @ shrunk) + 1.0 / len(y)
        left = (y - level - vectors @ (shrunk * turned)) / np.maximum(1.0 - leverage, 1e-9)
        if (error := float(np.square(left).sum())) < best:
            best, weights = error, vectors @ (turned / (values + penalty))
    return level + x_test @ (x.T @ weights)


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a - a.mean(), b - b.mean()
    size = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / size if size > 1e-12 * len(a) else 0.0


def _auc(predicted: np.ndarray, positive: np.ndarray) -> float:
    """Share of pairs in the right order; ties count half."""
    gap = predicted[positive][:, None] - predicted[~positive][None, :]
    return float((gap > 0).mean() + 0.5 * (gap == 0).mean())


def _numbers(cohort: Cohort, column: str, rows: np.ndarray) -> tuple[np.ndarray, bool]:
    """A column's value for each recording as float64 (NaN: unknown), and whether it is binary."""
    subjects = cohort.recordings.index["subject"][rows]
    table = cohort.subjects.select("subject", column)
    people = pl.DataFrame({"subject": subjects})
    values = people.join(table, on="subject", how="left", maintain_order="left")[column]
    kinds = sorted(map(str, values.drop_nulls().unique().to_list()))
    if values.dtype.is_numeric() and len(kinds) != 2:
        return values.cast(pl.Float64).fill_null(float("nan")).to_numpy(), False
    if len(kinds) != 2:  # words that are neither numbers nor two groups
        return np.full(len(values), np.nan), False
    found = [np.nan if value is None else float(str(value) == kinds[1]) for value in values]
    return np.array(found), True
