"""Training of the alignment: one loop, on one process or many, with early stopping.

Shape legend: n people, t training people, d features of a modality.
"""

import math
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist

from brainfusion.alignment import resume as resuming
from brainfusion.alignment.batches import Batch, Batches
from brainfusion.alignment.config import AlignConfig
from brainfusion.alignment.finetuning.grad_cache import average_gradients
from brainfusion.alignment.genes.vectors import GeneVectors
from brainfusion.alignment.modalities import modality_pairs
from brainfusion.alignment.model import Alignment
from brainfusion.alignment.network import AlignmentModel
from brainfusion.alignment.objective import BatchLoss, Objective
from brainfusion.alignment.outcome import describe, fit_head, sentence
from brainfusion.alignment.prepare import (
    check,
    conditioned,
    everyone,
    fit_conditioners,
    make_model,
    make_optimizer,
    peak_lr,
    start,
)
from brainfusion.alignment.resume import Progress
from brainfusion.alignment.validation import METRICS, Validation
from brainfusion.alignment.validation import effective_rank as effective_rank
from brainfusion.alignment.validation import pair_auc as pair_auc
from brainfusion.runtime import config as configs
from brainfusion.runtime import logs
from brainfusion.runtime.distributed import Ranks, barrier
from brainfusion.runtime.errors import NonFiniteError
from brainfusion.runtime.files import check_writable, write_json
from brainfusion.runtime.schedules import warmup_cosine
from brainfusion.runtime.signals import Stopped, StopSignals

if TYPE_CHECKING:
    from brainfusion.alignment.losses.pair_ids import PairIds


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
    present: Mapping[str, np.ndarray] | None = None,
    ids: "PairIds | None" = None,
    covariates: np.ndarray | None = None,
    covariate_names: Sequence[str] = (),
    meta: Mapping[str, Any] | None = None,
    ranks: Ranks | None = None,
    checkpoint_every: int = 0,
    resume: bool = False,
) -> TrainResult:
    """Align modalities of the same people, and keep the weights best on validation people.

    All processes are given the same arguments; rank r takes people r, r + W, ... of each batch, and
    the loss is that of the whole batch. Nothing is fitted on validation or test people.

    Args:
        features: [n, d] or gene vectors a modality, row-paired: "brain" and "dna", or several of a
            side, such as "brain_brainjepa", "brain_brainlm" and "dna" (`modalities`).
        labels: "train", "validation" or "test", a row; test rows are not looked at.
        config: The settings.
        run_dir: Gets config.yaml, metrics.jsonl, summary.json and model/.
        present: bool [n] a modality: who has it; everybody, for a modality that is not named. What
            stands in the rows of the others is not looked at.
        ids: Of all n rows: who is a positive or a negative of whom; each person is a negative of
            everybody else if omitted.
        covariates: [n, c] from `design_matrix(subjects, config.residualise)`.
        covariate_names: Their names, kept with the model.
        meta: Facts to keep with the model: provenance, hashes. JSON values.
        ranks: Where this process stands; one process if omitted.
        checkpoint_every: Steps between checkpoints in run_dir/checkpoints, which are left there;
            SIGTERM and SIGUSR1 then write one before they stop the run. 0: none.
        resume: Go on from the last of them, to the bit; otherwise they are removed.

    Returns:
        The trained alignment on the CPU, and its summary.

    Raises:
        UserError: Rows that are not paired, NaN, too few people, or covariates that do not fit
            `config.residualise`.
        CheckpointError: What there is to go on with was made with another config or other data.
        NonFiniteError: A loss that is not finite.
        Stopped: A signal came; a checkpoint was written first.
    """
    ranks = ranks or Ranks()
    rows = check(features, labels, config, covariates, present)
    has = everyone(features, len(labels)) | dict(present or {})
    pairs = modality_pairs({n: x[rows["train"]] for n, x in has.items()}, config.pair_weights)
    facts: dict[str, Any] = {}
    if checkpoint_every or resume:
        facts = resuming.facts_of(
            features, labels, config=config, present=has, ids=ids, covariates=covariates
        )
    stopped = resuming.find(run_dir, facts, ranks) if resume else None
    if ranks.is_main:
        check_writable(run_dir)
        configs.save(run_dir / "config.yaml", config)
        if not resume:
            resuming.forget(run_dir)
    with torch.random.fork_rng(devices=[]):
        # -- data ----------------------------------------------------------------------------
        conditioners = fit_conditioners(
            features, rows["train"], config, covariates, covariate_names, ranks, has
        )
        training, validation = (
            Batch(
                inputs={
                    name: conditioned(c, features[name], people, covariates, has[name]).to(
                        ranks.device
                    )
                    for name, c in conditioners.items()
                },
                present={name: x[people] for name, x in has.items()},
                ids=ids and ids.take(torch.from_numpy(people)).to(ranks.device),
            )
            for people in (rows["train"], rows["validation"])
        )
        # -- model ---------------------------------------------------------------------------
        torch.manual_seed(config.seed)
        model = make_model(config, conditioners).to(ranks.device)
        training, begun = start(model, training, config, ranks, fresh=stopped is None)
        peak = peak_lr(config, closed_form=bool(begun))
        optimizer = make_optimizer(model, config, peak)
        progress = Progress(facts=begun)
        if stopped is not None:
            progress = stopped.progress
            model.load_state_dict(stopped.weights)
            optimizer.load_state_dict(stopped.optimizer)
        look = Validation(validation, pairs, ranks)
        batches = Batches(training, config, ranks)
        objective = Objective(training, pairs, config, whole=batches.whole)
        log = logs.MetricsLog(
            run_dir / "metrics.jsonl", active=ranks.is_main, resume_step=progress.step or None
        )
        line = logs.Progress("align", config.max_steps, start=progress.step, active=ranks.is_main)
        metric = METRICS[config.early_stopping]
        if begun and not progress.step:
            # The closed form is a result already: training has to beat it.
            people, batch = batches.at(1)
            with torch.no_grad():
                loss = objective(model.eval(), batch, people, {})
            row = _row(0, _agree(loss.value, False, ranks)[0], loss, model, config) | look(model)
            progress.keep(row, model)
            log.write(**row)

        # -- the loop ------------------------------------------------------------------------
        signals = StopSignals()
        with signals if checkpoint_every else nullcontext():
            for step in range(progress.step + 1, config.max_steps + 1):
                best = progress.best
                if best and step - 1 - best["step"] >= config.patience * config.eval_every:
                    break
                begin = time.monotonic()
                lr = warmup_cosine(
                    step, start=0.0, peak=peak, end=0.0, n_warmup=config.warmup_steps,
                    n_steps=config.max_steps + 1,
                )  # fmt: skip
                for group in optimizer.param_groups:
                    group["lr"] = lr * group["relative_lr"]
                people, batch = batches.at(step)
                model.train()
                loss = objective(model, batch, people, batches.keep(model, step, len(people)))
                optimizer.zero_grad()
                loss.value.backward()
                average_gradients(model.parameters(), ranks.world_size)
                optimizer.step()
                model.clamp_scale_()

                # -- log and look at the validation people -----------------------------------
                value, stopping = _agree(loss.value, signals.received is not None, ranks)
                if not math.isfinite(value):
                    raise NonFiniteError(
                        f"the loss is {value} at step {step}: expected a finite number. Use a "
                        f"smaller lr than {peak}, or check the features for extreme values."
                    )
                seconds = time.monotonic() - begin
                row = _row(step, value, loss, model, config, lr=lr, seconds=seconds)
                progress.note(row)
                last = step == config.max_steps
                if step % config.eval_every == 0 or last:
                    row |= look(model)
                    if not best or row[metric] > best[metric]:
                        progress.keep(row, model)
                log.write(**row)
                auc = progress.best.get("validation_auc", 0.0)
                line.update(step, f"loss {value:.3f}, validation AUC {auc:.3f}")
                if checkpoint_every and (step % checkpoint_every == 0 or last or stopping):
                    if ranks.is_main:
                        resuming.save(
                            run_dir, progress, model=model, optimizer=optimizer, facts=facts,
                            world_size=ranks.world_size,
                        )  # fmt: skip
                    barrier()
                if stopping and not last:
                    raise Stopped(f"at step {step}")
        log.close()
        model.load_state_dict(progress.best_weights)

    # -- what was found --------------------------------------------------------------------------
    summary = describe(
        progress, pairs, look, rows=rows, present=has, conditioners=conditioners, config=config,
        ranks=ranks,
    )  # fmt: skip
    head = fit_head(model, training, validation, config, ranks)
    alignment = Alignment(
        model=model.cpu().eval(),
        conditioners=conditioners,
        head=head,
        info={"config": configs.to_dict(config), "summary": summary, "meta": dict(meta or {})},
    )
    if ranks.is_main:
        alignment.save(run_dir / "model")
        write_json(run_dir / "summary.json", {**summary, "meta": dict(meta or {})})
        logs.say(sentence(summary))
    barrier()
    return TrainResult(alignment=alignment, summary=summary, run_dir=run_dir)


def _row(
    step: int,
    value: float,
    loss: BatchLoss,
    model: AlignmentModel,
    config: AlignConfig,
    *,
    lr: float = 0.0,
    seconds: float = math.inf,
) -> dict[str, Any]:
    """A row of metrics.jsonl."""
    return {
        "step": step,
        "loss": value,
        "log_n": loss.chance,
        "loss_over_log_n": value / loss.chance if config.loss != "siglip" and loss.chance else None,
        "logit_scale": float(model.logit_scale.detach()),
        "logit_scale_bounds": [config.min_scale, config.max_scale],
        "lr": lr,
        "pairs_per_s": loss.n_pairs / seconds,
    }


def _agree(loss: torch.Tensor, stop: bool, ranks: Ranks) -> tuple[float, bool]:
    """The mean of the ranks' losses, and whether any of them was asked to stop."""
    both = torch.stack([loss.detach().double(), loss.new_tensor(stop, dtype=torch.float64)])
    if ranks.world_size > 1:
        dist.all_reduce(both)
    return float(both[0]) / ranks.world_size, bool(both[1] > 0)
