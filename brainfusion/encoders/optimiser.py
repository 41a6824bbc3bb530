"""The optimiser of pretraining: which weights decay, and what each step is taken with.

All of it is a pure function of the step, so that a resumed run has nothing to restore.
"""

from typing import Any

from torch import nn

from brainfusion.encoders.pretrain_config import OptimConfig
from brainfusion.runtime import schedules

_REFERENCE_ACCUMULATION = 8  # of Brain-JEPA: its ramp is sized by batches and stepped by steps


def groups(objective: nn.Module) -> list[dict[str, Any]]:
    """Weights decay; biases, norms, tokens and other vectors do not."""
    trained = [p for p in objective.parameters() if p.requires_grad]
    tokens = {id(p) for name, p in objective.named_parameters() if name.endswith("_token")}
    matrices = [p for p in trained if p.ndim > 1 and id(p) not in tokens]
    chosen = {id(p) for p in matrices}
    vectors = [p for p in trained if id(p) not in chosen]
    return [{"params": matrices, "decays": True}, {"params": vectors, "decays": False}]


def schedule(optim: OptimConfig, step: int) -> tuple[float, float]:
    """Learning rate and weight decay of optimiser step `step`, from 0.

    As Brain-JEPA's schedulers, which are stepped before the first batch: the first step takes
    their first value past the start.
    """
    lr = schedules.warmup_cosine(
        step + 1,
        start=optim.lr * optim.lr_start_share,
        peak=optim.lr,
        end=optim.lr_end,
        n_warmup=optim.warmup_share * optim.steps,
        n_steps=optim.steps,
    )
    return lr, schedules.cosine(step + 1, optim.weight_decay, optim.weight_decay_end, optim.steps)


def target_momentum(optim: OptimConfig, step: int) -> float:
    """Momentum of Brain-JEPA's target encoder after optimiser step `step`, from 0.

    Differs from upstream: their ramp is sized by batches and stepped by optimiser steps, so with
    its eight batches a step it ends at 0.9965 instead of 1. `momentum_ramp="reference"` gives it.
    """
    if optim.momentum_ramp == "reference":
        return schedules.linear(step, *optim.momentum, optim.steps * _REFERENCE_ACCUMULATION)
    return schedules.linear(step + 1, *optim.momentum, optim.steps)


def apply_schedule(optimizer: Any, optim: OptimConfig, step: int) -> tuple[float, float]:
    """Give every group the learning rate and weight decay of the step; returns the two."""
    lr, decay = schedule(optim, step)
    for group in optimizer.param_groups:
        group["lr"] = lr
        group["weight_decay"] = decay if group["decays"] else 0.0
    return lr, decay
