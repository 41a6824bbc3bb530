"""The loop of fine-tuning: one batch a step, looks at validation people, checkpoints.

A step is a function of (seed, step): the batch, the windows and the dropout are drawn anew from
both, and nothing in the encoder is random. A checkpoint holds what is trained, the best of it so
far, the optimizer and the step, so a run that goes on is the same to the bit.

Shape legend: n people.
"""

import math
import time
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from brainfusion.alignment.finetuning.config import FinetuneConfig
from brainfusion.alignment.finetuning.grad_cache import (
    average_gradients,
    cached_backward,
    call_order,
)
from brainfusion.alignment.finetuning.resume import Checkpoints, Progress, Trained, find, save
from brainfusion.alignment.finetuning.tower import Towers, batch_of, kept_units, parts_of
from brainfusion.alignment.losses.info_nce import info_nce
from brainfusion.alignment.network import AlignmentModel
from brainfusion.alignment.resume import forget
from brainfusion.alignment.validation import chance_level, effective_rank, pair_auc, uniformity
from brainfusion.data.prefetch import Prefetch
from brainfusion.runtime import logs
from brainfusion.runtime.distributed import barrier
from brainfusion.runtime.errors import NonFiniteError
from brainfusion.runtime.memory import device_peak_mib, peak_mib
from brainfusion.runtime.schedules import warmup_cosine
from brainfusion.runtime.signals import Stopped, StopSignals


def optimise(towers: Towers, rows: dict[str, np.ndarray], keeping: Checkpoints) -> Progress:
    """Train in place and leave encoder and model with their best weights.

    Args:
        towers: What is trained.
        rows: People of each split.
        keeping: Checkpoints; the folder also gets metrics.jsonl.

    Returns:
        Where the run ended.

    Raises:
        CheckpointError: What there is to go on with was made with another config or other data.
        NonFiniteError: A loss or a gradient that is not finite.
        Stopped: A signal came; a checkpoint was written first.
    """
    config, ranks = towers.config, towers.ranks
    trained = Trained(towers)
    optimizer = _optimizer(trained, config)
    # -- resume ------------------------------------------------------------------------------
    if ranks.is_main and not keeping.resume:
        forget(keeping.run_dir)
    found = find(keeping, ranks) if keeping.resume else None
    log = logs.MetricsLog(
        keeping.run_dir / "metrics.jsonl",
        active=ranks.is_main,
        resume_step=None if found is None else found.progress.step,
    )
    if found is None:
        progress = _begin(towers, rows, trained, log)
    else:
        progress = found.progress
        trained.load_state_dict(found.weights)
        optimizer.load_state_dict(found.optimizer)
    begin = time.monotonic() - progress.seconds
    line = logs.Progress(
        f"fine-tune ({config.how})", config.max_steps, start=progress.step, active=ranks.is_main
    )

    # -- the loop ----------------------------------------------------------------------------
    signals = StopSignals()
    with signals if keeping.every else nullcontext():
        for step in range(progress.step + 1, config.max_steps + 1):
            if _is_over(progress, step - 1, config):
                break
            row = _step(towers, rows["train"], step, trained, optimizer, log_n=progress.log_n)
            if step == 1:  # the loss before the first update is that of the start
                progress.best |= {key: row[key] for key in ("loss", "loss_over_log_n")}
            progress.step, progress.seconds = step, time.monotonic() - begin
            before = math.inf if progress.least_loss is None else progress.least_loss
            progress.least_loss = min(row["loss"], before)
            row |= {
                "seconds": round(progress.seconds, 3),
                "peak_mib": peak_mib(),
                **device_peak_mib(ranks.device),
            }
            if step % config.eval_every == 0 or step == config.max_steps:
                row |= look(towers, rows["validation"])
                if row["validation_auc"] > progress.best["validation_auc"]:
                    progress.keep(row, trained)
            log.write(**row)
            best = progress.best["validation_auc"]
            line.update(step, f"loss {row['loss']:.3f}, validation AUC {best:.3f}")
            if not keeping.every:
                continue
            last = _is_over(progress, step, config)
            stopping = _agree(signals.received is not None, towers)
            if step % keeping.every == 0 or last or stopping:
                if ranks.is_main:
                    save(keeping, progress, trained, optimizer, world_size=ranks.world_size)
                barrier()
            if stopping and not last:
                raise Stopped(f"at step {step}")
    log.close()
    trained.load_state_dict(progress.best_weights)
    return progress


def _is_over(progress: Progress, step: int, config: FinetuneConfig) -> bool:
    """Whether `step` is the last: of all, or of those without a better look."""
    waited = step - progress.best["step"]
    return step == config.max_steps or waited >= config.patience * config.eval_every


def _begin(
    towers: Towers, rows: dict[str, np.ndarray], trained: Trained, log: logs.MetricsLog
) -> Progress:
    """Step 0: the frozen model, which is the best so far."""
    config, model, n_train = towers.config, towers.model, len(rows["train"])
    ids = towers.ids_of(rows["train"])
    log_n = chance_level(n_train, ids, towers.ranks.device, local=True)
    if config.batch_size and config.batch_size < n_train:
        log_n += math.log(config.batch_size / n_train)
    seen = look(towers, rows["validation"])
    progress = Progress(frozen=seen["validation_auc"], log_n=log_n)
    progress.keep({"step": 0, **seen, **_scale(model)}, trained)
    log.write(step=0, **seen, **_scale(model), frozen=True)
    logs.say(f"frozen start: validation AUC {seen['validation_auc']:.3f} (chance 0.5).")
    return progress


def _step(
    towers: Towers,
    train: np.ndarray,
    step: int,
    trained: Trained,
    optimizer: torch.optim.Optimizer,
    *,
    log_n: float,
) -> dict[str, Any]:
    """One update; returns its row of metrics."""
    config, ranks, model = towers.config, towers.ranks, towers.model
    encoder = list(trained.encoder)
    lr = warmup_cosine(
        step, start=0.0, peak=config.lr, end=0.0, n_warmup=config.warmup_steps,
        n_steps=config.max_steps + 1,
    )  # fmt: skip
    for group in optimizer.param_groups:
        group["lr"] = lr * group["relative_lr"]
    optimizer.zero_grad(set_to_none=True)
    value = float(_gradients(towers, train, step))
    average_gradients([*encoder, *_projectors(model)], ranks.world_size)
    norm = float(nn.utils.clip_grad_norm_(encoder, math.inf)) if encoder else 0.0
    if not (math.isfinite(value) and math.isfinite(norm)):
        raise NonFiniteError(
            f"the loss is {value} and the norm of the encoder's gradient {norm} at step "
            f"{step}: expected finite numbers. Use a smaller lr than {config.lr:g} or a "
            f"smaller encoder_lr_scale than {config.encoder_lr_scale:g}."
        )
    optimizer.step()
    model.clamp_scale_()
    return {
        "step": step, "loss": value, "loss_over_log_n": value / log_n if log_n else None,
        **_scale(model), "lr": lr, "encoder_lr": lr * config.encoder_lr_scale,
        "encoder_gradient_norm": norm,
    }  # fmt: skip


def _gradients(towers: Towers, train: np.ndarray, step: int) -> Tensor:
    """Gradients of the loss of one batch, of this process's share of it; returns the loss."""
    config, ranks, model = towers.config, towers.ranks, towers.model
    batch = batch_of(len(train), step, config)
    own = slice(ranks.rank, None, ranks.world_size)
    keep = kept_units(model, len(batch), step, config.seed)
    masks = {name: None if mask is None else mask[own] for name, mask in keep.items()}
    people = train[batch[own]]
    parts = parts_of(people, config.micro_batch)
    order = call_order(len(parts))
    model.train()
    with Prefetch(lambda i: towers.tower.load(parts[order[i]], step), 0, len(order)) as loaded:

        def embed(k: int) -> tuple[Tensor, Tensor]:
            place = slice(k * config.micro_batch, (k + 1) * config.micro_batch)
            kept = {
                name: None if mask is None else mask[place].to(ranks.device)
                for name, mask in masks.items()
            }
            a = towers.brain_rows(parts[k], next(loaded), kept["brain"])
            return a, towers.dna_rows(parts[k], kept["dna"])

        return cached_backward(
            embed,
            len(parts),
            lambda a, b: info_nce(a, b, model.logit_scale, ids=towers.ids_of(people)),
            device=ranks.device,
        )


def _projectors(model: AlignmentModel) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def _optimizer(trained: Trained, config: FinetuneConfig) -> torch.optim.AdamW:
    groups: list[dict[str, Any]] = []
    for parameters, relative_lr, decay in (
        (list(trained.encoder), config.encoder_lr_scale, config.encoder_weight_decay),
        (_projectors(trained.model), 1.0, config.weight_decay),
    ):
        for matrices in (True, False):
            chosen = [p for p in parameters if (p.ndim > 1) == matrices]
            how = {"relative_lr": relative_lr, "weight_decay": decay if matrices else 0.0}
            groups += [{"params": chosen, **how}] if chosen else []
    return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.98))


@torch.no_grad()
def look(towers: Towers, people: np.ndarray) -> dict[str, float]:
    """What is measured on validation people, as rank 0 finds it: all ranks must stop together."""
    brain, dna = towers.both(people)
    ids, scale = towers.ids_of(people), towers.model.logit_scale
    loss = float(info_nce(brain, dna, scale, ids=ids, local=True))
    found = {
        "validation_auc": pair_auc(brain, dna, ids=ids),
        "validation_information": chance_level(len(people), ids, brain.device, local=True) - loss,
        "validation_alignment": float((brain - dna).square().sum(1).mean()),
        "validation_uniformity": (uniformity(brain) + uniformity(dna)) / 2,
        "effective_rank": (effective_rank(brain) + effective_rank(dna)) / 2,
    }
    values = torch.tensor(list(found.values()), dtype=torch.float64, device=brain.device)
    if towers.ranks.world_size > 1:
        dist.broadcast(values, src=0)
    return dict(zip(found, values.tolist(), strict=True))


def _scale(model: AlignmentModel) -> dict[str, float]:
    return {"logit_scale": float(model.logit_scale.detach())}


def _agree(stop: bool, towers: Towers) -> bool:
    """Whether any process was asked to stop: all stop together."""
    if towers.ranks.world_size == 1:
        return stop
    flag = torch.tensor(float(stop), device=towers.ranks.device)
    dist.all_reduce(flag)
    return bool(flag > 0)
