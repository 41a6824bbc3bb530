"""Recordings read and matched one after another, in this process or in several.

Shape legend: p parcels, t TRs.
"""

import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait

import numpy as np

from brainfusion.data.importers.config import ImportConfig
from brainfusion.data.importers.matching import Facts, Layout, to_atlas
from brainfusion.data.importers.sources import Item
from brainfusion.runtime.errors import UserError

_AHEAD = 2  # recordings that each process is ahead of the writing


def read_all(
    config: ImportConfig, kind: str, layout: Layout, items: Sequence[Item]
) -> Generator[tuple[np.ndarray, Facts]]:
    """Each item as `to_atlas` gives it, in order; an error comes where its recording would.

    Raises:
        UserError: What reading finds, or a process that was ended from outside.
    """
    # A process of its own costs seconds to start: not for a recording or two.
    if config.workers == 1 or len(items) <= 2:
        for item in items:
            yield to_atlas(config, kind, layout, item)
        return
    # Not forked: polars has threads, of which a fork keeps the locks and not the rest.
    context = multiprocessing.get_context("spawn")
    n_workers = min(config.workers, len(items))
    pool = ProcessPoolExecutor(
        n_workers, mp_context=context, initializer=_begin, initargs=(config, kind, layout)
    )
    waiting: deque[Future[tuple[np.ndarray, Facts]]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(_read, item))
            if len(waiting) > _AHEAD * n_workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise UserError(
            "a reading process was ended from outside (memory?): run the command again with fewer "
            "--workers."
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


_job: tuple[ImportConfig, str, Layout] | None = None


def _begin(config: ImportConfig, kind: str, layout: Layout) -> None:
    global _job
    _job = (config, kind, layout)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    # A parent that is killed cannot stop its processes, which would wait for work forever.
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def _read(item: Item) -> tuple[np.ndarray, Facts]:
    assert _job is not None
    return to_atlas(*_job, item)
