"""One training of an alignment from its start: model, moving average, optimizer, how far it is.

Batches, dropout and the learning rate are functions of the seed and the step, so that `Progress`,
the weights and the optimizer's state are all that a stopped training needs to go on.
"""

import copy
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from brainfusion.alignment.batches import Batches
from brainfusion.alignment.config import AlignConfig
from brainfusion.alignment.finetuning.grad_cache import average_gradients
from brainfusion.alignment.network import AlignmentModel
from brainfusion.alignment.objective import BatchLoss, Objective
from brainfusion.alignment.prepare import make_optimizer
from brainfusion.alignment.validation import METRICS, Validation
from brainfusion.runtime.distributed import Ranks
from brainfusion.runtime.errors import NonFiniteError
from brainfusion.runtime.schedules import warmup_cosine


@dataclass(kw_only=True, eq=False)
class Progress:
    """How far a member is, beside its weights and its optimizer."""

    step: int = 0
    """Steps that were taken."""
    start: dict[str, Any] = field(default_factory=dict)
    """The row of metrics of step 0, where there is a closed form to start from."""
    best: dict[str, Any] = field(default_factory=dict)
    """The row of metrics of the best look at the validation people; empty before the first."""
    best_weights: dict[str, Tensor] = field(default_factory=dict)
    """Its weights, on the CPU."""
    least_loss: float | None = None
    """Least loss so far, in nats."""
    least_share: float | None = None
    """Least loss so far, as a share of that of chance."""

    def note(self, row: Mapping[str, Any]) -> None:
        """Take a step's row into account."""
        self.step = row["step"]
        self.least_loss = _least(self.least_loss, row["loss"])
        self.least_share = _least(self.least_share, row["loss_over_log_n"])

    def keep(self, row: Mapping[str, Any], model: nn.Module) -> None:
        """Take a look's row and the weights as they are for the best so far."""
        self.best = dict(row)
        self.best_weights = {
            key: value.detach().to("cpu", copy=True) for key, value in model.state_dict().items()
        }


def _least(known: float | None, value: float | None) -> float | None:
    """The lesser of two numbers, either of which may not be known."""
    return min((x for x in (known, value) if x is not None), default=None)


class MovingAverage:
    """The weights of a model, averaged over its steps.

    a_t = a_(t-1) + (w_t - a_(t-1)) max(1 - decay, 1 / (t + 1)): the plain mean of the start and all
    weights since, until 1 / (1 - decay) of them are in it; an exponential one from there on.
    """

    def __init__(self, model: AlignmentModel, decay: float) -> None:
        self.model = copy.deepcopy(model).requires_grad_(requires_grad=False)
        """Holds the average, and changes with it."""
        self._decay = decay

    @torch.no_grad()
    def update(self, model: AlignmentModel, step: int) -> None:
        """Take the weights of the model after `step` (from 1) in."""
        share = max(1.0 - self._decay, 1.0 / (step + 1))
        pairs = zip(self.model.parameters(), model.parameters(), strict=True)
        for average, weight in pairs:
            average.lerp_(weight, share)


class Member:
    """One training: takes steps, looks at the validation people, keeps the best weights."""

    def __init__(
        self,
        config: AlignConfig,
        model: AlignmentModel,
        batches: Batches,
        objective: Objective,
        look: Validation,
        *,
        peak_lr: float,
        ranks: Ranks,
    ) -> None:
        """Begin at the weights of the model.

        Args:
            config: This member's own.
            model: With the weights to start from; is trained in place.
            batches: Of the training people, by this member's seed.
            objective: The loss of a batch.
            look: Measures a model on the validation people.
            peak_lr: The learning rate after warm-up.
            ranks: Where this process stands.
        """
        self.config, self.model, self.progress = config, model, Progress()
        self.optimizer = make_optimizer(model, config, peak_lr)
        self.average = MovingAverage(model, config.average_decay) if config.average_decay else None
        self._batches, self._objective, self._look = batches, objective, look
        self._peak_lr, self._ranks = peak_lr, ranks

    @property
    def is_done(self) -> bool:
        """No step is left, or none has been better for long."""
        config, step, best = self.config, self.progress.step, self.progress.best
        if step >= config.max_steps:
            return True
        return bool(best) and step - best["step"] >= config.patience * config.eval_every

    def start(self) -> dict[str, Any]:
        """The row of step 0: a start in closed form is a result that training has to beat."""
        people, batch = self._batches.at(1)
        with torch.no_grad():
            loss = self._objective(self.model.eval(), batch, people, {})
        row = self._row(0, self._agreed(loss.value, stop=False)[0], loss)
        row |= self._look(self.model)
        self.progress.note(row)
        self.progress.start = {**row, "kept": "start"}
        self.progress.keep(self.progress.start, self.model)
        return row

    def take_step(self, *, stop: bool) -> tuple[dict[str, Any], bool]:
        """One step, and a look at the validation people where one is due.

        Args:
            stop: This process was asked to stop.

        Returns:
            The step's row of metrics, and whether any process was asked to stop.

        Raises:
            NonFiniteError: The loss is not finite.
        """
        config, step, begin = self.config, self.progress.step + 1, time.monotonic()
        lr = warmup_cosine(
            step, start=0.0, peak=self._peak_lr, end=0.0, n_warmup=config.warmup_steps,
            n_steps=config.max_steps + 1,
        )  # fmt: skip
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["relative_lr"]
        people, batch = self._batches.at(step)
        self.model.train()
        keep = self._batches.keep(self.model, step, len(people))
        loss = self._objective(self.model, batch, people, keep)
        self.optimizer.zero_grad()
        loss.value.backward()
        average_gradients(self.model.parameters(), self._ranks.world_size)
        self.optimizer.step()
        self.model.clamp_scale_()
        if self.average is not None:
            self.average.update(self.model, step)
        value, stopping = self._agreed(loss.value, stop=stop)
        if not math.isfinite(value):
            raise NonFiniteError(
                f"the loss is {value} at step {step}: expected a finite number. Use a smaller lr "
                f"than {self._peak_lr}, or check the features for extreme values."
            )
        row = self._row(step, value, loss, lr=lr, seconds=time.monotonic() - begin)
        self.progress.note(row)
        if step % config.eval_every == 0 or step == config.max_steps:
            row |= self._looked(row)
        return row, stopping

    def _looked(self, row: dict[str, Any]) -> dict[str, Any]:
        """Metrics of the weights and of their average; the better one is kept if it is the best."""
        metric = METRICS[self.config.early_stopping]
        found = self._look(self.model)
        kept, model = {**row, **found, "kept": "weights"}, self.model
        if self.average is not None:
            averaged = self._look(self.average.model)
            for name in METRICS.values():
                found[f"average_{name}"] = averaged[name]
            if averaged[metric] > kept[metric]:
                model, scale = self.average.model, float(self.average.model.logit_scale)
                kept |= {**averaged, "logit_scale": scale, "kept": "average over steps"}
        if not self.progress.best or kept[metric] > self.progress.best[metric]:
            self.progress.keep(kept, model)
        return found

    def _row(
        self,
        step: int,
        value: float,
        loss: BatchLoss,
        *,
        lr: float = 0.0,
        seconds: float = math.inf,
    ) -> dict[str, Any]:
        """A row of metrics.jsonl."""
        config, chance = self.config, loss.chance
        return {
            "step": step,
            "loss": value,
            "log_n": chance,
            "loss_over_log_n": value / chance if config.loss != "siglip" and chance else None,
            "logit_scale": float(self.model.logit_scale.detach()),
            "logit_scale_bounds": [config.min_scale, config.max_scale],
            "lr": lr,
            "pairs_per_s": loss.n_pairs / seconds,
        }

    def _agreed(self, loss: Tensor, *, stop: bool) -> tuple[float, bool]:
        """The mean of the ranks' losses, and whether any of them was asked to stop."""
        both = torch.stack([loss.detach().double(), loss.new_tensor(stop, dtype=torch.float64)])
        if self._ranks.world_size > 1:
            dist.all_reduce(both)
        return float(both[0]) / self._ranks.world_size, bool(both[1] > 0)
