"""`brainfusion pretrain`: train a brain encoder on a cohort's recordings.

Writes config.yaml, metrics.jsonl and checkpoints to <workspace>/pretrain/<model>. Called again, it
goes on from the last checkpoint. Under torchrun each process takes its share of every batch. Which
options there are depends on --model and --preset: brainfusion pretrain --model brainjepa --help.
"""

import dataclasses
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import tyro

from brainfusion.cli.options import parse, take_option
from brainfusion.cli.workspace import Place, Workspace, check_replaceable, open_cohort
from brainfusion.encoders.checkpoints import known_model
from brainfusion.encoders.pretrain import pretrain
from brainfusion.encoders.pretrain_config import PretrainConfig
from brainfusion.encoders.recipes import recipe
from brainfusion.runtime import distributed, threads
from brainfusion.runtime.errors import UserError
from brainfusion.runtime.logs import say


@dataclass(frozen=True, kw_only=True, slots=True)
class PretrainOptions:
    """Options of `brainfusion pretrain`."""

    train: tyro.conf.OmitArgPrefixes[PretrainConfig]
    place: tyro.conf.OmitArgPrefixes[Place] = field(default_factory=Place)
    preset: str = "tiny"
    """Size of the encoder. tiny takes the cohort's parcels; others are published:
    5m, 13m, 111m, 650m of brainlm; small, base, large of brainjepa."""
    out: Path | None = None
    """Run folder; <workspace>/pretrain/<model> by default."""
    restart: bool = False
    """Forget an earlier run in that folder."""


def main(argv: list[str]) -> int:
    """Parse, open the cohort (making the demo cohort if need be), train."""
    model, preset = _named(argv, "--model"), _named(argv, "--preset") or "tiny"
    default = recipe(known_model(model or "brainlm"), preset)
    if model is None:
        default = dataclasses.replace(default, model=tyro.MISSING)
    options = parse(
        PretrainOptions,
        argv,
        prog="brainfusion pretrain",
        description=__doc__ or "",
        default=PretrainOptions(train=default, preset=preset),
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
        if options.restart:
            check_replaceable(run_dir, "checkpoints")
            distributed.barrier()
            if ranks.is_main:
                shutil.rmtree(run_dir, ignore_errors=True)
        distributed.barrier()
        path = pretrain(settings, cohort, run_dir, ranks=ranks)
        if ranks.is_main:
            say(f"checkpoint: {path}")
            flags = " ".join(workspace.options())
            say(f"next: brainfusion embed --model {settings.model} {flags}".rstrip())
    return 0


def _named(argv: list[str], name: str) -> str | None:
    """What `argv` says for `name`, which decides which other options there are."""
    return take_option(argv, name)[0]
