"""A training step over any number of processes: replicas (DDP) or shards (FSDP2) of the weights.

With `sharding="none"` each process holds all weights and gradients are averaged. With "fsdp" they
are shared out block by block (torch.distributed.fsdp.fully_shard, per-parameter sharding), and the
optimiser's state is saved by torch.distributed.checkpoint, which reads it on another number of
processes, too. Losses are equal to rounding.
"""

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from brainfusion.encoders.objectives import Objective
from brainfusion.encoders.pretrain_config import PretrainConfig
from brainfusion.runtime import checkpoint
from brainfusion.runtime.distributed import Ranks
from brainfusion.runtime.errors import CheckpointError, NonFiniteError, UserError

_SHOWN = 8  # recordings named in an error


def check_shares(settings: PretrainConfig, ranks: Ranks) -> None:
    """Check that every process gets equal parts of every batch.

    Raises:
        UserError: The batch does not divide, or sharding is asked for without processes.
    """
    size, n_parts = settings.optim.batch_size, settings.efficiency.accumulation
    if size % ranks.world_size:
        raise UserError(
            f"optim.batch_size={size} does not divide over {ranks.world_size} "
            f"processes: use a multiple of {ranks.world_size}."
        )
    if (share := size // ranks.world_size) % n_parts:
        raise UserError(
            f"efficiency.accumulation={n_parts} does not divide the {share} windows that each of "
            f"{ranks.world_size} process(es) has of a batch of {size}: use a divisor of {share}."
        )
    if settings.efficiency.sharding == "fsdp" and ranks.world_size == 1:
        raise UserError(
            "--sharding fsdp shares a model out over several processes, and there is one: start "
            "them with torchrun, or use --sharding none."
        )


def distribute(objective: Objective, settings: PretrainConfig, ranks: Ranks) -> nn.Module:
    """What a step calls: the objective itself, its replica, or (in place) its shards."""
    if ranks.world_size == 1:
        return objective
    if settings.efficiency.sharding == "fsdp":
        _shard(objective, ranks)
        return objective
    cuda = [ranks.device.index] if ranks.device.type == "cuda" else None
    return DistributedDataParallel(objective, device_ids=cuda)


def accumulate(
    module: nn.Module,
    batch: Tensor,
    draws: list[Tensor],
    *,
    n_parts: int,
    autocast: Callable[[], AbstractContextManager[Any]],
) -> Tensor:
    """Gradients of the mean loss of this process's windows; returns the loss.

    They are taken in `n_parts` equal parts, and averaged over processes at the last one.
    """
    total = torch.zeros((), dtype=batch.dtype, device=batch.device)
    parts = list(zip(*(x.chunk(n_parts) for x in (batch, *draws)), strict=True))
    for i, part in enumerate(parts):
        with _synchronised(module, i == len(parts) - 1):
            with autocast():
                loss = module(*part) / len(parts)
            loss.backward()
        total = total + loss.detach()
    return total


@contextlib.contextmanager
def _synchronised(module: nn.Module, on: bool) -> Iterator[None]:
    """Whether the backward pass inside ends in an exchange of gradients."""
    if isinstance(module, DistributedDataParallel) and not on:
        with module.no_sync():
            yield
        return
    if hasattr(module, "set_requires_gradient_sync"):
        module.set_requires_gradient_sync(on)  # type: ignore[operator]
    yield


def clip(objective: Objective, largest: float) -> Tensor:
    """Scale gradients down to a norm of at most `largest` (0: leave them); the norm before."""
    norm = nn.utils.clip_grad_norm_(objective.parameters(), largest or float("inf"))
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # type: ignore[operator]


def agree(
    loss: Tensor,
    norm: Tensor,
    step: int,
    ranks: Ranks,
    *,
    stop: bool = False,
    rows: Callable[[], tuple[list[int], list[int]]],
) -> bool:
    """One exchange a step, before the weights move: is all well, and was any rank asked to stop?

    Args:
        loss: Of this rank.
        norm: Of the gradients, the same on all ranks.
        step: From 0.
        ranks: This process among all.
        stop: Whether this rank was asked to stop.
        rows: Called only then: index rows of this rank's recordings in the batch, and those of
            them whose windows are not finite.

    Raises:
        NonFiniteError: On all ranks; ranks, step and recordings (by their index) are named.
    """
    flags = torch.zeros(ranks.world_size + 1, device=loss.device)
    flags[ranks.rank] = float(not torch.isfinite(loss.detach()))
    flags[-1] = float(stop)
    if ranks.world_size > 1:
        dist.all_reduce(flags)
    bad = flags[:-1]
    if not bad.any() and torch.isfinite(norm):
        return bool(flags[-1])
    culprits = bad.nonzero().flatten().tolist()
    what = f"loss is not finite at step {step} on rank(s) {culprits}"
    if not culprits:
        what = f"gradient is not finite at step {step}, though the loss is"
    own = rows() if not culprits or ranks.rank in culprits else ([], [])
    found = [own]
    if ranks.world_size > 1:
        found = [([], [])] * ranks.world_size
        dist.all_gather_object(found, own)
    seen = sorted({row for one, _ in found for row in one})
    spoilt = sorted({row for _, one in found for row in one})
    why = (
        f"of these, {_short(spoilt)} have values that are not finite"
        if spoilt
        else ("all their values are finite")
    )
    raise NonFiniteError(
        f"the {what}, with recordings {_short(seen)} (rows of the cohort's index; {why}): lower "
        "--lr, and check the cohort's recordings with Cohort.validate(). Checkpoints are from "
        "before this step."
    )


def _short(rows: list[int]) -> str:
    more = f" and {len(rows) - _SHOWN} more" if len(rows) > _SHOWN else ""
    return f"{rows[:_SHOWN]}{more}"


# -- checkpoints -----------------------------------------------------------------------------------


def save(
    run_dir: Path,
    step: int,
    *,
    objective: Objective,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    settings: PretrainConfig,
    ranks: Ranks,
) -> None:
    """Write a checkpoint: all ranks call it, the first writes weights, each its shards."""
    encoder: nn.Module = objective.encoder  # type: ignore[assignment]
    sharded = ranks.world_size > 1 and settings.efficiency.sharding == "fsdp"
    if sharded:
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
        weights: dict[str, Any] = get_model_state_dict(encoder, options=whole)
    else:
        weights = dict(encoder.state_dict())
    if not ranks.is_main:
        if sharded:
            _save_shards(objective, optimizer, None)
        return
    checkpoint.save(
        run_dir,
        step,
        weights=weights,
        optimizer=(lambda folder: _save_shards(objective, optimizer, folder))
        if sharded
        else optimizer.state_dict(),
        state=state,
        keep_last=settings.watch.keep_last,
        keep_every=settings.watch.keep_every,
    )


def load_optimizer(
    run_dir: Path,
    *,
    objective: Objective,
    optimizer: torch.optim.Optimizer,
    settings: PretrainConfig,
) -> None:
    """Load the optimiser's state of the newest checkpoint.

    Raises:
        CheckpointError: It is broken, or was saved with another `--sharding`.
    """
    folder = checkpoint.newest(run_dir)
    now = settings.efficiency.sharding
    before = "fsdp" if (folder / "optimizer").is_dir() else "none"
    if before != now:
        raise CheckpointError(
            f"{folder} was saved with --sharding {before} and cannot go on with {now}: the "
            f"optimiser's state is laid out differently; use --sharding {before}."
        )
    if now == "none":
        optimizer.load_state_dict(checkpoint.load_optimizer(folder))
        return
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import (
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )

    state = {"optimizer": get_optimizer_state_dict(objective, optimizer)}
    try:
        dcp.load(state, checkpoint_id=folder / "optimizer")  # type: ignore[reportPrivateImportUsage]
    except (RuntimeError, OSError, dcp.api.CheckpointException) as error:
        raise CheckpointError(
            f"{folder / 'optimizer'} is truncated or not an optimiser's state: remove {folder} to "
            "resume from the checkpoint before it, or pass --restart."
        ) from error
    set_optimizer_state_dict(objective, optimizer, state["optimizer"])


def _save_shards(
    objective: Objective, optimizer: torch.optim.Optimizer, folder: Path | None
) -> None:
    """Each rank writes its part into the folder that rank 0 names."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    place = [str(folder)]
    dist.broadcast_object_list(place, src=0)
    state = {"optimizer": get_optimizer_state_dict(objective, optimizer)}
    dcp.save(state, checkpoint_id=place[0])  # type: ignore[reportPrivateImportUsage]


def _shard(objective: Objective, ranks: Ranks) -> None:
    """Share out every block by itself, then what is left; diagnosis gathers weights, too."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(ranks.device.type, (ranks.world_size,))
    for part in objective.modules():
        if isinstance(part, nn.ModuleList):
            for block in part:
                fully_shard(block, mesh=mesh)
    fully_shard(objective, mesh=mesh, reshard_after_forward=True)
    for method in ("diagnose", "reconstruct", "pooled"):
        if hasattr(objective, method):
            register_fsdp_forward_method(objective, method)
