"""Pretraining of a brain encoder on a cohort's recordings: one loop for both models.

Batches, masks and schedules are pure functions of (seed, step, rank), so a resumed run goes on bit
for bit and there is nothing to restore but weights and optimiser.
"""

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from brainfusion.data.cohort import Cohort
from brainfusion.encoders.checkpoints import (
    build,
    describe_training_data,
    encoder_weights,
    load_into,
)
from brainfusion.encoders.objectives import Objective, objective_for
from brainfusion.encoders.pretrain_config import OptimConfig, PretrainConfig
from brainfusion.encoders.pretrain_inputs import PretrainInputs
from brainfusion.runtime import checkpoint, config, files, schedules
from brainfusion.runtime.distributed import Ranks, barrier, mean_over_ranks
from brainfusion.runtime.errors import CheckpointError, NonFiniteError, UserError
from brainfusion.runtime.logs import MetricsLog, Progress, read_metrics, say
from brainfusion.runtime.memory import peak_mib


def pretrain(settings: PretrainConfig, cohort: Cohort, run_dir: Path, *, ranks: Ranks) -> Path:
    """Train until `optim.steps`; returns the last checkpoint. Called again, it resumes.

    Raises:
        UserError: The cohort does not fit the encoder.
        CheckpointError: The run was made with another config, or on another state of the cohort.
        NonFiniteError: A loss was not finite on some rank; all ranks stop together.
    """
    optim, run = settings.optim, settings.run
    if optim.batch_size % ranks.world_size:
        raise UserError(
            f"optim.batch_size={optim.batch_size} does not divide over {ranks.world_size} "
            f"processes: use a multiple of {ranks.world_size}."
        )

    # -- data ----------------------------------------------------------------------------------
    inputs = PretrainInputs.fit(settings, cohort)

    # -- model, optimiser ----------------------------------------------------------------------
    torch.manual_seed(run.seed)
    encoder = build(settings.model, settings.encoder, cohort, inputs.train_rows)
    objective = objective_for(encoder, cohort.atlas, momentum=optim.momentum).to(ranks.device)
    optimizer = torch.optim.AdamW(_groups(objective), lr=optim.lr, betas=optim.betas)

    # -- resume --------------------------------------------------------------------------------
    start = 0
    if checkpoint.steps(run_dir):
        start = _resume(settings, run_dir, cohort, encoder, optimizer)
    if start >= optim.steps and (run_dir / "summary.json").exists():
        if ranks.is_main:
            say(f"{run_dir} is already trained to step {start}; --restart trains it anew.")
        return checkpoint.newest(run_dir)
    if ranks.is_main:
        files.check_writable(run_dir)
        config.save(run_dir / "config.yaml", settings)
        n_weights = sum(p.numel() for p in encoder.parameters())
        say(
            f"pretraining {settings.model} ({n_weights:,} parameters) on {len(inputs.train_rows)} "
            f"recordings of '{cohort.name}', {ranks.world_size} process(es), {ranks.device.type}"
            + (f", resumed at step {start}" if start else "")
        )
    barrier()
    if settings.efficiency.activation_checkpointing:
        encoder.set_activation_checkpointing(True)  # type: ignore[operator]
    if settings.efficiency.compile:
        objective.compile()
    module: nn.Module = objective
    if ranks.world_size > 1:
        cuda = [ranks.device.index] if ranks.device.type == "cuda" else None
        module = DistributedDataParallel(objective, device_ids=cuda)
    log = MetricsLog(run_dir / "metrics.jsonl", active=ranks.is_main, resume_step=start or None)
    progress = Progress(settings.model, optim.steps, start=start, active=ranks.is_main)
    evaluate = _Validation(settings, inputs, objective, ranks)
    begin, validation = time.monotonic(), evaluate()
    if start == 0:
        log.write(step=0, **validation)

    # -- the loop ------------------------------------------------------------------------------
    note = f"validation {validation['validation_loss']:.4f}"
    for step in range(start, optim.steps):
        seed_dropout(run.seed, step, ranks.rank)
        lr, decay = schedule(optim, step)
        for group in optimizer.param_groups:
            group["lr"] = lr
            group["weight_decay"] = decay if group["decays"] else 0.0
        bold = inputs.batch(optim.batch_size, seed=run.seed, step=step, ranks=ranks)
        batch = torch.from_numpy(bold).to(ranks.device)
        draws = objective.draw(optim.batch_size, seed=run.seed, step=step)
        draws = [draw[ranks.rank :: ranks.world_size].to(ranks.device) for draw in draws]

        with _autocast(settings, ranks):
            loss = module(batch, *draws)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(objective.parameters(), optim.clip or float("inf"))
        _check_finite(loss, norm, step, ranks)
        optimizer.step()
        objective.after_step(step + 1, optim.steps)

        done = step + 1
        fresh = done % run.validate_every == 0 or done == optim.steps
        if fresh:
            validation = evaluate()
        if fresh or done % run.log_every == 0:
            seen = (done - start) * optim.batch_size
            mean_loss = float(mean_over_ranks(loss))
            note = f"loss {mean_loss:.4f}, validation {validation['validation_loss']:.4f}"
            log.write(
                step=done,
                loss=mean_loss,
                lr=lr,
                weight_decay=decay,
                grad_norm=float(norm),
                windows_per_s=seen / (time.monotonic() - begin),
                **(validation if fresh else {}),
            )
        progress.update(done, note)
        if ranks.is_main and (done % run.save_every == 0 or done == optim.steps):
            checkpoint.save(
                run_dir,
                done,
                weights=encoder_weights(encoder),
                optimizer=optimizer.state_dict(),
                state={
                    "model": settings.model,
                    "config": config.to_dict(settings),
                    "config_class": type(settings.encoder).__name__,
                    "conditioning": inputs.conditioning.to_dict(),
                    **describe_training_data(cohort, inputs.train_rows),
                },
                keep_last=run.keep_last,
            )

    # -- summary -------------------------------------------------------------------------------
    log.close()
    if ranks.is_main:
        rows = read_metrics(run_dir / "metrics.jsonl")  # those before a resume too
        files.write_json(
            run_dir / "summary.json",
            {
                "model": settings.model,
                "n_steps": optim.steps,
                "n_parameters": sum(p.numel() for p in encoder.parameters()),
                "seconds": round(time.monotonic() - begin, 2),
                "world_size": ranks.world_size,
                "final_loss": rows[-1].get("loss"),
                "first": {name: rows[0].get(name) for name in validation},
                "last": validation,
                "peak_mib": peak_mib(),
            },
        )
    barrier()
    return checkpoint.newest(run_dir)


class _Validation:
    """The loss on fixed windows and fixed masks of validation people, shared over the ranks."""

    def __init__(
        self,
        settings: PretrainConfig,
        inputs: PretrainInputs,
        objective: Objective,
        ranks: Ranks,
    ) -> None:
        self._settings, self._objective, self._ranks = settings, objective, ranks
        rows = inputs.validation_rows
        n_rows = min(len(rows), settings.run.n_validation)
        n_rows -= n_rows % ranks.world_size
        if not n_rows:
            raise UserError(
                f"{len(rows)} validation recordings (at most {settings.run.n_validation} are used) "
                f"do not go round {ranks.world_size} processes: use fewer processes, or a larger "
                "--n-validation."
            )
        draws = objective.draw(n_rows, seed=settings.run.seed, step=2**31)
        mine = slice(ranks.rank, None, ranks.world_size)
        windows = [inputs.first_window(row) for row in rows[:n_rows][mine]]
        self._bold = torch.from_numpy(np.stack(windows))
        self._draws: list[Tensor] = [draw[mine] for draw in draws]

    @torch.no_grad()
    def __call__(self) -> dict[str, float]:
        """The mean over chunks and ranks."""
        self._objective.eval()
        rows, pooled = len(self._bold), []
        totals: dict[str, float] = {}
        for part in zip(*(x.split(16) for x in (self._bold, *self._draws)), strict=True):
            batch, *draws = (x.to(self._ranks.device) for x in part)
            values = {"validation_loss": float(self._objective(batch, *draws))}
            values |= self._objective.diagnose(batch, draws)
            for name, value in values.items():
                totals[name] = totals.get(name, 0.0) + value * len(batch) / rows
            pooled.append(self._objective.pooled(batch))
        self._objective.train()
        means = mean_over_ranks(torch.tensor(list(totals.values()), device=self._ranks.device))
        return dict(zip(totals, means.tolist(), strict=True)) | self._spread(pooled)

    def _spread(self, parts: list[Tensor | None]) -> dict[str, float]:
        """Standard deviation of features over all ranks' windows; one window alone has none."""
        found = [part for part in parts if part is not None]
        if not found or len(self._bold) * self._ranks.world_size < 2:
            return {}
        x = torch.cat(found).double()
        mean, square = mean_over_ranks(torch.stack([x.mean(0), x.square().mean(0)]))
        return {"feature_std": float((square - mean.square()).clamp_min(0).sqrt().mean())}


def seed_dropout(seed: int, step: int, rank: int) -> None:
    """Make torch's own draws of this step, dropout, a function of (seed, step, rank)."""
    torch.manual_seed(int(np.random.SeedSequence([seed, step, rank]).generate_state(1)[0]))


def _groups(objective: nn.Module) -> list[dict[str, Any]]:
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
        start=optim.lr * 0.05,
        peak=optim.lr,
        end=optim.lr_end,
        n_warmup=optim.warmup_share * optim.steps,
        n_steps=optim.steps,
    )
    return lr, schedules.cosine(step + 1, optim.weight_decay, optim.weight_decay_end, optim.steps)


def _resume(
    settings: PretrainConfig,
    run_dir: Path,
    cohort: Cohort,
    encoder: nn.Module,
    optimizer: torch.optim.Optimizer,
) -> int:
    folder = checkpoint.newest(run_dir)
    state = checkpoint.load_state(folder)
    before, now = dict(state["config"]), config.to_dict(settings)
    del before["efficiency"], now["efficiency"]  # these may change
    if changed := _differences(before, now):
        raise CheckpointError(
            f"{run_dir} was trained with another config ({'; '.join(changed)}): give another "
            "--out, or --restart to train it anew."
        )
    for name, hash_now in (("cohort", cohort.hash), ("splits", cohort.splits().hash)):
        if (hash_before := state.get(f"{name}_hash", hash_now)) != hash_now:
            raise CheckpointError(
                f"{run_dir} was trained on another state of the cohort ({name} {hash_before}, now "
                f"{hash_now}): give another --out, or --restart to train it anew."
            )
    load_into(encoder, folder)
    optimizer.load_state_dict(checkpoint.load_optimizer(folder))
    return int(state["step"])


def _differences(before: Any, now: Any, where: str = "") -> list[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        names = sorted({*before, *now})
        return [
            text
            for name in names
            for text in _differences(before.get(name), now.get(name), f"{where}.{name}".strip("."))
        ]
    return [] if before == now else [f"{where}: {before} -> {now}"]


def _autocast(settings: PretrainConfig, ranks: Ranks) -> torch.autocast:
    on = settings.efficiency.precision == "bfloat16"
    return torch.autocast(ranks.device.type, torch.bfloat16, enabled=on)


def _check_finite(loss: Tensor, norm: Tensor, step: int, ranks: Ranks) -> None:
    """Stop all ranks together before the weights are spoilt, naming the ranks that are to blame.

    `norm`, of the gradients, is the same on all of them.
    """
    bad = torch.zeros(ranks.world_size, device=loss.device)
    bad[ranks.rank] = float(not torch.isfinite(loss.detach()))
    if ranks.world_size > 1:
        dist.all_reduce(bad)
    if bad.any() or not torch.isfinite(norm):
        culprits = bad.nonzero().flatten().tolist()
        what = f"loss is not finite at step {step} on rank(s) {culprits}"
        if not culprits:
            what = f"gradient is not finite at step {step}, though the loss is"
        raise NonFiniteError(
            f"the {what}: lower --lr, and check the cohort's recordings with Cohort.validate(). "
            "Checkpoints are from before this step."
        )
