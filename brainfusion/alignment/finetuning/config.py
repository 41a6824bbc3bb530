"""The settings of fine-tuning a brain encoder."""

from dataclasses import dataclass
from typing import Literal

from brainfusion.alignment.finetuning.lora import check_how
from brainfusion.runtime.errors import UserError


@dataclass(frozen=True, kw_only=True, slots=True)
class FinetuneConfig:
    """How a pretrained encoder and the projectors behind it go on being trained, together."""

    # -- the encoder -------------------------------------------------------------------------
    how: str = "lora"
    """What of the encoder is trained: lora, last-K (its last K blocks), all,
    or none: only the projectors go on, which is what the others have to beat."""
    rank: int = 8
    """Rank of a LoRA update."""
    alpha: float = 16.0
    """Scale of a LoRA update, times its rank."""
    adapt: tuple[str, ...] = ()
    """Names of the layers that LoRA updates, with * for anything;
    without any, the attention projections."""
    encoder_lr_scale: float = 0.1
    """The encoder's learning rate, as a share of the projectors'."""
    encoder_weight_decay: float = 0.01
    """Weight decay of the encoder's trained matrices; for LoRA, towards the pretrained weights."""
    windows: int = 1
    """Windows of a person's recordings in a step, drawn at random, which holds back overfitting;
    0: all of every recording, as 'brainfusion embed' sees them."""
    micro_batch: int = 16
    """People in the graph at a time, in each process: decides memory, and nothing else."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Autocast of the encoder; features are float32 in any case."""

    # -- optimisation ------------------------------------------------------------------------
    lr: float = 1e-3
    """Peak learning rate of AdamW, of the projectors."""
    weight_decay: float = 1.0
    """Weight decay of the projectors' matrices."""
    max_steps: int = 40
    """Steps at most."""
    warmup_steps: int = 5
    """Steps in which the learning rate rises to its peak."""
    eval_every: int = 4
    """Steps between looks at the validation people."""
    patience: int = 5
    """Looks without a better validation AUC after which training stops."""
    batch_size: int = 0
    """People in a batch, over all processes; 0 is all training people at once."""
    seed: int = 0
    """Of updates, batches, windows and dropout."""

    def __post_init__(self) -> None:
        check_how(self.how)
        for name in ("rank", "alpha", "micro_batch", "lr", "max_steps", "eval_every", "patience"):
            if getattr(self, name) <= 0:
                raise UserError(f"{name}={getattr(self, name)}: expected more than 0.")
        for name in (
            *("encoder_lr_scale", "encoder_weight_decay", "weight_decay"),
            *("windows", "warmup_steps", "batch_size"),
        ):
            if getattr(self, name) < 0:
                raise UserError(f"{name}={getattr(self, name)}: expected 0 or more.")
        if self.batch_size == 1:
            raise UserError("batch_size=1: one pair has nothing to be told from; use 2 or more.")
