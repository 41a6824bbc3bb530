"""Everything that decides a pretraining run, grouped by what it changes."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

from brainfusion.data.resample import Resampling
from brainfusion.data.standardise import check_divisor
from brainfusion.encoders.brainjepa import BrainJEPAConfig
from brainfusion.encoders.brainlm import BrainLMConfig
from brainfusion.encoders.brainlm_image import BrainLMImageConfig
from brainfusion.encoders.pooling import Pooling
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
    """Optimiser steps; 0 where --epochs is given."""
    epochs: float = 0.0
    """Passes over the training recordings, in place of --steps: a window a recording each."""
    batch_size: int = 16
    """Windows a step, over all ranks together."""
    lr: float = 1e-3
    """Learning rate at the end of the warm-up."""
    lr_end: float = 1e-6
    """Learning rate at the last step."""
    lr_start_share: float = 0.05
    """Learning rate that the warm-up starts from, as a share of --lr."""
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
    momentum_ramp: Literal["whole", "reference"] = "whole"
    """whole: the ramp ends with the training. reference: as published, eight times too long,
    so that 0.996 to 1 ends at 0.9965."""
    masks: Literal["unbiased", "reference"] = "unbiased"
    """Brain-JEPA's masks. reference: as published, with the whole batch cut to its shortest."""

    def __post_init__(self) -> None:
        _at_least(self, 1, "batch_size")
        _at_least(self, 0, "steps", "epochs", "lr", "lr_end", "weight_decay", "weight_decay_end")
        _at_least(self, 0, "clip")
        if not self.steps and not self.epochs:
            raise UserError("steps=0: expected 1 or more, or --epochs above 0 in its place.")
        if self.steps and self.epochs:
            raise UserError(
                f"steps={self.steps} with epochs={self.epochs:g}: expected one of the two above 0; "
                "give --epochs 0 with --steps, or --steps 0 with --epochs."
            )
        for name in ("warmup_share", "lr_start_share"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise UserError(f"{name}={getattr(self, name)}: expected a share from 0 to 1.")
        if not all(0.0 <= beta < 1.0 for beta in self.betas):
            raise UserError(f"betas={self.betas}: expected two numbers from 0 to below 1.")
        if not all(0.0 <= share <= 1.0 for share in self.momentum):
            raise UserError(f"momentum={self.momentum}: expected two numbers from 0 to 1.")

    def sized(self, n_recordings: int) -> "OptimConfig":
        """The same with its epochs, if it has any, as steps over `n_recordings` (at least 1)."""
        if not self.epochs:
            return self
        steps = max(1, int(self.epochs * n_recordings / self.batch_size))
        return dataclasses.replace(self, steps=steps, epochs=0.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """What makes one run another."""

    seed: int = 0
    """Seeds weights, windows, masks and dropout."""

    def __post_init__(self) -> None:
        _at_least(self, 0, "seed")


@dataclass(frozen=True, kw_only=True, slots=True)
class WatchConfig:
    """What is logged, validated and kept; it changes no weight and may change on resume."""

    log_every: int = 10
    """Steps between rows of metrics.jsonl."""
    validate_every: int = 50
    """Steps between validation losses."""
    n_validation: int = 64
    """Validation recordings used, at most."""
    save_every: int = 200
    """Steps between checkpoints."""
    keep_last: int = 2
    """Newest checkpoints kept."""
    keep_every: int = 0
    """Checkpoints at multiples of this step are kept for good; 0: none is."""
    probe_every: int = 0
    """Steps between ridge probes of features, also done at the start and the end; 0: none."""
    probe_columns: tuple[str, ...] = ()
    """Columns of the people's table to probe; age and sex by default."""
    n_probe: int = 256
    """Training recordings that a probe is fitted on, at most."""
    probe_pooling: Pooling = "parcel-std"
    """How a probe pools tokens, as embed's --pooling."""
    tensorboard: bool = False
    """Write the metrics for TensorBoard, too; it has to be installed."""
    watchdog_s: float = 120.0
    """Seconds after which a process that waits for others says in what; 0: never."""

    def __post_init__(self) -> None:
        _at_least(self, 1, "log_every", "validate_every", "save_every", "keep_last", "n_validation")
        _at_least(self, 0, "keep_every", "probe_every", "watchdog_s")
        _at_least(self, 8, "n_probe")


@dataclass(frozen=True, kw_only=True, slots=True)
class EfficiencyConfig:
    """What must not change results beyond rounding."""

    device: str = "auto"
    """'auto', 'cpu' or 'cuda'."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Autocast of the forward pass; weights stay float32."""
    threads: int = 0
    """Threads a process; 0 shares the cores among the ranks."""
    accumulation: int = 1
    """Parts that a process splits its share of each batch into: less memory, equal gradients."""
    prefetch: int = 2
    """Batches made ahead of time."""
    workers: int = 1
    """Threads that make them."""
    sharding: Literal["none", "fsdp"] = "none"
    """none: each process has all weights.
    fsdp: weights and optimiser are shared out, for models too large for one device (FSDP2)."""
    activation_checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them:
    much less memory for about a third more time."""
    compile: bool = False
    """torch.compile of the loss: faster steps after minutes of compiling;
    on a CPU it needs a C++ compiler."""

    def __post_init__(self) -> None:
        _at_least(self, 0, "threads")
        _at_least(self, 1, "accumulation", "prefetch", "workers")


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
    """Its seed."""
    watch: WatchConfig = field(default_factory=WatchConfig)
    """What is written when."""
    efficiency: EfficiencyConfig = field(default_factory=EfficiencyConfig)
    """Device, precision, threads, memory."""


def _at_least(config: Any, lowest: int, *names: str) -> None:
    for name in names:
        if not getattr(config, name) >= lowest:
            raise UserError(f"{name}={getattr(config, name)}: expected {lowest} or more.")
