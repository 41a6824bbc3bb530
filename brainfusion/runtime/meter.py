"""How fast a loop goes, and what share of its time it waits for data."""

import time


class Meter:
    """Rates since they were last read; pauses, such as for validation, do not count."""

    def __init__(self) -> None:
        self._begin, self._paused_s, self._waited_s = time.monotonic(), 0.0, 0.0
        self._pause_began: float | None = None

    def pause(self) -> None:
        """Stop the clock until `go_on`."""
        self._pause_began = time.monotonic()

    def go_on(self) -> None:
        """Start the clock again."""
        assert self._pause_began is not None
        self._paused_s += time.monotonic() - self._pause_began
        self._pause_began = None

    def read(self, n_windows: int, waited_s: float) -> dict[str, float]:
        """Rates since the last reading, and start anew.

        Args:
            n_windows: Windows since then.
            waited_s: Seconds that were waited for data since the beginning of all.
        """
        passed = max(time.monotonic() - self._begin - self._paused_s, 1e-9)
        waited = waited_s - self._waited_s
        self._begin, self._paused_s, self._waited_s = time.monotonic(), 0.0, waited_s
        return {
            "windows_per_s": n_windows / passed,
            "wait_share": min(max(waited / passed, 0.0), 1.0),
        }
