"""How each encoder is trained: the published recipes, and tiny ones for a laptop.

A recipe is optimiser, schedules, batch, accumulation, length and precision. How recordings are
scaled and sampled is not part of it: that has to fit the cohort (docs/upstream.md).
"""

from brainfusion.encoders import ENCODERS
from brainfusion.encoders.pretrain_config import (
    DataConfig,
    EfficiencyConfig,
    OptimConfig,
    PretrainConfig,
    WatchConfig,
)
from brainfusion.runtime.errors import UserError, nearest

STANDARDISERS = {"brainlm": "recording-zscore", "brainjepa": "recording-zscore"}
DIVIDE_BY = {("brainjepa", "tiny"): 0.1}
"""Scales by model and preset. Its patches enter a tiny Brain-JEPA ten times as large: otherwise
positions are nearly all of the targets, and features of them alone make the loss small."""
RECIPES = ("tiny", "published")

_Parts = tuple[OptimConfig, WatchConfig, EfficiencyConfig]


def recipe(model: str, preset: str, name: str | None = None) -> PretrainConfig:
    """The training settings of a preset.

    Args:
        model: An encoder.
        preset: One of its sizes.
        name: "tiny" trains in little more than a minute on a core; "published" is the authors',
            in epochs, which become steps once the cohort is known. By default that of the preset.

    Raises:
        UserError: No such preset or recipe.
    """
    presets = ENCODERS[model].presets
    if preset not in presets:
        raise UserError(f"unknown preset '{preset}' for {model}. {nearest(preset, presets)}")
    name = name or ("tiny" if preset == "tiny" else "published")
    if name not in RECIPES:
        raise UserError(f"unknown recipe '{name}'. {nearest(name, RECIPES)}")
    make = {"tiny": _tiny, "published": _published}[name]
    optim, watch, efficiency = make(model)
    return PretrainConfig(
        model=model,
        encoder=presets[preset],
        data=DataConfig(
            standardiser=STANDARDISERS[model], divide_by=DIVIDE_BY.get((model, preset), 1.0)
        ),
        optim=optim,
        watch=watch,
        efficiency=efficiency,
    )


def _tiny(model: str) -> _Parts:
    if model == "brainlm":
        # Masked R2 stays at 0 for a hundred steps, then rises: many small steps, not few large.
        optim = OptimConfig(
            steps=1000,
            batch_size=4,
            lr=3e-3,
            weight_decay=0.01,
            weight_decay_end=0.01,
            betas=(0.9, 0.98),
        )
        return (
            optim,
            WatchConfig(log_every=20, validate_every=100, save_every=400),
            EfficiencyConfig(),
        )
    # The target encoder follows within a quarter of so short a run; at 0.996 it would hardly move.
    optim = OptimConfig(steps=200, batch_size=8, momentum=(0.98, 1.0))
    return optim, WatchConfig(), EfficiencyConfig()


def _published(model: str) -> _Parts:
    """Departures are listed in docs/upstream.md, "Training here"."""
    watch = WatchConfig(
        log_every=20, validate_every=200, save_every=500, keep_every=5000, probe_every=1000
    )
    if model == "brainlm":
        # Ortega Caro et al. 2024; the arguments saved with the repository's checkpoint: 8 windows
        # x 32 batches a step on one GPU, float32.
        optim = OptimConfig(
            steps=0,
            epochs=500,
            batch_size=256,
            lr=1e-3,
            lr_start_share=0.0,
            lr_end=0.0,
            warmup_share=0.05,
            weight_decay=0.05,
            weight_decay_end=0.05,
            clip=1.0,
        )
        return optim, watch, EfficiencyConfig(accumulation=32)
    # Dong et al. 2024, configs of the repository: 16 windows x 4 GPUs x 8 batches a step.
    optim = OptimConfig(
        steps=0,
        epochs=300,
        batch_size=512,
        lr=1e-3,
        lr_start_share=0.05,
        lr_end=1e-6,
        warmup_share=40 / 300,
        weight_decay=0.04,
        weight_decay_end=0.4,
        clip=0.0,
        momentum=(0.996, 1.0),
    )
    return optim, watch, EfficiencyConfig(accumulation=8, precision="bfloat16")
