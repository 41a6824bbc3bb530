"""Everything that decides a pretraining run, grouped by what it changes."""

from dataclasses import dataclass, field
from typing import Any, Literal

from brainfusion.data.resample import Resampling
from brainfusion.data.standardise import check_divisor
from brainfusion.encoders.brainjepa import BrainJEPAConfig
from brainfusion.encoders.brainlm import BrainLMConfig
from brainfusion.encoders.brainlm_image import BrainLMImageConfig
from brainfusion.runtime.errors import UserError


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """What the encoder sees."""

    standardiser: str = "recording-zscore"
    """How recordings are scaled: fitted on training people, saved with each checkpoint."""
    divide_by: float = 1.0
    """A constant that scaled values are divided by; the image-shaped BrainLM's is 5.6430855."""
    tr_s: float | None = None
    """Seconds between frames that recordings are resampled to before windows are cut,
    0.735 for BrainLM and 2.0 for Brain-JEPA; by default the cohort's own."""
    resampling: Resampling = "linear"
    """linear, or nearest as for Brain-JEPA; no anti-alias filter is applied."""
    frames: Literal["consecutive", "brainjepa"] = "consecutive"
    """consecutive: a window is a run of frames.
    brainjepa: every third or so, as its pretraining takes 160 of 480; for a TR of about 0.7 s."""

    def __post_init__(self) -> None:
        check_divisor(self.divide_by)
        if self.tr_s is not None and not 0.01 < self.tr_s < 60:
            raise UserError(
                f"tr_s={self.tr_s}: expected the seconds between frames, from 0.01 to 60; a TR in "
                "milliseconds is divided by 1000."
            )
        if self.tr_s is not None and self.frames == "brainjepa":
            raise UserError(
                f"tr_s={self.tr_s:g} with frames='brainjepa': the latter thins recordings out by "
                "itself, to 3.01 times their TR; leave one of the two out."
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimConfig:
    """AdamW with warm-up and cosine; no weight decay on biases and norms."""

    steps: int = 400
    """Optimiser steps."""
    batch_size: int = 16
    """Windows a step, over all ranks together."""
    lr: float = 1e-3
    """Learning rate at the end of the warm-up."""
    lr_end: float = 1e-6
    """Learning rate at the last step."""
    warmup_share: float = 0.1
    """Share of the steps with a linear warm-up."""
    weight_decay: float = 0.05
    """Weight decay at the start."""
    weight_decay_end: float = 0.05
    """Weight decay at the end; a cosine joins the two."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's averaging."""
    clip: float = 1.0
    """Largest gradient norm; 0 leaves gradients as they are."""
    momentum: tuple[float, float] = (0.996, 1.0)
    """Brain-JEPA's target encoder: momentum at the first and last step, a linear ramp."""

    def __post_init__(self) -> None:
        _at_least(self, 1, "steps", "batch_size")
        _at_least(self, 0, "lr", "lr_end", "weight_decay", "weight_decay_end", "clip")
        if not 0.0 <= self.warmup_share <= 1.0:
            raise UserError(f"warmup_share={self.warmup_share}: expected a share from 0 to 1.")
        if not all(0.0 <= beta < 1.0 for beta in self.betas):
            raise UserError(f"betas={self.betas}: expected two numbers from 0 to below 1.")
        if not all(0.0 <= share <= 1.0 for share in self.momentum):
            raise UserError(f"momentum={self.momentum}: expected two numbers from 0 to 1.")


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """Seeds and how often what is written."""

    seed: int = 0
    """Seeds weights, windows, masks and dropout."""
    log_every: int = 10
    """Steps between rows of metrics.jsonl."""
    validate_every: int = 50
    """Steps between validation losses."""
    save_every: int = 200
    """Steps between checkpoints."""
    keep_last: int = 2
    """Checkpoints kept."""
    n_validation: int = 64
    """Validation recordings used, at most."""

    def __post_init__(self) -> None:
        _at_least(self, 0, "seed")
        _at_least(self, 1, "log_every", "validate_every", "save_every", "keep_last", "n_validation")


@dataclass(frozen=True, kw_only=True, slots=True)
class EfficiencyConfig:
    """What must not change results beyond rounding."""

    device: str = "auto"
    """'auto', 'cpu' or 'cuda'."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Autocast of the forward pass; weights stay float32."""
    threads: int = 0
    """Threads a process; 0 shares the cores among the ranks."""
    activation_checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them:
    much less memory for about a third more time."""
    compile: bool = False
    """torch.compile of the loss: faster steps after minutes of compiling;
    on a CPU it needs a C++ compiler."""

    def __post_init__(self) -> None:
        _at_least(self, 0, "threads")


@dataclass(frozen=True, kw_only=True, slots=True)
class PretrainConfig:
    """Everything that decides a pretraining run."""

    model: str
    """'brainjepa' or 'brainlm'."""
    encoder: BrainLMConfig | BrainLMImageConfig | BrainJEPAConfig
    """The architecture."""
    data: DataConfig = field(default_factory=DataConfig)
    """What the encoder sees."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """How it is trained."""
    run: RunConfig = field(default_factory=RunConfig)
    """Seeds and what is written when."""
    efficiency: EfficiencyConfig = field(default_factory=EfficiencyConfig)
    """Device, precision, threads, memory."""


def _at_least(config: Any, lowest: int, *names: str) -> None:
    for name in names:
        if not getattr(config, name) >= lowest:
            raise UserError(f"{name}={getattr(config, name)}: expected {lowest} or more.")
