"""Going on with a stopped alignment, to the bit.

A checkpoint in `run_dir/checkpoints` holds which member of the run is being trained, its weights,
their average, its best weights so far, its optimizer and its step, and what is kept of the members
before it; batches, dropout and the learning rate are functions of seed and step, and conditioners
and start are found again from the same people. Each is written aside and renamed, so it is whole or
absent even after kill -9, and metrics.jsonl is cut back to the step that it is of.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch.distributed as dist
from torch import Tensor

from brainfusion.alignment.config import AlignConfig
from brainfusion.alignment.genes.vectors import GeneVectors
from brainfusion.alignment.member import Member, Progress
from brainfusion.alignment.members import Members
from brainfusion.runtime import checkpoint
from brainfusion.runtime import config as configs
from brainfusion.runtime.distributed import Ranks
from brainfusion.runtime.errors import CheckpointError
from brainfusion.runtime.files import write_text
from brainfusion.runtime.logs import MetricsLog, read_metrics, say

if TYPE_CHECKING:
    from brainfusion.alignment.losses.pair_ids import PairIds

T = TypeVar("T")

_GENES_HASHED = 8
"""Genes of a model whose vectors tell whether they are still the same."""
_PROGRESS = ("start", "best", "least_loss", "least_share")
"""Of a member's progress, what a checkpoint holds as JSON."""


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
    members: Members,
    member: Member,
    *,
    facts: Mapping[str, Any],
    world_size: int,
) -> None:
    """Write a checkpoint of all steps so far, and drop those before the one before it.

    Args:
        run_dir: Of the run.
        members: The members that are finished.
        member: The one that is being trained.
        facts: `facts_of` the run.
        world_size: Processes of the run.
    """
    progress = member.progress
    parts = {
        "now": member.model.state_dict(),
        "best": progress.best_weights,
        "average": member.average.model.state_dict() if member.average else {},
        "kept": members.weights,
        "mean": members.mean,
    }
    checkpoint.save(
        run_dir,
        members.n_steps + progress.step,
        weights={f"{part}.{key}": x for part, state in parts.items() for key, x in state.items()},
        optimizer=member.optimizer.state_dict(),
        state={
            "run": dict(facts),
            "world_size": world_size,
            "finished": members.finished,
            **{name: getattr(progress, name) for name in _PROGRESS},
        },
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class Stopped:
    """What a stopped run left."""

    members: Members
    progress: Progress
    weights: dict[str, Tensor]
    """Of the member that was being trained."""
    average: dict[str, Tensor]
    """Of its moving average, where it has one."""
    optimizer: dict[str, Any]

    def restore(self, member: Member) -> None:
        """Put the member where its training stopped."""
        member.progress = self.progress
        member.model.load_state_dict(self.weights)
        member.optimizer.load_state_dict(self.optimizer)
        if member.average is not None:
            member.average.model.load_state_dict(self.average)


def open_log(run_dir: Path, stopped: Stopped | None, ranks: Ranks) -> MetricsLog:
    """metrics.jsonl: empty, or with the rows up to where a stopped run goes on."""
    path = run_dir / "metrics.jsonl"
    if stopped is None or not path.exists():
        return MetricsLog(path, active=ranks.is_main)
    last = (len(stopped.members.finished), stopped.progress.step)
    if ranks.is_main:
        rows = read_metrics(path)
        kept = [row for row in rows if (row["member"], row["step"]) <= last]
        write_text(path, "".join(json.dumps(row) + "\n" for row in kept))
    return MetricsLog(path, active=ranks.is_main, resume_step=stopped.members.config.max_steps)


def find(
    run_dir: Path, facts: Mapping[str, Any], config: AlignConfig, ranks: Ranks
) -> Stopped | None:
    """What a stopped run left in `run_dir`, the same for all ranks; none if it left nothing.

    Only the main rank reads: the others need not see its disk.

    Raises:
        CheckpointError: It was made with another config or from other data; what differs is named.
    """
    found = agreed(lambda: _read(run_dir, facts, config, ranks.world_size), ranks)
    if found is not None and ranks.is_main:
        where = found.members.where(f"step {found.progress.step}")
        say(f"going on with the run that was stopped at {where}.")
    return found


def agreed(read: Callable[[], T], ranks: Ranks) -> T:
    """What the main rank reads, the same for all ranks, who need not see its disk.

    Raises:
        CheckpointError: On every rank, if reading raises it.
    """
    box: list[Any] = [None]
    if ranks.is_main:
        try:
            box = [read()]
        except CheckpointError as error:
            box = [error]
    if ranks.world_size > 1:
        dist.broadcast_object_list(box, src=0, device=ranks.device)
    if isinstance(box[0], CheckpointError):
        raise box[0]
    return box[0]


def forget(run_dir: Path) -> None:
    """Take away the checkpoints of a run."""
    shutil.rmtree(run_dir / "checkpoints", ignore_errors=True)


@dataclass(frozen=True, kw_only=True, eq=False)
class Kept:
    """What the last checkpoint of a run holds."""

    state: dict[str, Any]
    parts: dict[str, dict[str, Tensor]]
    """Weights, by the part that their names begin with."""
    optimizer: dict[str, Any]


def read_last(
    run_dir: Path, facts: Mapping[str, Any], world_size: int, parts: Sequence[str]
) -> Kept | None:
    """The last checkpoint, if it is of this run; none if there is none.

    Args:
        run_dir: Of the run.
        facts: What decides its result, as `state["run"]` of the checkpoint has them.
        world_size: Processes now; others than before are said.
        parts: What names of weights begin with, before a dot.

    Raises:
        CheckpointError: It was made with another config or from other data; what differs is named.
    """
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
    return Kept(
        state=state,
        parts={
            part: {
                key.removeprefix(f"{part}."): x
                for key, x in weights.items()
                if key.startswith(f"{part}.")
            }
            for part in parts
        },
        optimizer=checkpoint.load_optimizer(folder),
    )


def _read(
    run_dir: Path, facts: Mapping[str, Any], config: AlignConfig, world_size: int
) -> Stopped | None:
    kept = read_last(run_dir, facts, world_size, ("now", "best", "average", "kept", "mean"))
    if kept is None:
        return None
    state, parts = kept.state, kept.parts
    members = Members(config, finished=state["finished"], weights=parts["kept"], mean=parts["mean"])
    return Stopped(
        members=members,
        progress=Progress(
            step=int(state["step"]) - members.n_steps,
            best_weights=parts["best"],
            **{name: state[name] for name in _PROGRESS},
        ),
        weights=parts["now"],
        average=parts["average"],
        optimizer=kept.optimizer,
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
