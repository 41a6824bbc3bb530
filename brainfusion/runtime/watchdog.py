"""A watchdog over distributed steps: which rank waits in which collective, and what others do.

Each process notes where it is; a thread of its own writes that to a small file every few seconds,
and says so when the process has waited for others too long. The files lie in the run's folder,
which all nodes see, so that it works when the network does not.
"""

import contextlib
import json
import shutil
import threading
import time
from pathlib import Path
from types import TracebackType

from brainfusion.runtime.distributed import Ranks
from brainfusion.runtime.logs import warn

Place = tuple[str, float, bool]
"""What is being done, since when (Unix seconds), and whether it waits for other ranks."""


class Watchdog:
    """Watches one process inside its block; without other processes it does nothing.

    Args:
        folder: Of the ranks' files, the same for all; removed at the end.
        ranks: This process among all.
        limit_s: A wait this long is said, and again each time it has doubled. 0: never.
    """

    def __init__(self, folder: Path, ranks: Ranks, *, limit_s: float) -> None:
        self._folder, self._ranks, self._limit_s = folder, ranks, limit_s
        self._active = limit_s > 0 and ranks.world_size > 1
        self._place: Place = ("starting", time.time(), False)
        self._said: tuple[Place, float] | None = None
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        if self._active:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not self._active:
            return
        self._end.set()
        self._thread.join()
        with contextlib.suppress(OSError):
            self._file(self._ranks.rank).unlink()
            self._folder.rmdir()  # by whoever leaves last

    def at(self, what: str, *, waits: bool = False) -> None:
        """Note what this process does now; `waits`: it goes on when all ranks have come."""
        self._place = (what, time.time(), waits)

    def _watch(self) -> None:
        every = min(max(self._limit_s / 10, 0.05), 5.0)
        while not self._end.wait(every):
            place = self._place
            with contextlib.suppress(OSError):  # a full disk is for the run itself to report
                self._write(place)
            what, since, waits = place
            waited = time.time() - since
            due = self._limit_s
            if self._said is not None and self._said[0] == place:
                due = 2 * self._said[1]
            if waits and waited >= due:
                self._said = (place, waited)
                rank = self._ranks.rank
                text = f"rank {rank} has waited {waited:.0f} s in {what}; {self._others(what)}."
                with contextlib.suppress(OSError):
                    warn(text)

    def _others(self, what: str) -> str:
        """Where the ranks are that have not come."""
        elsewhere = []
        for rank in range(self._ranks.world_size):
            if rank == self._ranks.rank:
                continue
            try:
                there, since, _ = json.loads(self._file(rank).read_text(encoding="utf-8"))
                silent = time.time() - self._file(rank).stat().st_mtime
            except (OSError, ValueError):
                elsewhere.append(f"rank {rank} has given no sign of life")
                continue
            if there == what and silent < self._limit_s:
                continue  # it waits there, too
            text = f"rank {rank} was last seen in {there}, for {time.time() - since:.0f} s"
            lost = f", and has been silent for {silent:.0f} s"
            elsewhere.append(text + (lost if silent >= self._limit_s else ""))
        return "; ".join(elsewhere[:8]) or "all others are there, too: a slow step, or the network"

    def _write(self, place: Place) -> None:
        aside = self._folder / f".{self._ranks.rank}.json"
        aside.write_text(json.dumps(place), encoding="utf-8")
        aside.replace(self._file(self._ranks.rank))

    def _file(self, rank: int) -> Path:
        return self._folder / f"rank-{rank}.json"


def clear(folder: Path) -> None:
    """Take away what killed processes left; for one rank to do before the others begin."""
    shutil.rmtree(folder, ignore_errors=True)
