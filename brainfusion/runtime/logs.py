"""What a run says: one JSON object a step in a file, short lines on the terminal."""

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from brainfusion.runtime.files import write_text

_files: list[Path] = []  # where lines go beside the terminal: those of the blocks now open


@contextmanager
def log_file(path: Path) -> Iterator[None]:
    """Inside the block, what is said goes to the end of a file, too: plain lines with their time.

    Every process may open the same file: only those that speak write.
    """
    _files.append(path)
    try:
        yield
    finally:
        _files.remove(path)


def say(text: str) -> None:
    """Print a line about what is being done, on standard error; results go to standard output.

    Of the processes that torchrun starts only the first speaks: they all do the same.
    """
    if os.environ.get("RANK", "0") == "0":
        warn(text)


def warn(text: str) -> None:
    """Print a line on standard error, whichever process it is."""
    print(text, file=sys.stderr, flush=True)
    _record(text)


def complain(text: str) -> None:
    """Print an error as one line on standard error, whichever process it is."""
    print(f"error: {text}", file=sys.stderr, flush=True)


def _record(text: str) -> None:
    for path in _files:
        with path.open("a", encoding="utf-8") as handle:
            handle.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")


class MetricsLog:
    """`metrics.jsonl`: one object a logged step, on disk at once; only the main rank writes.

    A new run starts an empty file; a run that is resumed keeps the rows up to `resume_step`.
    """

    def __init__(self, path: Path, *, active: bool = True, resume_step: int | None = None) -> None:
        self._path = path if active else None
        if not active:
            return
        rows = read_metrics(path) if resume_step is not None and path.exists() else []
        kept = [row for row in rows if row.get("step", 0) <= (resume_step or 0)]
        write_text(path, "".join(json.dumps(row) + "\n" for row in kept))

    def write(self, **values: Any) -> None:
        """Append one row."""
        if self._path is not None:
            with self._path.open("a", encoding="utf-8") as handle:
                handle.write(json.dumps(values) + "\n")

    def close(self) -> None:
        """Take no more rows."""
        self._path = None


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
    """A line of progress with the time left; rewritten on a terminal, repeated in a log.

    An open `log_file` gets a plain line every ten seconds at most, terminal or not.
    """

    def __init__(self, label: str, n_steps: int, *, start: int = 0, active: bool = True) -> None:
        self._label, self._n_steps, self._start, self._active = label, n_steps, start, active
        self._begin = self._last = self._recorded = time.monotonic()
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
        if done or now - self._recorded >= 10.0:
            self._recorded = now
            _record(text)
