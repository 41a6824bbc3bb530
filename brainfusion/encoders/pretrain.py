"""Pretraining of a brain encoder on a cohort's recordings: one loop for both models.

Batches, masks and schedules are pure functions of (seed, step, rank), so a resumed run goes on bit
for bit and there is nothing to restore but weights and optimiser.
"""

import dataclasses
import functools
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from brainfusion.data.cohort import Cohort
from brainfusion.data.prefetch import Prefetch
from brainfusion.encoders import boards, parallel, resume
from brainfusion.encoders.checkpoints import build
from brainfusion.encoders.objectives import objective_for
from brainfusion.encoders.online_probe import OnlineProbe
from brainfusion.encoders.optimiser import apply_schedule, groups, target_momentum
from brainfusion.encoders.pretrain_config import PretrainConfig
from brainfusion.encoders.pretrain_inputs import PretrainInputs
from brainfusion.encoders.validation import Validation, collapse_alarm
from brainfusion.runtime import checkpoint, config, files, watchdog
from brainfusion.runtime.distributed import Ranks, barrier, check_same, mean_over_ranks
from brainfusion.runtime.logs import MetricsLog, Progress, log_file, read_metrics, say
from brainfusion.runtime.memory import device_peak_mib, peak_mib
from brainfusion.runtime.meter import Meter
from brainfusion.runtime.signals import Stopped, StopSignals


def pretrain(settings: PretrainConfig, cohort: Cohort, run_dir: Path, *, ranks: Ranks) -> Path:
    """Train until `optim.steps`; returns the last checkpoint. Called again, it resumes.

    Raises:
        UserError: The cohort does not fit the encoder, or processes do not see the same.
        CheckpointError: The run was made with another config, or on another state of the cohort.
        NonFiniteError: A loss was not finite on some rank; all ranks stop together.
        Stopped: SIGTERM or SIGUSR1 came; a checkpoint was written first.
    """
    parallel.check_shares(settings, ranks)
    if settings.watch.tensorboard:
        boards.check_installed()

    # -- data ----------------------------------------------------------------------------------
    inputs = PretrainInputs.fit(settings, cohort)
    settings = dataclasses.replace(settings, optim=settings.optim.sized(len(inputs.train_rows)))
    optim, run, watch, efficiency = (
        settings.optim, settings.run, settings.watch, settings.efficiency,
    )  # fmt: skip
    check_same(resume.facts(settings, inputs, cohort), ranks)

    # -- model ---------------------------------------------------------------------------------
    torch.manual_seed(run.seed)
    encoder = build(settings.model, settings.encoder, cohort, inputs.train_rows)
    objective = objective_for(encoder, cohort.atlas, masks=optim.masks).to(ranks.device)
    n_parameters = sum(p.numel() for p in encoder.parameters())
    start = resume.resume(settings, run_dir, cohort, encoder, ranks)
    if start >= optim.steps and (run_dir / "summary.json").exists():
        say(f"{run_dir} is already trained to step {start}; --restart trains it anew.")
        return checkpoint.newest(run_dir)
    if ranks.is_main:
        files.check_writable(run_dir)
        config.save(run_dir / "config.yaml", settings)
        watchdog.clear(run_dir / "ranks")
    barrier()
    if efficiency.activation_checkpointing:
        encoder.set_activation_checkpointing(True)  # type: ignore[operator]
    if efficiency.compile:
        objective.compile()
    module = parallel.distribute(objective, settings, ranks)

    # -- optimiser -----------------------------------------------------------------------------
    optimizer = torch.optim.AdamW(groups(objective), lr=optim.lr, betas=optim.betas)
    if start:
        parallel.load_optimizer(
            run_dir, objective=objective, optimizer=optimizer, settings=settings
        )
    state = resume.state_of(settings, inputs, cohort, ranks)
    save = functools.partial(
        parallel.save, run_dir, objective=objective, optimizer=optimizer, state=state,
        settings=settings, ranks=ranks,
    )  # fmt: skip
    autocast = functools.partial(
        torch.autocast,
        ranks.device.type,
        torch.bfloat16,
        enabled=efficiency.precision == "bfloat16",
    )

    # -- what watches it -----------------------------------------------------------------------
    evaluate = Validation(settings, inputs, objective, ranks)
    probe = OnlineProbe(settings, inputs, cohort, objective, ranks) if watch.probe_every else None

    def make(step: int) -> tuple[Tensor, list[Tensor]]:
        """This rank's windows and random draws of a step."""
        bold = inputs.batch(optim.batch_size, seed=run.seed, step=step, ranks=ranks)
        draws = objective.draw(optim.batch_size, seed=run.seed, step=step)
        return torch.from_numpy(bold), [draw[ranks.rank :: ranks.world_size] for draw in draws]

    with (
        log_file(run_dir / "run.log"),
        StopSignals() as signals,
        watchdog.Watchdog(run_dir / "ranks", ranks, limit_s=watch.watchdog_s) as place,
        Prefetch(
            make, start, optim.steps, depth=efficiency.prefetch, workers=efficiency.workers,
            pin=ranks.device.type == "cuda",
        ) as batches,
    ):  # fmt: skip
        say(
            f"pretraining {settings.model} ({n_parameters:,} parameters) on "
            f"{len(inputs.train_rows)} recordings of '{cohort.name}', {optim.steps} steps of "
            f"{optim.batch_size} windows, {ranks.world_size} process(es), {ranks.device.type}"
            + (f", resumed at step {start}" if start else "")
        )
        log = MetricsLog(run_dir / "metrics.jsonl", active=ranks.is_main, resume_step=start or None)
        board = boards.Board(run_dir / "board", active=watch.tensorboard and ranks.is_main)
        progress = Progress(settings.model, optim.steps, start=start, active=ranks.is_main)
        begin, validation = time.monotonic(), evaluate()
        if start == 0:
            log.write(step=0, **validation, **(probe() if probe else {}))
        first = read_metrics(run_dir / "metrics.jsonl")[:1] if ranks.is_main else []
        note = f"validation {validation['validation_loss']:.4f}"
        meter, n_windows, collapsed = Meter(), 0, False

        # -- the loop --------------------------------------------------------------------------
        for step in range(start, optim.steps):
            place.at(f"reading the batch of step {step}")
            batch, draws = next(batches)
            batch, *draws = (x.to(ranks.device, non_blocking=True) for x in (batch, *draws))
            seed_dropout(run.seed, step, ranks.rank)
            lr, decay = apply_schedule(optimizer, optim, step)

            place.at(f"the loss and the all_reduce of gradients of step {step}", waits=True)
            optimizer.zero_grad(set_to_none=True)
            loss = parallel.accumulate(
                module, batch, draws, n_parts=efficiency.accumulation, autocast=autocast
            )
            norm = parallel.clip(objective, optim.clip)
            rows = functools.partial(inputs.rows_of, optim.batch_size, run.seed, step, ranks)
            stopping = parallel.agree(
                loss, norm, step, ranks, stop=signals.received is not None, rows=rows
            )
            optimizer.step()
            objective.after_step(target_momentum(optim, step))

            done, n_windows = step + 1, n_windows + optim.batch_size
            last = done == optim.steps
            fresh = done % watch.validate_every == 0 or last
            row: dict[str, float] = {}
            if fresh:
                meter.pause()
                place.at(f"the validation after step {step}", waits=True)
                row = validation = evaluate()
                evaluate.save_reconstruction(run_dir / "reconstruction.npz")
                alarm = collapse_alarm(first[0], validation) if first else None
                if alarm and not collapsed:
                    say(f"step {done}: {alarm}")
                collapsed = alarm is not None
                meter.go_on()
            if probe and (done % watch.probe_every == 0 or last):
                meter.pause()
                place.at(f"the probe after step {step}", waits=True)
                row = {**row, **probe()}
                meter.go_on()
            if row or done % watch.log_every == 0:
                place.at(f"the mean of the losses of step {step}", waits=True)
                mean_loss = float(mean_over_ranks(loss))
                note = f"loss {mean_loss:.4f}, validation {validation['validation_loss']:.4f}"
                row = {
                    "loss": mean_loss,
                    "lr": lr,
                    "weight_decay": decay,
                    "grad_norm": float(norm),
                    **meter.read(n_windows, batches.waited_s),
                    **device_peak_mib(ranks.device),
                    "peak_mib": peak_mib(),
                    **row,
                }
                n_windows = 0
                log.write(step=done, **row)
                board.write(step=done, **row)
            progress.update(done, note)
            if done % watch.save_every == 0 or last or stopping:
                place.at(f"writing the checkpoint of step {done}")
                save(done)
            if stopping and not last:
                say(f"asked to stop: saved step {done}; the same command goes on from there.")
                barrier()
                raise Stopped(f"at step {done}")
        place.at("the end", waits=True)
        log.close()
        board.close()

    # -- summary -------------------------------------------------------------------------------
    if ranks.is_main:
        rows = read_metrics(run_dir / "metrics.jsonl")  # those before a resume too
        files.write_json(
            run_dir / "summary.json",
            {
                "model": settings.model,
                "n_steps": optim.steps,
                "n_parameters": n_parameters,
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


def seed_dropout(seed: int, step: int, rank: int) -> None:
    """Make torch's own draws of this step, dropout, a function of (seed, step, rank)."""
    torch.manual_seed(int(np.random.SeedSequence([seed, step, rank]).generate_state(1)[0]))
