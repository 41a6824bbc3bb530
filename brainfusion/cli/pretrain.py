"""`brainfusion pretrain`: train a brain encoder on a cohort's recordings.

Writes config.yaml, metrics.jsonl, run.log and checkpoints to <workspace>/pretrain/<model>. Called
again, it goes on from the last checkpoint, to the bit. SIGTERM and SIGUSR1 make it save and leave
with exit code 75. Under torchrun each process takes its share of every batch (docs/slurm.sbatch).
Defaults depend on --model, --preset and --recipe: brainfusion pretrain --model brainjepa --help.
"""

import dataclasses
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import tyro

from brainfusion.cli.options import parse, take_option
from brainfusion.cli.workspace import Place, Workspace, check_replaceable, open_cohort
from brainfusion.encoders.checkpoints import known_model
from brainfusion.encoders.pretrain import pretrain
from brainfusion.encoders.pretrain_config import PretrainConfig
from brainfusion.encoders.recipes import recipe
from brainfusion.runtime import checkpoint, distributed, threads
from brainfusion.runtime.errors import UserError
from brainfusion.runtime.logs import say
from brainfusion.runtime.signals import STOPPED, Stopped


@dataclass(frozen=True, kw_only=True, slots=True)
class PretrainOptions:
    """Options of `brainfusion pretrain`."""

    train: tyro.conf.OmitArgPrefixes[PretrainConfig]
    place: tyro.conf.OmitArgPrefixes[Place] = field(default_factory=Place)
    preset: str = "tiny"
    """Size of the encoder. tiny takes the cohort's parcels; others are published:
    5m, 13m, 111m, 650m of brainlm; small, base, large of brainjepa."""
    recipe: str = "tiny"
    """How it is trained: tiny, for a laptop, or published; that of the preset by default."""
    out: Path | None = None
    """Run folder; <workspace>/pretrain/<model> by default."""
    resume: Literal["auto", "must", "never"] = "auto"
    """auto: go on from the last checkpoint, if there is one. must, never: stop if there is none,
    or if there is one."""
    restart: bool = False
    """Forget an earlier run in that folder."""


def main(argv: list[str]) -> int:
    """Parse, open the cohort (making the demo cohort if need be), train."""
    model, preset = _named(argv, "--model"), _named(argv, "--preset") or "tiny"
    name = _named(argv, "--recipe") or ("tiny" if preset == "tiny" else "published")
    default = recipe(known_model(model or "brainlm"), preset, name)
    if model is None:
        default = dataclasses.replace(default, model=tyro.MISSING)
    options = parse(
        PretrainOptions,
        argv,
        prog="brainfusion pretrain",
        description=__doc__ or "",
        default=PretrainOptions(train=default, preset=preset, recipe=name),
        config_field="train",
    )
    if options.train.model != model:
        raise UserError(
            f"--config is of a {options.train.model} run but --model is {model or 'not given'}: "
            f"say --model {known_model(options.train.model)}, so that what it leaves out is known."
        )
    workspace = Workspace.of(options.place)
    settings = options.train
    with distributed.session(settings.efficiency.device) as ranks:
        threads.use_threads(settings.efficiency.threads, n_processes=ranks.world_size)
        cohort = open_cohort(workspace, ranks)
        # An explicit --n-parcels stays, and is refused when the cohort has another number.
        if options.preset == "tiny" and settings.encoder.n_parcels == default.encoder.n_parcels:
            encoder = dataclasses.replace(settings.encoder, n_parcels=cohort.atlas.n_parcels)
            settings = dataclasses.replace(settings, encoder=encoder)
        run_dir = options.out or workspace.pretrain_dir(settings.model)
        _check_resume(options, run_dir)
        if options.restart:
            check_replaceable(run_dir, "checkpoints")
            distributed.barrier()
            if ranks.is_main:
                shutil.rmtree(run_dir, ignore_errors=True)
        distributed.barrier()
        try:
            path = pretrain(settings, cohort, run_dir, ranks=ranks)
        except Stopped:
            return STOPPED
        if ranks.is_main:
            say(f"checkpoint: {path}")
            flags = " ".join(workspace.options())
            say(f"next: brainfusion embed --model {settings.model} {flags}".rstrip())
    return 0


def _check_resume(options: PretrainOptions, run_dir: Path) -> None:
    """Refuse a folder that holds what `--resume` says it must not, or lacks what it must hold."""
    found = bool(checkpoint.steps(run_dir))
    if options.restart and options.resume == "must":
        raise UserError("--restart forgets a run and --resume must goes on with it: give one.")
    if options.resume == "must" and not found:
        raise UserError(
            f"--resume must: {run_dir} holds no checkpoint to go on from; check --out and "
            "--workspace, or leave --resume out to start there."
        )
    if options.resume == "never" and found and not options.restart:
        raise UserError(
            f"--resume never: {run_dir} holds checkpoints; give another --out, or --restart to "
            "train it anew."
        )


def _named(argv: list[str], name: str) -> str | None:
    """What `argv` says for `name`, which decides which other options there are."""
    return take_option(argv, name)[0]
