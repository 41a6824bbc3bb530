"""Real gloo processes for the tests of distributed code."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run_ranks(function: Callable[..., Any], *args: Any, world_size: int = 2) -> list[Any]:
    """Call `function(rank, world_size, *args)` in real processes; returns their results by rank.

    `function` must be at module level. A failure in any process fails the test with its traceback.
    """
    try:
        return _run(function, args, world_size)
    except mp.ProcessExitedException as error:
        # Seen once in a hundred starts: the C++ runtime of torch aborts ("terminate called without
        # an active exception"), with nothing of ours on the stack. Failures of `function` are
        # another exception, ProcessRaisedException, and are never tried again.
        if error.signal_name != "SIGABRT":
            raise
        return _run(function, args, world_size)


def _run(function: Callable[..., Any], args: tuple, world_size: int) -> list[Any]:
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_worker, args=(world_size, folder, function, args), nprocs=world_size)
        return [
            torch.load(Path(folder) / f"{rank}.pt", weights_only=False)
            for rank in range(world_size)
        ]


def _worker(rank: int, world_size: int, folder: str, function: Callable, args: tuple) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank))
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size
    )
    try:
        torch.save(function(rank, world_size, *args), Path(folder) / f"{rank}.pt")
        dist.barrier()
    finally:
        dist.destroy_process_group()
