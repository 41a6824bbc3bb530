"""Several trainings of one alignment, from the same start: candidates, then seeds.

Every combination of `choose_weight_decay` and `choose_dropout` is a member, trained with the seed
of the config; the best by the validation metric is trained again with the seeds that follow, and
the mean of these members' best weights is held against the best of them. Weights can be averaged
because all members begin at the same ones and stay near (model soups: Wortsman 2022, arXiv
2203.05482); from different random weights the mean is none of them.

All processes find the same: metrics come from rank 0, and weights are equal on all.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

from torch import Tensor

from brainfusion.alignment.config import AlignConfig
from brainfusion.alignment.member import Progress
from brainfusion.alignment.network import AlignmentModel
from brainfusion.alignment.validation import METRICS, Validation
from brainfusion.runtime.errors import UserError

Weights = dict[str, Tensor]

_OWN = ("weight_decay", "dropout", "seed")
"""In what members differ."""


def check_start(config: AlignConfig, begun: Mapping[str, float]) -> None:
    """Refuse members whose weights cannot be averaged.

    Raises:
        UserError: Several seeds, and no closed form for these modalities to start from.
    """
    if config.n_seeds > 1 and not begun:
        raise UserError(
            f"n_seeds={config.n_seeds}: no closed form was found for these modalities to start "
            "from, and an average of weights that were trained from random ones is none of them; "
            "use n_seeds=1."
        )


@dataclass(eq=False)
class Members:
    """Which members a run trains, and what became of those that are finished."""

    config: AlignConfig
    finished: list[dict[str, Any]] = field(default_factory=list)
    """Of each finished member its settings, how far it came, its row of step 0 (`start`) and that
    of its best look (`best`)."""
    weights: Weights = field(default_factory=dict)
    """Those of the best of them."""
    mean: Weights = field(default_factory=dict)
    """Mean of the best weights of the members that differ in their seeds alone."""

    @property
    def candidates(self) -> list[dict[str, float]]:
        """Weight decay and dropout of each candidate."""
        decays = self.config.choose_weight_decay or (self.config.weight_decay,)
        dropouts = self.config.choose_dropout or (self.config.dropout,)
        return [{"weight_decay": w, "dropout": d} for w, d in product(decays, dropouts)]

    @property
    def total(self) -> int:
        """Members from first to last."""
        return len(self.candidates) + self.config.n_seeds - 1

    @property
    def n_steps(self) -> int:
        """Steps that the finished members took, together."""
        return sum(row["n_steps"] for row in self.finished)

    @property
    def is_last(self) -> bool:
        """No member comes after the one that is next."""
        return len(self.finished) + 1 == self.total

    def where(self, text: str) -> str:
        """Add to `text` which member is next, unless there is one alone."""
        number, total = len(self.finished) + 1, self.total
        return f"{text}, member {number} of {total}" if total > 1 else text

    @property
    def best(self) -> int:
        """The finished member whose validation metric is best: the first of equals."""
        values = [row["best"][self._metric] for row in self.finished]
        return values.index(max(values))

    def next(self) -> AlignConfig | None:
        """The config of the member to train now; none when all are finished."""
        number, candidates = len(self.finished), self.candidates
        if number == self.total:
            return None
        if number < len(candidates):
            return replace(self.config, **candidates[number])
        return replace(
            self.config, **self.chosen, seed=self.config.seed + number - len(candidates) + 1
        )

    @property
    def kept(self) -> AlignConfig:
        """The config of the member whose weights, or whose seeds' mean, is kept."""
        row = self.finished[self.best]
        return replace(self.config, **{name: row[name] for name in _OWN})

    @property
    def chosen(self) -> dict[str, float]:
        """The best candidate, once all are finished."""
        values = [row["best"][self._metric] for row in self.finished[: len(self.candidates)]]
        return self.candidates[values.index(max(values))]

    def add(self, own: AlignConfig, progress: Progress) -> None:
        """Take a member, which was trained with `own`, for finished."""
        number = len(self.finished)
        row: dict[str, Any] = {
            "member": number,
            **{name: getattr(own, name) for name in _OWN},
            "n_steps": progress.step,
            "least_loss": progress.least_loss,
            "least_share": progress.least_share,
            "start": progress.start,
            "best": progress.best,
        }
        self.finished.append(row)
        if self.best == number:
            self.weights = progress.best_weights
        n_averaged = number - len(self.candidates) + 2
        if n_averaged == 1:
            self.mean = {key: value.clone() for key, value in self.weights.items()}
        elif n_averaged > 1:
            for key, value in progress.best_weights.items():
                mean = self.mean[key]
                self.mean[key] = mean + (value - mean) / n_averaged

    def outcome(self, model: AlignmentModel, look: Validation) -> "Outcome":
        """Put the weights to keep into the model: the best member's, or the mean of the seeds'.

        Args:
            model: Made by the config `kept`.
            look: Measures it on the validation people.
        """
        member = self.finished[self.best]
        row, weights = dict(member["best"]), self.weights
        of_mean: dict[str, float] = {}
        if self.config.n_seeds > 1:
            model.load_state_dict(self.mean)
            of_mean = look(model)
            if of_mean[self._metric] > row[self._metric]:
                scale = float(model.logit_scale.detach())
                row |= {**of_mean, "logit_scale": scale, "kept": "average over seeds"}
                weights = self.mean
        model.load_state_dict(weights)
        return Outcome(
            best=row,
            start=member["start"],
            n_steps=member["n_steps"],
            least_loss=member["least_loss"],
            least_share=member["least_share"],
            members=self._described(of_mean) if self.total > 1 else {},
        )

    def _described(self, of_mean: Mapping[str, float]) -> dict[str, Any]:
        """What there was to choose from, for the summary."""
        settings = ("member", *_OWN, "n_steps")
        rows = [
            {
                **{name: row[name] for name in settings},
                "best_step": row["best"]["step"],
                "kept": row["best"]["kept"],
                **{name: row["best"][name] for name in METRICS.values()},
            }
            for row in self.finished
        ]
        found: dict[str, Any] = {
            "member": self.best,
            "chosen": self.chosen,
            "chosen_by": self.config.early_stopping,
            "members": rows,
        }
        if of_mean:
            found["average_over_seeds"] = {name: of_mean[name] for name in METRICS.values()}
        return found

    @property
    def _metric(self) -> str:
        return METRICS[self.config.early_stopping]


@dataclass(frozen=True, kw_only=True, eq=False)
class Outcome:
    """What a run keeps."""

    best: dict[str, Any]
    """The row of metrics of what is kept: of an average over seeds its own look, and the best
    member's training loss."""
    start: dict[str, Any]
    """The best member's row of step 0; empty without a closed form."""
    n_steps: int
    """Of the best member."""
    least_loss: float | None
    """Least loss of the best member, in nats."""
    least_share: float | None
    """Least loss of the best member, as a share of that of chance."""
    members: dict[str, Any]
    """What it was chosen from, where there was more than one member."""
