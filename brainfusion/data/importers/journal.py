"""What an import has done so far, a line a recording, so that a stopped one goes on from there.

`.<cohort>-parts/` beside the cohort that is to be holds the shards and `journal.jsonl`. Its lines
count as far as they belong to the same files (names, sizes, times), in the same order, read in the
same way; what lies behind, a last line that was cut off included, is read again.
"""

import fcntl
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from brainfusion import __version__
from brainfusion.data.importers.config import ImportConfig
from brainfusion.data.importers.matching import Facts, Layout
from brainfusion.data.importers.sources import Item
from brainfusion.runtime.errors import UserError
from brainfusion.runtime.files import hash_json, read_json, write_json
from brainfusion.runtime.logs import say

FORMAT = 1
KEEP_FROM = 64
"""Recordings from which on a failed import is worth keeping."""
# Options that do not change what becomes of a recording, or that show in the list of files.
_FREE = {"out", "overwrite", "workers", "keep_parts", "name", "notes", "subjects", "subject_column"}
_FREE |= {"missing_subjects", "low_coverage", "ids", "id_column", "pattern", "glob", "entities"}
_FREE |= {"atlas", "source", "kind"}


class Journal:
    """The parts of one import; at most one process has them open."""

    def __init__(self, config: ImportConfig, kind: str, layout: Layout) -> None:
        self.folder = config.out.parent / f".{config.out.name}-parts"
        self.recordings = self.folder / "recordings"
        self._low_coverage, self._root = config.low_coverage, config.source
        self._key = _key(config, kind, layout)
        self._stats: dict[Path, list[int]] = {}
        self.n_done = 0

    def open(self, items: Sequence[Item]) -> list[tuple[Facts, tuple[Any, ...] | None]]:
        """Take the folder; what the lines say that still hold, in the order of the items.

        Raises:
            UserError: Another import has it.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = (self.folder / "lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._lock.close()
            raise UserError(
                f"another import is writing {self.folder}: wait for it, or give another --out."
            ) from error
        except OSError as error:
            say(f"{self.folder} cannot be locked ({error.strerror}): start one import at a time.")
        lines = self._valid_lines(items)
        write_json(self.folder / "key.json", self._key)
        path = self.folder / "journal.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        self._file = path.open("a", encoding="utf-8")
        self.n_done = len(lines)
        done = []
        for line in lines:
            row = None if line["row"] is None else tuple(line["row"])
            done.append((Facts(**line["facts"]), row))
        return done

    def write(self, item: Item, facts: Facts, row: tuple[Any, ...] | None) -> None:
        """Add a recording that is in its shard, or that was left out (`row` None)."""
        line = {"item": self._state(item), "facts": facts.to_dict(), "row": row}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        self.n_done += 1

    def clear(self) -> None:
        """Throw away shards that no line counts."""
        shutil.rmtree(self.recordings, ignore_errors=True)

    def close(self, *, keep: bool) -> None:
        """Let go of the folder, and remove it unless it is kept."""
        self._file.close()
        if not keep:
            shutil.rmtree(self.folder, ignore_errors=True)
        self._lock.close()

    def _valid_lines(self, items: Sequence[Item]) -> list[dict[str, Any]]:
        path, key = self.folder / "journal.jsonl", self.folder / "key.json"
        if not path.is_file() or not key.is_file():
            return []
        if read_json(key) != self._key:
            say(f"{self.folder} is of another import (options or atlas): it is read anew.")
            return []
        lines: list[dict[str, Any]] = []
        with path.open(encoding="utf-8") as file:
            for text, item in zip(file, items, strict=False):
                try:
                    line = json.loads(text)
                except json.JSONDecodeError:
                    break
                refused = line["row"] is None and self._low_coverage == "refuse"
                if refused or line["item"] != self._state(item):
                    break
                lines.append(line)
        return lines

    def _state(self, item: Item) -> list[Any]:
        """All that tells an item, and the state of its file, from another."""
        if item.path not in self._stats:
            state = item.path.stat()
            self._stats[item.path] = [state.st_size, state.st_mtime_ns]
        facts = {**asdict(item), "path": str(item.path.absolute())}
        return [*facts.values(), *self._stats[item.path]]


def _key(config: ImportConfig, kind: str, layout: Layout) -> dict[str, Any]:
    options = {
        name: [str(value), *_state(value)] if isinstance(value, Path) else value
        for name in config.__dataclass_fields__
        if name not in _FREE
        for value in [getattr(config, name)]
    }
    held = hash_json({"options": json.loads(json.dumps(options)), "layout": layout.to_dict()})
    return {"format": FORMAT, "version": __version__, "kind": kind, "hash": held}


def _state(path: Path) -> list[int]:
    state = path.stat()
    return [state.st_size, state.st_mtime_ns]
