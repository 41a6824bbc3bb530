"""The blocks of a stream, read in several processes, and kept until the store is whole.

Pooling the tokens of a biobank takes days. Each block that is ready is kept beside the store that
is to be, so that an import that was stopped goes on where it was: parts/00017.npz. The folder
belongs to one state of the files (names, sizes, times) and of the options; parts of another are
thrown away.
"""

import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np

from brainfusion.genetics.source import Findings
from brainfusion.genetics.stream import ReadyBlock, Stream
from brainfusion.runtime.errors import UserError
from brainfusion.runtime.files import atomic_file, hash_json, read_json, write_json
from brainfusion.runtime.workers import in_workers

_KEY = "key.json"


def hash_source(path: Path, how: dict[str, Any]) -> str:
    """A hash of the files under `path` (names, sizes, times of change) and of how they are read."""
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    states = [(file, file.stat()) for file in files]
    listed = [
        [str(file.relative_to(path)), state.st_size, state.st_mtime_ns] for file, state in states
    ]
    return hash_json({"files": listed, "how": how})


class Parts:
    """A folder of blocks that are ready.

    Args:
        folder: Beside the store that is to be.
        key: `hash_source` of what is read.
    """

    def __init__(self, folder: Path, key: str) -> None:
        self._folder = folder
        found = folder / _KEY
        self.discarded = found.exists() and read_json(found) != {"key": key}
        if folder.exists() and (self.discarded or not found.exists()):
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(found, {"key": key})

    def __len__(self) -> int:
        return len(list(self._folder.glob("[0-9]*.npz")))

    def __contains__(self, number: int) -> bool:
        return self._file(number).exists()

    def keep(self, number: int, block: ReadyBlock) -> None:
        """Write a block, wholly or not at all."""
        facts = {
            "rows": [block.rows.start, block.rows.stop],
            "columns": [block.columns.start, block.columns.stop],
            "dtype": block.dtype,
            "resolutions": list(block.resolutions),
            "steps": list(block.steps),
            "findings": {
                **vars(block.findings),
                "lengths_bp": sorted(block.findings.lengths_bp),
            },
        }
        try:
            with atomic_file(self._file(number)) as aside, aside.open("wb") as handle:
                np.savez(handle, vectors=block.vectors, mask=block.mask, facts=json.dumps(facts))
        except OSError as error:
            raise UserError(
                f"cannot keep parts in {self._folder} ({error.strerror or error}): free space "
                "(as much as the vectors in float32), or give --no-keep-parts."
            ) from error

    def load(self, number: int) -> ReadyBlock:
        """Read a block that was kept."""
        with np.load(self._file(number), allow_pickle=False) as archive:
            facts = json.loads(str(archive["facts"]))
            return ReadyBlock(
                rows=slice(*facts["rows"]),
                columns=slice(*facts["columns"]),
                vectors=archive["vectors"],
                mask=archive["mask"],
                dtype=facts["dtype"],
                resolutions=tuple(facts["resolutions"]),
                steps=tuple(facts["steps"]),
                findings=_read_findings(facts["findings"]),
            )

    def remove(self) -> None:
        """Throw all parts away: the store is whole."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _file(self, number: int) -> Path:
        return self._folder / f"{number:05d}.npz"


def _read_findings(facts: dict[str, Any]) -> Findings:
    covariates = {name: Counter(counts) for name, counts in facts["covariates"].items()}
    lengths_bp = set(facts["lengths_bp"])
    return Findings(**{**facts, "covariates": covariates, "lengths_bp": lengths_bp})


def ready_blocks(
    stream: Stream,
    open_again: Callable[[], Stream],
    *,
    n_workers: int = 1,
    parts: Parts | None = None,
) -> Iterator[ReadyBlock]:
    """All blocks of a stream in order, accounted for; the books are closed after the last one.

    Args:
        stream: Where blocks are accounted for.
        open_again: Opens the same stream in another process.
        n_workers: Processes that read; with one, this process reads.
        parts: Where blocks are kept, and found again.

    Raises:
        UserError: What reading finds.
    """
    missing = [n for n in range(stream.n_blocks) if parts is None or n not in parts]
    # A process of its own costs seconds to start: not for a block or two.
    if n_workers > 1 and len(missing) > 2:
        source = in_workers(
            _read_in_worker,
            missing,
            n_workers=n_workers,
            n_ahead=n_workers,
            begin=_open_worker,
            begin_with=(open_again,),
            hint="; what was kept is not read again",
        )
    else:
        source = _read_here(stream, missing)
    for number in range(stream.n_blocks):
        if parts is not None and number in parts:
            block = parts.load(number)
        else:
            block = next(source)
            if parts is not None:
                parts.keep(number, block)
        stream.account(block)
        yield block
    stream.finish()


def _read_here(stream: Stream, numbers: list[int]) -> Iterator[ReadyBlock]:
    # Runs of neighbours are read together: opening a file is not free.
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][1] == number:
            runs[-1][1] = number + 1
        else:
            runs.append([number, number + 1])
    for start, stop in runs:
        yield from stream.blocks(start, stop)


_worker_stream: Stream | None = None


def _open_worker(open_again: Callable[[], Stream]) -> None:
    global _worker_stream
    with redirect_stderr(StringIO()):  # the first process has said it all
        _worker_stream = open_again()


def _read_in_worker(number: int) -> ReadyBlock:
    assert _worker_stream is not None
    return next(_worker_stream.blocks(number, number + 1))
