"""Training of the alignment: one loop, on one process or many, with early stopping.

Shape legend: n people, t training people, d features of a modality.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from brainfusion.alignment.conditioning import Conditioner
from brainfusion.alignment.config import AlignConfig
from brainfusion.alignment.gene_conditioning import GeneConditioner
from brainfusion.alignment.gene_vectors import GeneVectors
from brainfusion.alignment.losses import contrastive_loss
from brainfusion.alignment.model import Alignment, AlignmentModel, Inputs, n_people, take
from brainfusion.alignment.prepare import check, conditioned, fit_conditioners, make_model
from brainfusion.runtime import config as configs
from brainfusion.runtime.distributed import Ranks, barrier, mean_over_ranks
from brainfusion.runtime.errors import UserError
from brainfusion.runtime.files import check_writable, write_json
from brainfusion.runtime.logs import MetricsLog, Progress, say
from brainfusion.runtime.schedules import warmup_cosine

_NO_SIGNAL = 0.99
"""A loss that never left this share of log N has told no pair from another."""


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainResult:
    """What a training run found; `summary` is what `summary.json` holds."""

    alignment: Alignment
    summary: dict[str, Any]
    run_dir: Path


def train(
    features: Mapping[str, np.ndarray | GeneVectors],
    labels: Sequence[str],
    *,
    config: AlignConfig,
    run_dir: Path,
    covariates: np.ndarray | None = None,
    covariate_names: Sequence[str] = (),
    meta: Mapping[str, Any] | None = None,
    ranks: Ranks | None = None,
) -> TrainResult:
    """Align two modalities of the same people, and keep the weights best on validation people.

    All processes are given the same arguments; rank r takes pairs r, r + W, ... of each batch, and
    the loss is that of the whole batch. Nothing is fitted on validation or test people.

    Args:
        features: [n, d] or gene vectors a modality, row-paired; usually called "brain" and "dna".
        labels: "train", "validation" or "test", a row; test rows are not looked at.
        config: The settings.
        run_dir: Gets config.yaml, metrics.jsonl, summary.json and model/.
        covariates: [n, c] from `design_matrix(subjects, config.residualise)`.
        covariate_names: Their names, kept with the model.
        meta: Facts to keep with the model: provenance, hashes. JSON values.
        ranks: Where this process stands; one process if omitted.

    Returns:
        The trained alignment on the CPU, and its summary.

    Raises:
        UserError: Rows that are not paired, NaN, too few people, covariates that do not fit
            `config.residualise`, or a loss that is not finite.
    """
    ranks = ranks or Ranks()
    rows = check(features, labels, config, covariates)
    if ranks.is_main:
        check_writable(run_dir)
        configs.save(run_dir / "config.yaml", config)
    with torch.random.fork_rng(devices=[]):
        # -- data ----------------------------------------------------------------------------
        conditioners = fit_conditioners(
            features, rows["train"], config, covariates, covariate_names, ranks
        )
        training, validation = (
            {
                name: conditioned(c, features[name], rows[split], covariates).to(ranks.device)
                for name, c in conditioners.items()
            }
            for split in ("train", "validation")
        )
        # -- model ---------------------------------------------------------------------------
        torch.manual_seed(config.seed)
        model = make_model(config, conditioners).to(ranks.device)
        log = MetricsLog(run_dir / "metrics.jsonl", active=ranks.is_main)
        try:
            outcome = _optimise(model, training, validation, config, ranks, log)
        finally:
            log.close()
    summary = _summary(outcome, rows, conditioners, config, ranks)
    alignment = Alignment(
        model=model.cpu().eval(),
        conditioners=conditioners,
        info={"config": configs.to_dict(config), "summary": summary, "meta": dict(meta or {})},
    )
    if ranks.is_main:
        alignment.save(run_dir / "model")
        write_json(run_dir / "summary.json", {**summary, "meta": dict(meta or {})})
        say(_sentence(summary))
    barrier()
    return TrainResult(alignment=alignment, summary=summary, run_dir=run_dir)


# -- batches ------------------------------------------------------------------------------------


def batch_rows(n_train: int, step: int, config: AlignConfig, ranks: Ranks) -> np.ndarray:
    """Training rows of this rank at `step` (from 1); a pure function of seed, step and rank.

    A batch smaller than the cohort walks through a new order in each epoch; what is left over at
    its end is not seen in that epoch. open_clip's losses want as many pairs on each rank: up to
    `world_size - 1` pairs, others at each step, are left out for them.
    """
    size = min(config.batch_size or n_train, n_train)
    whole = size == n_train
    if config.loss != "info_nce" and size % ranks.world_size:
        size, whole = size - size % ranks.world_size, False
    if whole:
        batch = np.arange(n_train)
    else:
        epoch, place = divmod(step - 1, n_train // size)
        order = np.random.default_rng((config.seed, epoch)).permutation(n_train)
        batch = order[place * size : (place + 1) * size]
    return batch[ranks.rank :: ranks.world_size]


# -- the loop ------------------------------------------------------------------------------------


def _optimise(
    model: AlignmentModel,
    training: dict[str, Inputs],
    validation: dict[str, Inputs],
    config: AlignConfig,
    ranks: Ranks,
    log: MetricsLog,
) -> dict[str, Any]:
    """Train `model` in place and leave it with its best weights."""
    first, second = training
    n_train = n_people(training[first])
    n_batch = min(config.batch_size or n_train, n_train)
    loss_of = contrastive_loss(config.loss)
    optimizer = _optimizer(model, config)
    progress = Progress("align", config.max_steps, active=ranks.is_main)
    best: dict[str, Any] = {"auc": -1.0, "step": 0}
    best_weights: dict[str, Tensor] = {}
    least_loss, step = math.inf, 0

    for step in range(1, config.max_steps + 1):
        # -- one step ------------------------------------------------------------------------
        lr = warmup_cosine(
            step, start=0.0, peak=config.lr, end=0.0, n_warmup=config.warmup_steps,
            n_steps=config.max_steps + 1,
        )  # fmt: skip
        for group in optimizer.param_groups:
            group["lr"] = lr * group["relative_lr"]
        rows = batch_rows(n_train, step, config, ranks)
        # Dropout is a function of seed, step and rank, like the batch.
        torch.manual_seed(hash((config.seed, step, ranks.rank)) % 2**63)
        model.train()
        a, b = (model.embed(name, take(training[name], rows)) for name in (first, second))
        loss = loss_of(a, b, model.logit_scale, model.logit_bias)
        optimizer.zero_grad()
        loss.backward()
        average_gradients(model, ranks.world_size)
        optimizer.step()
        model.clamp_scale_()

        # -- log and look at the validation people -------------------------------------------
        value = float(mean_over_ranks(loss))
        if not math.isfinite(value):
            raise UserError(
                f"the loss is {value} at step {step}: expected a finite number. Use a smaller lr "
                f"than {config.lr}, or check the features for extreme values."
            )
        least_loss = min(least_loss, value)
        row: dict[str, Any] = {
            "step": step,
            "loss": value,
            "loss_over_log_n": value / math.log(n_batch) if config.loss != "siglip" else None,
            "logit_scale": float(model.logit_scale.detach()),
            "lr": lr,
        }
        if step % config.eval_every == 0 or step == config.max_steps:
            row |= _look(model, validation, ranks)
            if row["validation_auc"] > best["auc"]:
                best = {"auc": row["validation_auc"], **row}
                best_weights = {k: v.detach().clone() for k, v in model.state_dict().items()}
        log.write(**row)
        progress.update(step, f"loss {value:.3f}, validation AUC {max(best['auc'], 0):.3f}")
        if best_weights and step - best["step"] >= config.patience * config.eval_every:
            break
    model.load_state_dict(best_weights)
    return {"best": best, "n_steps": step, "least_loss": least_loss, "n_batch": n_batch}


def _optimizer(model: AlignmentModel, config: AlignConfig) -> torch.optim.AdamW:
    # The logits of genes have a long way to go in few steps, and nothing to be decayed to but the
    # even attention that they start from: early stopping holds them.
    names = ("logits", "query")
    attention = [p for n, p in model.towers.named_parameters() if n.rsplit(".", 1)[-1] in names]
    rest = [p for p in model.parameters() if not any(p is a for a in attention)]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in rest if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in rest if p.ndim <= 1], "weight_decay": 0.0},
        {"params": attention, "weight_decay": 0.0, "relative_lr": config.attention_lr / config.lr},
    ]
    groups = [{"relative_lr": 1.0, **group} for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.98))


def average_gradients(model: torch.nn.Module, world_size: int) -> None:
    """Replace each gradient by its mean over ranks, as DDP does; one collective."""
    if world_size == 1:
        return
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    flat = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(flat)
    flat /= world_size
    for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


@torch.no_grad()
def _look(model: AlignmentModel, validation: dict[str, Inputs], ranks: Ranks) -> dict[str, float]:
    """Validation AUC and effective rank, as rank 0 finds them: all ranks must stop together."""
    model.eval()
    values = torch.zeros(2, dtype=torch.float64, device=ranks.device)
    if ranks.is_main:
        a, b = (model.embed(name, x).float() for name, x in validation.items())
        values[0] = pair_auc(a, b)
        values[1] = (effective_rank(a) + effective_rank(b)) / 2
    if ranks.world_size > 1:
        dist.broadcast(values, src=0)
    auc, rank = values.tolist()
    return {"validation_auc": auc, "effective_rank": rank}


def pair_auc(a: Tensor, b: Tensor, *, tile: int = 1024) -> float:
    """The chance that a pair is more alike than a non-pair, over both directions; ties are half.

    Args:
        a: [n, o], unit rows.
        b: [n, o], unit rows, row-paired.
        tile: Rows of similarities held at once.
    """
    below = 0.0
    n = len(a)
    for x, y in ((a, b), (b, a)):
        for i in range(0, n, tile):
            similarities = x[i : i + tile] @ y.T
            pairs = similarities.diagonal(i)[:, None]
            below += float((similarities < pairs).sum())
            # The pair itself is a tie with itself, and not a non-pair.
            below += 0.5 * (float((similarities == pairs).sum()) - len(pairs))
    return below / (2 * n * (n - 1))


def effective_rank(rows: Tensor) -> float:
    """Exponential of the entropy of the variance over principal axes; 1 is a collapse.

    At most the width and the number of rows less one. Roy & Vetterli 2007, on variances.
    """
    variances = torch.linalg.svdvals((rows - rows.mean(0)).double()).square()
    if float(variances.sum()) == 0.0:
        return 1.0
    shares = variances / variances.sum()
    return float(torch.special.entr(shares).sum().exp())


# -- results -------------------------------------------------------------------------------------


def _summary(
    outcome: dict[str, Any],
    rows: Mapping[str, np.ndarray],
    conditioners: Mapping[str, Conditioner | GeneConditioner],
    config: AlignConfig,
    ranks: Ranks,
) -> dict[str, Any]:
    best = outcome["best"]
    log_n = math.log(outcome["n_batch"])
    return {
        "modalities": list(conditioners),
        **{f"n_{split}": len(people) for split, people in rows.items()},
        "loss_name": config.loss,
        "n_steps": outcome["n_steps"],
        "best_step": best["step"],
        "loss": best["loss"],
        "loss_over_log_n": best["loss_over_log_n"],
        "least_loss": outcome["least_loss"],
        "log_n": log_n,
        "signal": config.loss == "siglip" or outcome["least_loss"] < _NO_SIGNAL * log_n,
        "logit_scale": best["logit_scale"],
        "logit_scale_bounds": [config.min_scale, config.max_scale],
        "validation_auc": best["validation_auc"],
        "effective_rank": best["effective_rank"],
        "n_processes": ranks.world_size,
        "columns": {
            name: {
                "given": c.dim_in,
                "constant": c.n_dropped,
                "used": c.dim_out,
                "variance_kept": c.explained,
            }
            for name, c in conditioners.items()
        },
        **{
            f"{name}_genes": {
                "pool": config.dna_pool,
                "models": list(c.models),
                "given": len(c.genes),
                "used": len(c.used),
            }
            for name, c in conditioners.items()
            if isinstance(c, GeneConditioner)
        },
        "residualised_on": list(next(iter(conditioners.values())).covariates),
    }


def _sentence(summary: Mapping[str, Any]) -> str:
    found = (
        f"aligned {summary['n_train']} people: best step {summary['best_step']} of "
        f"{summary['n_steps']}, validation AUC {summary['validation_auc']:.3f} (chance 0.5)"
    )
    if summary["signal"]:
        return f"{found}."
    return (
        f"{found}. No pairing signal yet: the loss has stayed within 1% of log N = "
        f"{summary['log_n']:.3f}, where no pair is told from another."
    )
