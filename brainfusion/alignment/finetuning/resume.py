"""Going on with a stopped fine-tuning, to the bit.

A checkpoint in `run_dir/checkpoints` holds what is trained, the best of it so far, the optimizer
and the step; batches, windows and dropout are functions of seed and step. Each is written aside and
renamed, so it is whole or absent even after kill -9.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from brainfusion.alignment.finetuning.config import FinetuneConfig
from brainfusion.alignment.finetuning.tower import Tower, Towers
from brainfusion.alignment.genes.vectors import GeneVectors
from brainfusion.alignment.losses.pair_ids import PairIds
from brainfusion.alignment.model import Alignment
from brainfusion.alignment.resume import agreed, facts_of, read_last
from brainfusion.runtime import checkpoint
from brainfusion.runtime.distributed import Ranks
from brainfusion.runtime.logs import say


@dataclass(frozen=True, kw_only=True, eq=False)
class Checkpoints:
    """Where a run keeps its state, and what it must still be of to be gone on with."""

    run_dir: Path
    every: int = 0
    """Steps between checkpoints; 0: none are written, and signals act as ever."""
    resume: bool = False
    """Go on from the last of them; otherwise they are removed."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """Of `run_facts`."""


@dataclass(kw_only=True, eq=False)
class Progress:
    """Where a run stands, beside its weights and its optimizer."""

    step: int = 0
    """Steps that were taken."""
    best: dict[str, Any] = field(default_factory=dict)
    """The row of metrics of the best look at the validation people."""
    best_weights: dict[str, Tensor] = field(default_factory=dict)
    """Its weights, of all that is trained."""
    least_loss: float | None = None
    """Least loss so far, in nats."""
    frozen: float = 0.0
    """Validation AUC of the start."""
    log_n: float = 0.0
    """Loss of chance, in nats."""
    seconds: float = 0.0
    """Time that all steps so far took."""

    def keep(self, row: Mapping[str, Any], trained: nn.Module) -> None:
        """Take a look's row and the weights as they are for the best so far."""
        self.best = dict(row)
        self.best_weights = {k: v.detach().clone() for k, v in trained.state_dict().items()}


class Trained(nn.Module):
    """What is trained, as one module: the encoder's chosen parameters and the projectors."""

    def __init__(self, towers: Towers) -> None:
        super().__init__()
        chosen = [p for p in towers.tower.module.parameters() if p.requires_grad]
        self.encoder = nn.ParameterList(chosen)
        self.model = towers.model


@dataclass(frozen=True, kw_only=True, eq=False)
class Found:
    """What a stopped run left."""

    progress: Progress
    weights: dict[str, Tensor]
    optimizer: dict[str, Any]


def run_facts(
    alignment: Alignment,
    tower: Tower,
    dna: np.ndarray | GeneVectors,
    labels: Sequence[str],
    *,
    config: FinetuneConfig,
    ids: PairIds | None,
    covariates: np.ndarray | None,
    made_of: Mapping[str, Any],
) -> dict[str, Any]:
    """What decides the result of a run, to be compared when it goes on; data as hashes.

    Taken before the encoder is made ready for training.
    """
    given: Any = config  # of which only the values are looked at
    known = facts_of({"dna": dna}, labels, config=given, present={}, ids=ids, covariates=covariates)
    return {
        **known,
        "encoder": _hash_weights(tower.module),
        "alignment": _hash_weights(alignment.model),
        **made_of,
    }


def save(
    keeping: Checkpoints,
    progress: Progress,
    trained: Trained,
    optimizer: torch.optim.Optimizer,
    *,
    world_size: int,
) -> None:
    """Write a checkpoint of `progress.step`, and drop those before the one before it."""
    weights = {f"now.{key}": value for key, value in trained.state_dict().items()}
    weights |= {f"best.{key}": value for key, value in progress.best_weights.items()}
    kept = ("best", "least_loss", "frozen", "log_n", "seconds")
    checkpoint.save(
        keeping.run_dir,
        progress.step,
        weights=weights,
        optimizer=optimizer.state_dict(),
        state={
            "run": dict(keeping.facts),
            "world_size": world_size,
            "progress": {name: getattr(progress, name) for name in kept},
        },
    )


def find(keeping: Checkpoints, ranks: Ranks) -> Found | None:
    """What a stopped run left, the same for all ranks; none if it left nothing.

    Only the main rank reads: the others need not see its disk.

    Raises:
        CheckpointError: It was made with another config or from other data; what differs is named.
    """
    found = agreed(lambda: _read(keeping, ranks.world_size), ranks)
    if found is not None:
        say(f"going on with the fine-tuning that was stopped at step {found.progress.step}.")
    return found


def _read(keeping: Checkpoints, world_size: int) -> Found | None:
    kept = read_last(keeping.run_dir, keeping.facts, world_size, ("now", "best"))
    if kept is None:
        return None
    return Found(
        progress=Progress(
            step=int(kept.state["step"]),
            best_weights=kept.parts["best"],
            **kept.state["progress"],
        ),
        weights=kept.parts["now"],
        optimizer=kept.optimizer,
    )


def _hash_weights(module: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        values = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(values.numpy().data)
    return digest.hexdigest()[:16]
