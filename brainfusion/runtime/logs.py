"""What a run says: one JSON object a step in a file, short lines on the terminal."""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any


def say(text: str) -> None:
    """Print a line about what is being done, on standard error; results go to standard output."""
    print(text, file=sys.stderr, flush=True)


class MetricsLog:
    """`metrics.jsonl`: one object a logged step, flushed at once; only the main rank writes."""

    def __init__(self, path: Path, *, active: bool = True, resume_step: int | None = None) -> None:
        self._handle = None
        if not active:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        if resume_step is None:
            path.unlink(missing_ok=True)
        elif path.exists():
            kept = [row for row in read_metrics(path) if row.get("step", 0) <= resume_step]
            path.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
        self._handle = path.open("a", encoding="utf-8")

    def write(self, **values: Any) -> None:
        """Append one row."""
        if self._handle is not None:
            self._handle.write(json.dumps(values) + "\n")
            self._handle.flush()

    def close(self) -> None:
        """Close the file."""
        if self._handle is not None:
            self._handle.close()
            self._handle = None


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a `metrics.jsonl`; a last line that was cut off by a crash is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


class Progress:
    """A line of progress with the time left; rewritten on a terminal, repeated in a log."""

    def __init__(self, label: str, n_steps: int, *, start: int = 0, active: bool = True) -> None:
        self._label, self._n_steps, self._start, self._active = label, n_steps, start, active
        self._begin = self._last = time.monotonic()
        self._terminal = sys.stderr.isatty() and os.environ.get("TERM") != "dumb"

    def update(self, step: int, note: str = "") -> None:
        """Show `step` of the whole, unless it was shown a moment ago."""
        now = time.monotonic()
        done = step >= self._n_steps
        if not self._active or (not done and now - self._last < (0.2 if self._terminal else 10.0)):
            return
        self._last = now
        left_s = (now - self._begin) / max(step - self._start, 1) * (self._n_steps - step)
        time_note = f"{now - self._begin:.0f} s" if done else f"{left_s:.0f} s left"
        text = f"{self._label}: {step}/{self._n_steps}, {time_note}{', ' if note else ''}{note}"
        if self._terminal:
            print(f"\r\x1b[K{text}", end="\n" if done else "", file=sys.stderr, flush=True)
        else:
            print(text, file=sys.stderr, flush=True)
