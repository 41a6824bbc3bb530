"""`brainfusion simulate`: make a simulated cohort with a planted (or no) link.

Recordings, people, DNA embeddings as each model's users store them, and the truth. A preset fills
what is not given; the same options give the same bytes.
"""

from dataclasses import dataclass, field
from pathlib import Path

import tyro

from brainfusion.cli.options import parse, take_option
from brainfusion.data.simulate import PRESETS, SimulationConfig, simulate
from brainfusion.runtime.errors import UserError, nearest
from brainfusion.runtime.logs import say


@dataclass(frozen=True, kw_only=True, slots=True)
class SimulateOptions:
    """Options of `brainfusion simulate`; a preset fills what is not given."""

    out: Path
    """The cohort folder to make."""
    overwrite: bool = False
    """Replace a simulated cohort that is there."""
    config: tyro.conf.OmitArgPrefixes[SimulationConfig] = field(default_factory=SimulationConfig)


def main(argv: list[str]) -> int:
    """Write the cohort and say where it is."""
    preset, argv = take_option(argv, "--preset")
    preset = preset or "demo"
    if preset not in PRESETS:
        raise UserError(f"unknown preset '{preset}'. {nearest(preset, PRESETS)}")
    options = parse(
        SimulateOptions,
        argv,
        prog="brainfusion simulate",
        description=f"{__doc__}\nPresets: {', '.join(PRESETS)}.",
        default=SimulateOptions(out=tyro.MISSING, config=PRESETS[preset]),
        config_field="config",
    )
    config = options.config
    if config.preset != preset:
        raise UserError(
            f"the config says preset '{config.preset}' but the command '{preset}': say "
            f"--preset {config.preset} too, so that what the file leaves out is filled from it."
        )
    simulate(options.out, config, overwrite=options.overwrite)
    say(
        f"{options.out}: simulated cohort '{config.preset}', {config.n_people} people x "
        f"{config.n_parcels} parcels x {config.n_trs} TRs, seed {config.seed}"
    )
    return 0
