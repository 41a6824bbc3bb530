"""torch.distributed under torchrun, and the same code without it."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist

from brainfusion.runtime.errors import UserError


@dataclass(frozen=True, kw_only=True, slots=True)
class Ranks:
    """Where this process stands among those that torchrun started."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and prints."""
        return self.rank == 0


@contextmanager
def session(device: str = "auto", *, timeout_s: float = 600.0) -> Iterator[Ranks]:
    """Join the process group that torchrun describes, if any, and leave it at the end.

    Gloo on CPU, NCCL on CUDA devices. Without torchrun this is one process and nothing is started.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    rank, local_rank = int(os.environ.get("RANK", "0")), int(os.environ.get("LOCAL_RANK", "0"))
    chosen = _device(device, local_rank)
    ranks = Ranks(rank=rank, local_rank=local_rank, world_size=world_size, device=chosen)
    if world_size == 1 or dist.is_initialized():
        yield ranks
        return
    dist.init_process_group(
        "nccl" if chosen.type == "cuda" else "gloo",
        timeout=timedelta(seconds=timeout_s),
        device_id=chosen if chosen.type == "cuda" else None,
    )
    try:
        yield ranks
        dist.barrier()  # nobody leaves while another still talks to it
    finally:
        dist.destroy_process_group()


def barrier() -> None:
    """Wait for all ranks; nothing without a process group."""
    if dist.is_available() and dist.is_initialized():
        dist.barrier()


@contextmanager
def main_first(ranks: Ranks) -> Iterator[None]:
    """Rank 0 runs the block first (it makes what is missing), then the others find it made."""
    if not ranks.is_main:
        barrier()
    yield
    if ranks.is_main:
        barrier()


def mean_over_ranks(value: torch.Tensor) -> torch.Tensor:
    """The mean over ranks of a detached tensor, for logs."""
    value = value.detach().clone()
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(value)
        value /= dist.get_world_size()
    return value


def gather_rows(rows: torch.Tensor, ranks: Ranks) -> torch.Tensor:
    """The rows of all ranks, dealt out as rank, rank + world_size, ...: in their first order.

    Every rank must have equally many.
    """
    if ranks.world_size == 1:
        return rows
    found = [torch.empty_like(rows) for _ in range(ranks.world_size)]
    dist.all_gather(found, rows.contiguous())
    return torch.stack(found, dim=1).flatten(0, 1)


def check_same(facts: dict[str, object], ranks: Ranks) -> None:
    """Check that all ranks have the same `facts`: named values that decide what they train on.

    Raises:
        UserError: On all ranks; what differs is named with the ranks' values.
    """
    if ranks.world_size == 1:
        return
    found: list[dict[str, object]] = [{} for _ in range(ranks.world_size)]
    dist.all_gather_object(found, facts)
    for name in facts:
        values = [one[name] for one in found]
        other = next((i for i, value in enumerate(values) if value != values[0]), None)
        if other is not None:
            raise UserError(
                f"rank {other} has {name} {values[other]} where rank 0 has {values[0]}: every "
                "process must read the same cohort with the same options; check what each node "
                "sees at that path."
            )


def _device(name: str, local_rank: int) -> torch.device:
    """The device of this process: 'auto' and 'cuda' give each local rank its own."""
    n_cuda = torch.cuda.device_count()
    if name == "auto":
        name = "cuda" if n_cuda else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"device '{name}' is unknown: use auto, cpu or cuda.") from None
    if device.type != "cuda":
        return device
    index = local_rank if device.index is None else device.index
    if index >= n_cuda:
        raise UserError(
            f"process {local_rank} wants CUDA device {index} but this machine has {n_cuda}: use "
            "--device cpu, or start as many processes as there are devices."
        )
    torch.cuda.set_device(index)
    return torch.device("cuda", index)
