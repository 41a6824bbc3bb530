"""Partial results of a long embedding: part files that a killed run leaves and the next one keeps.

A folder beside the feature file holds `key.json`, which says what was being computed, and parts
that are whole or absent: rows of the recordings' index with their vectors. Which process wrote a
part, and with what batch size, does not matter.

Shape legend: n recordings of a part, f features.
"""

import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np

from brainfusion.runtime.errors import UserError
from brainfusion.runtime.files import atomic_file, read_json, write_json
from brainfusion.runtime.logs import say

SAVE_EVERY_S = 30.0
"""A part is written after this time at the latest: what a killed run loses."""
PART_BYTES = 64 * 2**20
"""A part is written once it holds this much."""
_KEY = "key.json"
_PARTS = "part-*.npy"


class Parts:
    """Vectors of recordings in a work folder, written by any number of processes."""

    def __init__(self, folder: Path, *, save_every_s: float = SAVE_EVERY_S) -> None:
        self.folder, self._save_every_s = folder, save_every_s
        self._pending: list[tuple[np.ndarray, np.ndarray]] = []
        self._n_bytes, self._saved_at = 0, time.monotonic()

    def check(self, key: dict[str, Any]) -> None:
        """Refuse a folder that holds parts of another run; changes nothing.

        Raises:
            UserError: Something else was being computed there; what differs is named.
        """
        if not self.folder.exists():
            return
        forget = "Finish that run as it was, or pass --restart to forget it."
        path = self.folder / _KEY
        if not self.folder.is_dir() or (any(self.folder.iterdir()) and not path.is_file()):
            raise UserError(
                f"{self.folder} is not a folder of partial features (it has no {_KEY}), so it is "
                "neither used nor replaced: give another --out, or move it away."
            )
        if any(self.folder.glob(_PARTS)) and (found := read_json(path)) != key:
            found = found if isinstance(found, dict) else {}
            names = [name for name in {**found, **key} if found.get(name) != key.get(name)]
            changes = ", ".join(f"{name} {found.get(name)} -> {key.get(name)}" for name in names)
            raise UserError(
                f"{self.folder} holds parts of another run, which are not mixed with this one's "
                f"({changes}). {forget}"
            )

    def begin(self, key: dict[str, Any]) -> None:
        """Make the folder for this key; for one process to do, after `check`."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for leftover in self.folder.glob(".*"):
            leftover.unlink()  # of a process that was killed while it wrote
        write_json(self.folder / _KEY, key)

    def done(self) -> np.ndarray:
        """Rows (int64, ascending) that have a vector; broken parts are taken away and said."""
        rows = [part["row"] for part in self._open(remove_broken=True)]
        return np.unique(np.concatenate([np.empty(0, np.int64), *rows]))

    def add(self, rows: np.ndarray, vectors: np.ndarray) -> None:
        """Keep the vectors, float32 [n, f], of recordings; written once it is time."""
        self._pending.append((rows, vectors))
        self._n_bytes += vectors.nbytes
        if self._n_bytes >= PART_BYTES or time.monotonic() - self._saved_at >= self._save_every_s:
            self.flush()

    def flush(self) -> None:
        """Write what is pending as one part."""
        if self._pending:
            rows = np.concatenate([rows for rows, _ in self._pending])
            vectors = np.concatenate([vectors for _, vectors in self._pending])
            part = np.empty(len(rows), [("row", "<i8"), ("vector", "<f4", (vectors.shape[1],))])
            part["row"], part["vector"] = rows, vectors
            # Each row is in one part alone, so its number makes a name that no other process takes.
            with atomic_file(self.folder / f"part-{rows[0]:08d}.npy") as aside:
                _save(aside, part)
        self._pending, self._n_bytes, self._saved_at = [], 0, time.monotonic()

    def means(self, groups: list[np.ndarray]) -> np.ndarray:
        """The mean vector, float32 [group, f], of each group of rows: float64, in the rows' order.

        Raises:
            UserError: A row has no vector: another process has removed parts meanwhile.
        """
        parts = self._open()
        place = {
            int(row): (number, i)
            for number, part in enumerate(parts)
            for i, row in enumerate(part["row"])
        }
        if n_gone := sum(int(row) not in place for rows in groups for row in rows):
            raise UserError(
                f"{self.folder} lacks the vectors of {n_gone} recordings that were written there: "
                "is another run writing the same file? Run the command again, it takes up from "
                "what there is."
            )
        width = parts[0].dtype["vector"].shape[0]
        means = np.empty((len(groups), width), np.float32)
        for i, rows in enumerate(groups):
            total = np.zeros(width)
            for row in sorted(map(int, rows)):
                number, at = place[row]
                total += parts[number]["vector"][at]
            means[i] = total / len(rows)
        return means

    def remove(self, *, unless_begun: bool = False) -> None:
        """Take the folder away; with `unless_begun` only if it holds no part."""
        if not (unless_begun and any(self.folder.glob(_PARTS))):
            shutil.rmtree(self.folder, ignore_errors=True)

    def _open(self, *, remove_broken: bool = False) -> list[np.ndarray]:
        """The parts, memory-mapped, in the order of their names."""
        found = []
        for path in sorted(self.folder.glob(_PARTS)):
            try:
                found.append(np.load(path, mmap_mode="r", allow_pickle=False))
            except (ValueError, EOFError):
                say(f"{path} is broken: its recordings are encoded again.")
                if remove_broken:
                    path.unlink(missing_ok=True)
        return found


def _save(path: Path, part: np.ndarray) -> None:
    """As `np.save`, which does not say why a disk takes no more."""
    with path.open("wb") as handle:
        header = np.lib.format.header_data_from_array_1_0(part)
        np.lib.format.write_array_header_1_0(handle, header)
        handle.write(part.view(np.uint8).data)
