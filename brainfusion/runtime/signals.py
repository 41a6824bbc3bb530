"""Signals that ask a run to stop: it saves first, then leaves with a code that says so."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

STOPPED = 75
"""Exit code of a run that was asked to stop and has saved (EX_TEMPFAIL: start it again)."""
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Stopped(Exception):  # noqa: N818 - nothing went wrong
    """A run was asked to stop, and has saved where it was."""


class StopSignals:
    """Inside the block, SIGTERM and SIGUSR1 are noted instead of ending the process.

    A second signal of the same kind acts as it did before: it ends a run that hangs.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        """Name of the signal, once there was one."""
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():  # the only one that may
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _note(self, number: int, _: FrameType | None) -> None:
        self.received = signal.Signals(number).name
        signal.signal(number, self._before[signal.Signals(number)])
