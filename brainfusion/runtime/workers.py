"""Work on a list of items in several processes: results in order, a bounded number ahead."""

import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from typing import Any, TypeVar

from brainfusion.runtime.errors import UserError

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_workers(
    work: Callable[[Item], Result],
    items: Iterable[Item],
    *,
    n_workers: int,
    n_ahead: int,
    begin: Callable[..., None],
    begin_with: tuple[Any, ...],
    hint: str = "",
) -> Generator[Result]:
    """The results of `work`, in the order of the items; an error comes where its result would.

    Args:
        work: A function of a module: other processes import it.
        items: What it is called with, one after another; they are pickled.
        n_workers: Processes.
        n_ahead: Results that may wait for the caller.
        begin: Called once in each process before any work.
        begin_with: What it is called with.
        hint: Added to the line that says that a process was ended.

    Raises:
        UserError: A process was ended from outside, and what `work` raises.
    """
    # Not forked: polars and torch have threads, of which a fork keeps the locks and not the rest.
    pool = ProcessPoolExecutor(
        n_workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_begin,
        initargs=(begin, begin_with),
    )
    waiting: deque[Future[Result]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) > n_ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise UserError(
            "a reading process was ended from outside (memory?): run the command again with fewer "
            f"--workers{hint}."
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _begin(begin: Callable[..., None], begin_with: tuple[Any, ...]) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    begin(*begin_with)


def _end_with_parent() -> None:
    # A parent that is killed cannot stop its processes, which would wait for work forever.
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)
