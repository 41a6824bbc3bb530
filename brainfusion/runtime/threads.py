"""Thread counts, chosen on purpose.

On a busy two-core machine two spinning threads were measured 25 times slower than one, so waiting
threads sleep (`OMP_WAIT_POLICY=PASSIVE`) and small array work runs on one thread.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager


def set_environment() -> None:
    """Make OpenMP's waiting threads sleep. Has an effect only before torch and faiss load."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("KMP_BLOCKTIME", "0")


def available_cores() -> int:
    """The cores this process may use (its affinity, not the machine's count)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def use_threads(n_threads: int = 0, *, n_processes: int = 1) -> int:
    """Set torch's threads for this process.

    0 takes OMP_NUM_THREADS where it is set for a single process, and otherwise shares the cores
    among the `n_processes` (torchrun sets OMP_NUM_THREADS=1 for each of several, whatever there
    is).
    """
    import torch

    if not n_threads and n_processes == 1:
        n_threads = int(os.environ.get("OMP_NUM_THREADS", "0"))
    n_threads = n_threads or max(1, available_cores() // n_processes)
    torch.set_num_threads(n_threads)
    return n_threads


@contextmanager
def one_thread() -> Iterator[None]:
    """Run numpy, scipy and faiss on one thread inside the block: small arrays gain nothing."""
    from threadpoolctl import threadpool_limits

    with threadpool_limits(limits=1):
        yield
