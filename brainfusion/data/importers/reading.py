"""Recordings read and matched one after another, in this process or in several.

Shape legend: p parcels, t TRs.
"""

from collections.abc import Generator, Sequence

import numpy as np

from brainfusion.data.importers.config import ImportConfig
from brainfusion.data.importers.matching import Facts, Layout, to_atlas
from brainfusion.data.importers.sources import Item
from brainfusion.runtime.workers import in_workers

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
    n_workers = min(config.workers, len(items))
    yield from in_workers(
        _read,
        items,
        n_workers=n_workers,
        n_ahead=_AHEAD * n_workers,
        begin=_begin,
        begin_with=(config, kind, layout),
    )


_job: tuple[ImportConfig, str, Layout] | None = None


def _begin(config: ImportConfig, kind: str, layout: Layout) -> None:
    global _job
    _job = (config, kind, layout)


def _read(item: Item) -> tuple[np.ndarray, Facts]:
    assert _job is not None
    return to_atlas(*_job, item)
