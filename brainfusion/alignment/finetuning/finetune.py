"""Fine-tuning: the brain encoder itself in the graph of an alignment, through gradient caching.

    windows -> encoder -> pooled features -> the conditioner's affine map -> projector -> InfoNCE

It starts from a trained alignment and the encoder whose features that was trained on, so that step
0 is the frozen model; the weights that are best on validation people are kept, step 0 among them.
The loss is exact over the whole batch (`grad_cache`), whatever the micro-batches and processes.
Nothing is resumed: a run that is stopped begins again.

Shape legend: n people, m people of a micro-batch, f features, o width of the shared space.
"""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from brainfusion.alignment.conditioning import Conditioner
from brainfusion.alignment.density_ratio import DensityRatio
from brainfusion.alignment.finetuning.config import FinetuneConfig
from brainfusion.alignment.finetuning.grad_cache import (
    average_gradients,
    cached_backward,
    call_order,
)
from brainfusion.alignment.finetuning.lora import ATTENTION, Trained, choose_trained, merge_lora
from brainfusion.alignment.finetuning.tower import Tower, Towers, batch_of, kept_units, parts_of
from brainfusion.alignment.genes.conditioning import GeneConditioner
from brainfusion.alignment.genes.vectors import GeneVectors
from brainfusion.alignment.losses.info_nce import info_nce
from brainfusion.alignment.losses.pair_ids import PairIds
from brainfusion.alignment.model import Alignment
from brainfusion.alignment.network import AlignmentModel
from brainfusion.alignment.validation import chance_level, effective_rank, pair_auc, uniformity
from brainfusion.data.prefetch import Prefetch
from brainfusion.runtime import config as configs
from brainfusion.runtime.distributed import Ranks, barrier
from brainfusion.runtime.errors import NonFiniteError, UserError
from brainfusion.runtime.files import check_writable, write_json
from brainfusion.runtime.logs import MetricsLog, Progress, say
from brainfusion.runtime.memory import device_peak_mib, peak_mib
from brainfusion.runtime.schedules import warmup_cosine

_NO_SIGNAL = 0.99


@dataclass(frozen=True, kw_only=True, eq=False)
class FinetuneResult:
    """What a run found; the tower's module holds the tuned encoder, with plain weights."""

    alignment: Alignment
    trained: Trained
    summary: dict[str, Any]
    embeddings: dict[str, np.ndarray]
    """float32 [n, o] of everybody, a modality."""
    run_dir: Path


def finetune(
    alignment: Alignment,
    tower: Tower,
    dna: np.ndarray | GeneVectors,
    labels: Sequence[str],
    *,
    config: FinetuneConfig,
    run_dir: Path,
    ids: PairIds | None = None,
    covariates: np.ndarray | None = None,
    meta: Mapping[str, Any] | None = None,
    ranks: Ranks | None = None,
) -> FinetuneResult:
    """Train the encoder and the projectors of an alignment together; the best step is kept.

    All processes are given the same arguments. A step is a function of (seed, step): two processes
    see the batch, the windows and the dropout of one.

    Args:
        alignment: Of the features that `tower` makes ("brain") and of "dna"; not changed.
        tower: The encoder; its module is tuned in place.
        dna: What the alignment was given as "dna", row-paired with the tower's people.
        labels: "train", "validation" or "test", a row; test rows are not looked at.
        config: The settings.
        run_dir: Gets config.yaml, metrics.jsonl, summary.json and model/.
        ids: Of all rows: who is a negative of whom; everybody of everybody else if omitted.
        covariates: [n, c], as the alignment was given them.
        meta: Facts to keep with the model.
        ranks: Where this process stands; one process if omitted.

    Raises:
        UserError: An alignment that this does not cover, too few people, or an unknown `how`.
        NonFiniteError: A loss or a gradient that is not finite.
    """
    ranks = ranks or Ranks()
    check_alignment(alignment)
    rows = _splits(labels, config, ranks)
    trained = choose_trained(
        tower.module, config.how, blocks=tower.blocks, after=tower.after, fixed=tower.fixed,
        patterns=config.adapt or ATTENTION, rank=config.rank, alpha=config.alpha, seed=config.seed,
    )  # fmt: skip
    say(f"{trained}.")
    if ranks.is_main:
        check_writable(run_dir)
        configs.save(run_dir / "config.yaml", config)
    towers = Towers.of(alignment, tower, dna, ids, covariates, config, ranks)
    log = MetricsLog(run_dir / "metrics.jsonl", active=ranks.is_main)
    try:
        outcome = _optimise(towers, rows, log)
    finally:
        log.close()
    merge_lora(tower.module)
    brain, genes = towers.both(np.arange(len(labels)))
    embeddings = {"brain": brain.cpu().numpy(), "dna": genes.cpu().numpy()}
    head = None if alignment.head is None else _head(embeddings, rows, ranks)
    summary = _summary(outcome, rows, trained, config, alignment, ranks)
    tuned = Alignment(
        model=towers.model.cpu().eval(),
        conditioners=alignment.conditioners,
        head=head,
        info={
            "config": alignment.info.get("config", {}),
            "finetune": configs.to_dict(config),
            "summary": summary,
            "meta": dict(meta or {}),
        },
    )
    if ranks.is_main:
        tuned.save(run_dir / "model")
        write_json(run_dir / "summary.json", {**summary, "meta": dict(meta or {})})
        say(_sentence(summary))
    barrier()
    return FinetuneResult(
        alignment=tuned, trained=trained, summary=summary, embeddings=embeddings, run_dir=run_dir
    )


def check_alignment(alignment: Alignment) -> None:
    """Refuse an alignment that fine-tuning does not cover.

    Raises:
        UserError: It is linear, has several modalities a side, or pools genes.
    """
    if not isinstance(alignment.model, AlignmentModel):
        raise UserError(
            "this alignment has no projectors (it is linear): fine-tuning goes on from projectors; "
            "align with --method infonce."
        )
    if set(alignment.conditioners) != {"brain", "dna"}:
        names = ", ".join(alignment.conditioners)
        raise UserError(
            f"this alignment has the modalities {names}: fine-tuning takes one brain encoder and "
            "one DNA side; align one encoder, with DNA models joined as one (evo2+caduceus)."
        )
    dna = alignment.conditioners["dna"]
    if isinstance(dna, GeneConditioner) and not dna.together:
        raise UserError(
            "this alignment pools genes: fine-tuning takes the DNA side as one vector a person; "
            "align with --dna-pool concat."
        )
    if not isinstance(alignment.conditioners["brain"], Conditioner):
        raise UserError("the brain side of this alignment comes as genes: expected features.")


def _splits(labels: Sequence[str], config: FinetuneConfig, ranks: Ranks) -> dict[str, np.ndarray]:
    rows = {s: np.flatnonzero(np.asarray(labels) == s) for s in ("train", "validation", "test")}
    for split, least in (("train", 8), ("validation", 4)):
        if len(rows[split]) < least:
            raise UserError(
                f"{len(rows[split])} {split} people with both modalities: expected at least "
                f"{least}. Check that both were made from the same cohort."
            )
    size = min(config.batch_size or len(rows["train"]), len(rows["train"]))
    if size < ranks.world_size:
        raise UserError(
            f"a batch of {size} people does not give each of {ranks.world_size} processes one: "
            "use a larger batch_size, or fewer processes."
        )
    return rows


# -- the loop --------------------------------------------------------------------------------------


def _optimise(towers: Towers, rows: dict[str, np.ndarray], log: MetricsLog) -> dict[str, Any]:
    """Train in place and leave encoder and model with their best weights."""
    config, ranks, model = towers.config, towers.ranks, towers.model
    encoder = [p for p in towers.tower.module.parameters() if p.requires_grad]
    projectors = [p for p in model.parameters() if p.requires_grad]
    optimizer = _optimizer(encoder, projectors, config)
    n_train = len(rows["train"])
    log_n = chance_level(n_train, towers.ids_of(rows["train"]), ranks.device, local=True)
    if config.batch_size and config.batch_size < n_train:
        log_n += math.log(config.batch_size / n_train)
    progress = Progress(f"fine-tune ({config.how})", config.max_steps, active=ranks.is_main)

    begin = time.monotonic()
    look = _look(towers, rows["validation"])
    best: dict[str, Any] = {"step": 0, **look, **_scale(model)}
    kept = _snapshot(encoder, model)
    log.write(step=0, **look, **_scale(model), frozen=True)
    first, least, step = look["validation_auc"], math.inf, 0
    say(f"frozen start: validation AUC {first:.3f} (chance 0.5).")

    for step in range(1, config.max_steps + 1):
        # -- one step ------------------------------------------------------------------------
        lr = warmup_cosine(
            step, start=0.0, peak=config.lr, end=0.0, n_warmup=config.warmup_steps,
            n_steps=config.max_steps + 1,
        )  # fmt: skip
        for group in optimizer.param_groups:
            group["lr"] = lr * group["relative_lr"]
        optimizer.zero_grad(set_to_none=True)
        value = float(_gradients(towers, rows["train"], step))
        average_gradients([*encoder, *projectors], ranks.world_size)
        norm = float(nn.utils.clip_grad_norm_(encoder, math.inf)) if encoder else 0.0
        if not (math.isfinite(value) and math.isfinite(norm)):
            raise NonFiniteError(
                f"the loss is {value} and the norm of the encoder's gradient {norm} at step "
                f"{step}: expected finite numbers. Use a smaller lr than {config.lr:g} or a "
                f"smaller encoder_lr_scale than {config.encoder_lr_scale:g}."
            )
        optimizer.step()
        model.clamp_scale_()

        # -- log and look at the validation people -------------------------------------------
        least, share = min(least, value), value / log_n if log_n else None
        if step == 1:  # the loss before the first update is that of the start
            best |= {"loss": value, "loss_over_log_n": share}
        row: dict[str, Any] = {
            "step": step, "loss": value, "loss_over_log_n": share, **_scale(model), "lr": lr,
            "encoder_lr": lr * config.encoder_lr_scale, "encoder_gradient_norm": norm,
            "seconds": round(time.monotonic() - begin, 3), "peak_mib": peak_mib(),
            **device_peak_mib(ranks.device),
        }  # fmt: skip
        if step % config.eval_every == 0 or step == config.max_steps:
            row |= _look(towers, rows["validation"])
            if row["validation_auc"] > best["validation_auc"]:
                best, kept = dict(row), _snapshot(encoder, model)
        log.write(**row)
        progress.update(step, f"loss {value:.3f}, validation AUC {best['validation_auc']:.3f}")
        if step - best["step"] >= config.patience * config.eval_every:
            break
    _restore(kept, encoder, model)
    return {
        "best": best, "frozen": first, "n_steps": step, "least_loss": least, "log_n": log_n,
        "seconds": time.monotonic() - begin,
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


def _optimizer(
    encoder: list[nn.Parameter], projectors: list[nn.Parameter], config: FinetuneConfig
) -> torch.optim.AdamW:
    groups: list[dict[str, Any]] = []
    for parameters, relative_lr, decay in (
        (encoder, config.encoder_lr_scale, config.encoder_weight_decay),
        (projectors, 1.0, config.weight_decay),
    ):
        for matrices in (True, False):
            chosen = [p for p in parameters if (p.ndim > 1) == matrices]
            how = {"relative_lr": relative_lr, "weight_decay": decay if matrices else 0.0}
            groups += [{"params": chosen, **how}] if chosen else []
    return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.98))


@torch.no_grad()
def _look(towers: Towers, people: np.ndarray) -> dict[str, float]:
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


_Snapshot = tuple[list[Tensor], dict[str, Tensor]]


def _snapshot(encoder: list[nn.Parameter], model: AlignmentModel) -> _Snapshot:
    weights = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    return [p.detach().clone() for p in encoder], weights


@torch.no_grad()
def _restore(kept: _Snapshot, encoder: list[nn.Parameter], model: AlignmentModel) -> None:
    for parameter, value in zip(encoder, kept[0], strict=True):
        parameter.copy_(value)
    model.load_state_dict(kept[1])


# -- results ---------------------------------------------------------------------------------------


def _head(
    embeddings: Mapping[str, np.ndarray], rows: Mapping[str, np.ndarray], ranks: Ranks
) -> DensityRatio:
    """The score of pairs, fitted anew: the same on all ranks."""
    box: list[Any] = [None]
    if ranks.is_main:
        parts = (
            {side: x[rows[split]] for side, x in embeddings.items()}
            for split in ("train", "validation")
        )
        box = [DensityRatio.fit(*parts)]
    if ranks.world_size > 1:
        dist.broadcast_object_list(box, src=0, device=ranks.device)
    return box[0]


def _summary(
    outcome: dict[str, Any],
    rows: Mapping[str, np.ndarray],
    trained: Trained,
    config: FinetuneConfig,
    alignment: Alignment,
    ranks: Ranks,
) -> dict[str, Any]:
    best, before = outcome["best"], alignment.info.get("summary", {})
    settings = alignment.model.settings
    return {
        **{key: before[key] for key in ("columns", "residualised_on") if key in before},
        "modalities": ["brain", "dna"],
        **{f"n_{split}": len(people) for split, people in rows.items()},
        "loss_name": "info_nce",
        "n_steps": outcome["n_steps"],
        "best_step": best["step"],
        "loss": best["loss"],
        "loss_over_log_n": best["loss_over_log_n"],
        "least_loss": outcome["least_loss"],
        "log_n": outcome["log_n"],
        "signal": outcome["least_loss"] < _NO_SIGNAL * outcome["log_n"],
        "logit_scale": best["logit_scale"],
        "logit_scale_bounds": [settings["min_scale"], settings["max_scale"]],
        **{name: value for name, value in best.items() if name.startswith("validation_")},
        "effective_rank": best["effective_rank"],
        "n_processes": ranks.world_size,
        "finetune": {
            "how": config.how,
            "n_trained": trained.n_trained,
            "n_parameters": trained.n_all,
            "frozen_validation_auc": outcome["frozen"],
            "seconds": round(outcome["seconds"], 2),
            "peak_mib": peak_mib(),
        },
    }


def _sentence(summary: Mapping[str, Any]) -> str:
    frozen = summary["finetune"]["frozen_validation_auc"]
    if not summary["best_step"]:
        return (
            f"no step of {summary['n_steps']} was better on validation people than the frozen "
            f"start (AUC {frozen:.3f}), which is kept."
        )
    return (
        f"fine-tuned on {summary['n_train']} people: best step {summary['best_step']} of "
        f"{summary['n_steps']}, validation AUC {summary['validation_auc']:.3f} (frozen start "
        f"{frozen:.3f}, chance 0.5)."
    )
