"""Going on with a stopped alignment, to the bit.

A checkpoint in `run_dir/checkpoints` holds the weights, the best weights so far, the optimizer and
the step; batches, dropout and the learning rate are functions of the step, and the conditioners are
fitted again on the same people. Each is written aside and renamed, so it is whole or absent even
after kill -9, and metrics.jsonl is cut back to the step that it is of.
"""

import hashlib
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from brainfusion.alignment.config import AlignConfig
from brainfusion.alignment.genes.vectors import GeneVectors
from brainfusion.runtime import checkpoint
from brainfusion.runtime import config as configs
from brainfusion.runtime.distributed import Ranks
from brainfusion.runtime.errors import CheckpointError
from brainfusion.runtime.logs import say

if TYPE_CHECKING:
    from brainfusion.alignment.losses.pair_ids import PairIds

_GENES_HASHED = 8
"""Genes of a model whose vectors tell whether they are still the same."""


@dataclass(kw_only=True, eq=False)
class Progress:
    """Where a run stands, beside its weights and its optimizer."""

    step: int = 0
    """Steps that were taken."""
    best: dict[str, Any] = field(default_factory=dict)
    """The row of metrics of the best look at the validation people; empty before the first."""
    best_weights: dict[str, Tensor] = field(default_factory=dict)
    """Its weights."""
    least_loss: float | None = None
    """Least loss so far, in nats."""
    least_share: float | None = None
    """Least loss so far, as a share of that of chance."""
    facts: dict[str, Any] = field(default_factory=dict)
    """What was found at the start, for the summary."""

    def note(self, row: Mapping[str, Any]) -> None:
        """Take a step's row into account."""
        self.step = row["step"]
        self.least_loss = _least(self.least_loss, row["loss"])
        self.least_share = _least(self.least_share, row["loss_over_log_n"])

    def keep(self, row: Mapping[str, Any], model: nn.Module) -> None:
        """Take a look's row and the weights as they are for the best so far."""
        self.note(row)
        self.best = dict(row)
        self.best_weights = {k: v.detach().clone() for k, v in model.state_dict().items()}


def _least(known: float | None, value: float | None) -> float | None:
    """The lesser of two numbers, either of which may not be known."""
    return min((x for x in (known, value) if x is not None), default=None)


def facts_of(
    features: Mapping[str, np.ndarray | GeneVectors],
    labels: Sequence[str],
    *,
    config: AlignConfig,
    present: Mapping[str, np.ndarray],
    ids: "PairIds | None",
    covariates: np.ndarray | None,
) -> dict[str, Any]:
    """What decides the result of a run, to be compared when it goes on; data as hashes."""
    return {
        "config": configs.to_dict(config),
        "labels": _hash("\n".join(labels).encode()),
        "covariates": None if covariates is None else _hash(covariates),
        "features": {name: _hash_features(x) for name, x in features.items()},
        "people who have it": {name: _hash(has) for name, has in present.items()},
        "negatives": None
        if ids is None
        else {
            name: _hash(value.cpu().numpy())
            for name in ("person", "excluded", "within")
            if (value := getattr(ids, name)) is not None
        },
    }


def save(
    run_dir: Path,
    progress: Progress,
    *,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    facts: Mapping[str, Any],
    world_size: int,
) -> None:
    """Write a checkpoint of `progress.step`, and drop those before the one before it."""
    weights = {f"now.{key}": value for key, value in model.state_dict().items()}
    weights |= {f"best.{key}": value for key, value in progress.best_weights.items()}
    checkpoint.save(
        run_dir,
        progress.step,
        weights=weights,
        optimizer=optimizer.state_dict(),
        state={
            "run": dict(facts),
            "world_size": world_size,
            "best": progress.best,
            "least_loss": progress.least_loss,
            "least_share": progress.least_share,
            "facts": progress.facts,
        },
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class Stopped:
    """What a stopped run left."""

    progress: Progress
    weights: dict[str, Tensor]
    optimizer: dict[str, Any]


def find(run_dir: Path, facts: Mapping[str, Any], ranks: Ranks) -> Stopped | None:
    """What a stopped run left in `run_dir`, the same for all ranks; none if it left nothing.

    Only the main rank reads: the others need not see its disk.

    Raises:
        CheckpointError: It was made with another config or from other data; what differs is named.
    """
    box: list[Any] = [None]
    if ranks.is_main:
        try:
            box = [_read(run_dir, facts, ranks.world_size)]
        except CheckpointError as error:
            box = [error]
    if ranks.world_size > 1:
        dist.broadcast_object_list(box, src=0, device=ranks.device)
    if isinstance(box[0], CheckpointError):
        raise box[0]
    if box[0] is not None and ranks.is_main:
        say(f"going on with the run that was stopped at step {box[0].progress.step}.")
    return box[0]


def forget(run_dir: Path) -> None:
    """Take away the checkpoints of a run."""
    shutil.rmtree(run_dir / "checkpoints", ignore_errors=True)


def _read(run_dir: Path, facts: Mapping[str, Any], world_size: int) -> Stopped | None:
    if not checkpoint.steps(run_dir):
        return None
    folder = checkpoint.newest(run_dir)
    state = checkpoint.load_state(folder)
    if changed := differences(state["run"], dict(facts)):
        raise CheckpointError(
            f"{run_dir} holds a stopped run that was made otherwise ({'; '.join(changed)}): give "
            "the same options to go on with it, or --resume never to start anew."
        )
    if state["world_size"] != world_size:
        say(
            f"the stopped run was on {state['world_size']} process(es) and goes on with "
            f"{world_size}: batches and dropout stay the same, but sums are taken in another "
            "order, so it is not the same run to the bit."
        )
    weights = checkpoint.load_weights(folder)
    now, best = (
        {key.removeprefix(part): x for key, x in weights.items() if key.startswith(part)}
        for part in ("now.", "best.")
    )
    kept = ("best", "least_loss", "least_share", "facts")
    return Stopped(
        progress=Progress(
            step=int(state["step"]), best_weights=best, **{name: state[name] for name in kept}
        ),
        weights=now,
        optimizer=checkpoint.load_optimizer(folder),
    )


def differences(before: Any, now: Any, where: str = "") -> list[str]:
    """What differs between two runs, "name: before -> now" each; of data only that it does."""
    if isinstance(before, dict) and isinstance(now, dict):
        names = [*before, *(name for name in now if name not in before)]
        return [
            text
            for name in names
            for text in differences(before.get(name), now.get(name), f"{where}.{name}".strip("."))
        ]
    if before == now:
        return []
    if where.startswith("config."):
        return [f"{where.removeprefix('config.')}: {before} -> {now}"]
    return [f"other {where.replace('.', ' of ')}"]


def _hash_features(features: np.ndarray | GeneVectors) -> str:
    """Of a matrix all numbers; of genes who has which, and the vectors of some."""
    if isinstance(features, np.ndarray):
        return _hash(features)
    parts = [repr(features.genes).encode(), features.mask, np.asarray(features.rows)]
    for model, source in features.sources.items():
        for place in np.unique(np.linspace(0, len(source.genes) - 1, _GENES_HASHED).astype(int)):
            name = source.genes[place]
            gene = next(g for g in features.genes if g.model == model and g.name == name)
            parts.append(features.column(gene, int(place)))
    return _hash(*parts)


def _hash(*parts: bytes | np.ndarray) -> str:
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, np.ndarray):
            digest.update(f"{part.dtype}{part.shape}".encode())
            part = np.ascontiguousarray(part).reshape(-1).view(np.uint8).data
        digest.update(part)
    return digest.hexdigest()[:16]
