"""How each encoder is trained by default, by preset."""

from brainfusion.encoders import ENCODERS
from brainfusion.encoders.pretrain_config import DataConfig, OptimConfig, PretrainConfig, RunConfig
from brainfusion.runtime.errors import UserError, nearest

STANDARDISERS = {"brainlm": "recording-zscore", "brainjepa": "recording-zscore"}


def recipe(model: str, preset: str) -> PretrainConfig:
    """The training settings of a preset.

    `tiny` trains in about a minute on two cores. The published sizes take the batch, learning rate
    and weight decay of their papers (BrainLM: batch 256, 1e-3, 0.05; Brain-JEPA: batch 512, 1e-3,
    0.04 to 0.4, EMA 0.996 to 1), for one pass that you choose with `--steps`.

    Raises:
        UserError: No such preset.
    """
    presets = ENCODERS[model].presets
    if preset not in presets:
        raise UserError(f"unknown preset '{preset}' for {model}. {nearest(preset, presets)}")
    run = RunConfig()
    if preset == "tiny" and model == "brainlm":
        # Masked R2 stays at 0 for some hundred steps, then rises: many small steps, not few large.
        optim = OptimConfig(steps=800, batch_size=4, lr=3e-3)
        run = RunConfig(log_every=20, validate_every=100, save_every=400)
    elif preset == "tiny":
        optim = OptimConfig(steps=200, batch_size=8)
    elif model == "brainlm":
        optim = OptimConfig(steps=1500, batch_size=256, warmup_share=0.05, weight_decay_end=0.05)
    else:
        optim = OptimConfig(
            steps=20_000,
            batch_size=512,
            warmup_share=40 / 300,
            weight_decay=0.04,
            weight_decay_end=0.4,
        )
    return PretrainConfig(
        model=model,
        encoder=presets[preset],
        data=DataConfig(standardiser=STANDARDISERS[model]),
        optim=optim,
        run=run,
    )
