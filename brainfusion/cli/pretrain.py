"""`brainfusion pretrain`: train a brain encoder on a cohort's recordings."""

import dataclasses
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import tyro

from brainfusion.cli.options import parse, take_option
from brainfusion.cli.workspace import Place, Workspace, open_cohort
from brainfusion.encoders import ENCODERS
from brainfusion.encoders.checkpoints import known_model
from brainfusion.encoders.pretrain import PretrainConfig, pretrain
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
    """Size of the encoder. tiny takes the cohort's parcels; the others are the published ones."""
    out: Path | None = None
    """Run folder; <workspace>/pretrain/<model> by default."""
    restart: bool = False
    """Forget an earlier run in that folder."""


def main(argv: list[str]) -> int:
    """Parse, open the cohort (making the demo cohort if need be), train."""
    model, _ = take_option(argv, "--model")
    preset, _ = take_option(argv, "--preset")
    default = recipe(known_model(model or "brainlm"), preset or "tiny")
    options = parse(
        PretrainOptions,
        argv,
        prog="brainfusion pretrain",
        description=__doc__ or "",
        default=PretrainOptions(train=default, preset=preset or "tiny"),
        config_field="train",
    )
    if model is None:
        raise UserError(f"which encoder? Give --model: {' or '.join(ENCODERS)}.")
    workspace = Workspace.of(options.place)
    settings = options.train
    with distributed.session(settings.efficiency.device) as ranks:
        threads.use_threads(settings.efficiency.threads, n_processes=ranks.world_size)
        cohort = open_cohort(workspace, ranks)
        if options.preset == "tiny":
            encoder = dataclasses.replace(settings.encoder, n_parcels=cohort.atlas.n_parcels)
            settings = dataclasses.replace(settings, encoder=encoder)
        run_dir = options.out or workspace.pretrain_dir(settings.model)
        if options.restart and ranks.is_main:
            shutil.rmtree(run_dir, ignore_errors=True)
        distributed.barrier()
        path = pretrain(settings, cohort, run_dir, ranks=ranks)
        if ranks.is_main:
            say(f"checkpoint: {path}")
            flags = " ".join(workspace.options())
            say(f"next: brainfusion embed --model {settings.model} {flags}".rstrip())
    return 0
