"""Recordings on disk: memory-mapped .npy shards [recording, parcel, TR] and a Parquet index.

A shard holds recordings of one length. A parcel that a recording lacks is NaN in all its TRs.

Shape legend: n recordings, p parcels, t TRs.
"""

import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import polars as pl

from brainfusion.data.parquet import read_table
from brainfusion.runtime.errors import UserError
from brainfusion.runtime.files import atomic_file

INDEX_SCHEMA = {
    "recording": pl.String,
    "subject": pl.String,
    "session": pl.String,
    "shard": pl.String,
    "row": pl.Int64,
    "n_trs": pl.Int64,
    "tr_s": pl.Float64,
    "coverage": pl.Float64,
}
SHARD_BYTES = 256 * 2**20
_HEADER_BYTES = 128


@dataclass
class _Shard:
    """A shard that is being written: rows so far, of one length."""

    name: str
    n_trs: int
    n_rows: int = 0


class RecordingWriter:
    """Write recordings one at a time; memory holds one recording, whatever the cohort's size.

    Rows are appended to the shard of their length, and the index is written on a clean exit. After
    an error the folder has no index, so it cannot be opened: write inside `atomic_folder`.

    Args:
        folder: Where to write; empty, unless it is resumed.
        n_parcels: Parcels of each recording.
        shard_bytes: Size at which a shard is full.
        resume: What `add` returned for recordings that are in the folder already, in order, from a
            writer that did not end. What lies behind them is cut off.
    """

    def __init__(
        self,
        folder: Path,
        *,
        n_parcels: int,
        shard_bytes: int = SHARD_BYTES,
        resume: Sequence[tuple[Any, ...]] = (),
    ) -> None:
        self._folder, self._n_parcels, self._shard_bytes = folder, n_parcels, shard_bytes
        self._open: dict[int, _Shard] = {}
        self._shards: list[_Shard] = []
        self._rows: list[tuple[Any, ...]] = [tuple(row) for row in resume]
        self._names: set[str] = {row[0] for row in resume}

    def __enter__(self) -> "RecordingWriter":
        self._folder.mkdir(parents=True, exist_ok=True)
        if self._rows:
            self._cut_back()
        elif any(self._folder.iterdir()):
            raise UserError(
                f"{self._folder} is not empty: recordings are written into a new folder; give "
                "another one, or remove what is there."
            )
        return self

    def add(
        self,
        bold: np.ndarray,
        *,
        recording: str,
        subject: str,
        session: str = "1",
        tr_s: float | None,
    ) -> tuple[Any, ...]:
        """Append one recording; returns its row of the index.

        Args:
            bold: [p, t], any scale; a missing parcel is NaN in all its TRs. Stored as float32.
            recording: Its name, unique in the cohort.
            subject: Who was scanned.
            session: Which visit.
            tr_s: Time between frames in seconds; None if it is not known.

        Raises:
            UserError: A wrong shape, single NaN values, infinity, no data at all, a repeated name
                or a TR that is not positive.
        """
        if recording in self._names:
            raise UserError(
                f"recording '{recording}' was added twice: expected unique names; rename one or "
                "drop the copy."
            )
        if tr_s is not None and not (math.isfinite(tr_s) and tr_s > 0):
            raise UserError(f"recording '{recording}': tr_s={tr_s} must be seconds above zero.")
        bold, coverage = check_bold(bold, recording=recording, n_parcels=self._n_parcels)
        shard = self._shard_for(bold.shape[1])
        with (self._folder / shard.name).open("ab") as handle:
            if not shard.n_rows:
                handle.write(_header((0, *bold.shape)))
            handle.write(bold.tobytes())
        self._names.add(recording)
        place = (shard.name, shard.n_rows, bold.shape[1])
        self._rows.append((recording, subject, session, *place, tr_s, coverage))
        shard.n_rows += 1
        return self._rows[-1]

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None:
            return
        for shard in self._shards:
            with (self._folder / shard.name).open("r+b") as handle:
                handle.write(_header((shard.n_rows, self._n_parcels, shard.n_trs)))
        index = pl.DataFrame(self._rows, schema=INDEX_SCHEMA, orient="row")
        with atomic_file(self._folder / "index.parquet") as aside:
            index.write_parquet(aside)

    def _cut_back(self) -> None:
        """Leave in the folder what the rows list, as it was when the last of them was added."""
        for _, _, _, name, row, n_trs, *_ in self._rows:
            shard = self._open.get(n_trs)
            if shard is None or shard.name != name:
                shard = _Shard(name=name, n_trs=n_trs)
                self._shards.append(shard)
                self._open[n_trs] = shard
            shard.n_rows = row + 1
        for shard in self._shards:
            n_bytes = _HEADER_BYTES + 4 * self._n_parcels * shard.n_trs * shard.n_rows
            path = self._folder / shard.name
            if not path.is_file() or path.stat().st_size < n_bytes:
                raise UserError(
                    f"{path} is shorter than what was written to it: remove {self._folder.parent} "
                    "and start again."
                )
            os.truncate(path, n_bytes)
        kept = {shard.name for shard in self._shards}
        for path in self._folder.iterdir():
            if path.name not in kept:
                path.unlink()

    def _shard_for(self, n_trs: int) -> _Shard:
        shard = self._open.get(n_trs)
        row_bytes = 4 * self._n_parcels * n_trs
        if shard is None or (shard.n_rows + 1) * row_bytes > self._shard_bytes:
            shard = _Shard(name=f"shard-{len(self._shards):05d}.npy", n_trs=n_trs)
            self._shards.append(shard)
            self._open[n_trs] = shard
        return shard


class Recordings:
    """The recordings of a cohort, read one at a time from memory-mapped shards.

    Each read maps one recording and nothing else, and the map goes with the last view of it: what
    is resident is what is in use, in whatever order a cohort is read. Threads may read at once.
    """

    def __init__(
        self,
        folder: Path,
        index: pl.DataFrame,
        n_parcels: int,
        *,
        starts: dict[str, int] | None = None,
    ) -> None:
        self.folder, self.index, self.n_parcels = folder, index, n_parcels
        self.n_trs: np.ndarray = index["n_trs"].to_numpy()
        self._shard, self._row = index["shard"].to_list(), index["row"].to_list()
        # Where the numbers of each shard begin, in bytes; headers are read when it is not given.
        self._starts = {} if starts is None else starts

    @classmethod
    def open(cls, folder: Path) -> "Recordings":
        """Open a `recordings/` folder: the index and the shards' headers are read, no recording.

        Raises:
            UserError: The index is absent, lacks columns or repeats names; a shard is absent,
                truncated, of another type, or does not hold what the index says.
        """
        index = _read_index(folder / "index.parquet")
        n_parcels, starts = None, {}
        for part in index.partition_by("shard", maintain_order=True):
            path = folder / part["shard"][0]
            (n_rows, shard_parcels, n_trs), starts[path.name] = _check_shard(path)
            if n_parcels not in (None, shard_parcels):
                raise UserError(
                    f"{path} has {shard_parcels} parcels but the shards before it {n_parcels}: "
                    "all recordings of a cohort share one atlas; import them again."
                )
            n_parcels = shard_parcels
            rows = part["row"]
            if rows.min() < 0 or rows.max() >= n_rows or (part["n_trs"] != n_trs).any():  # type: ignore[operator]
                raise UserError(
                    f"{path} is [{n_rows}, {shard_parcels}, {n_trs}] but index.parquet lists other "
                    "rows or lengths: index and shards belong to different imports; import again."
                )
        assert n_parcels is not None
        return cls(folder, index, n_parcels, starts=starts)

    def __len__(self) -> int:
        return len(self._row)

    def read(self, i: int) -> np.ndarray:
        """Recording `i` as a read-only float32 view [p, t] of its memory-mapped shard."""
        shard, shape = self._shard[i], (self.n_parcels, int(self.n_trs[i]))
        path = self.folder / shard
        if shard not in self._starts:
            _, self._starts[shard] = _check_shard(path)
        return np.memmap(
            path,
            dtype="<f4",
            mode="r",
            offset=self._starts[shard] + 4 * math.prod(shape) * self._row[i],
            shape=shape,
        )

    def rows(self, subjects: Iterable[str]) -> np.ndarray:
        """Index rows (int64) of the recordings of these people, in the index's order."""
        wanted = pl.Series(list(subjects), dtype=pl.String)
        return self.index["subject"].is_in(wanted.implode()).arg_true().to_numpy().astype(np.int64)


def check_bold(
    bold: np.ndarray, *, recording: str, n_parcels: int | None = None
) -> tuple[np.ndarray, float]:
    """Check one recording [p, t]; returns it as contiguous float32, and its coverage.

    Raises:
        UserError: As `RecordingWriter.add` says.
    """
    if bold.ndim != 2 or 0 in bold.shape:
        raise UserError(
            f"recording '{recording}' has shape {list(bold.shape)}, expected [parcels, TRs]."
        )
    if n_parcels not in (None, len(bold)):
        raise UserError(
            f"recording '{recording}' has {len(bold)} parcels but the atlas has {n_parcels}. "
            "Parcel order carries meaning, so recordings are not padded or cut: give the parcels' "
            "names so that they can be matched, or re-parcellate it."
        )
    with np.errstate(over="ignore"):
        bold = np.ascontiguousarray(bold, dtype=np.float32)
    nan = np.isnan(bold)
    missing = nan.all(axis=1)
    if n_single := int(nan[~missing].sum()):
        n_hit = int(nan[~missing].any(axis=1).sum())
        raise UserError(
            f"recording '{recording}' has {n_single} single NaN values in {n_hit} parcels: "
            "expected numbers, or NaN in all TRs of a missing parcel. Interpolate or censor those "
            "frames before the import."
        )
    if n_infinite := int(np.isinf(bold).sum()):
        raise UserError(
            f"recording '{recording}' has {n_infinite} infinite values: expected finite float32 "
            "numbers; check the preprocessing of this run."
        )
    if missing.all():
        raise UserError(
            f"recording '{recording}' is NaN in all {len(bold)} parcels: expected data; leave it "
            "out."
        )
    return bold, float(1.0 - missing.mean())


def _header(shape: tuple[int, ...]) -> bytes:
    """An .npy header (format 1.0) of a fixed size, so that the row count can be filled in later."""
    text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}"
    start = np.lib.format.magic(1, 0)
    n_text = _HEADER_BYTES - len(start) - 2
    assert len(text) < n_text
    return start + n_text.to_bytes(2, "little") + (text.ljust(n_text - 1) + "\n").encode("latin1")


def _check_shard(path: Path) -> tuple[tuple[int, int, int], int]:
    """The shape [n, p, t] of a shard and where its numbers begin; it must be as long as it says."""
    again = "restore it or import the recordings again."
    if not path.is_file():
        raise UserError(f"{path} does not exist but index.parquet lists it: {again}")
    try:
        with path.open("rb") as handle:
            version = np.lib.format.read_magic(handle)
            read = (
                np.lib.format.read_array_header_1_0
                if version == (1, 0)
                else np.lib.format.read_array_header_2_0
            )
            shape, fortran, dtype = read(handle)
            n_bytes = handle.tell()
    except ValueError as error:
        raise UserError(f"{path} is not a whole .npy file ({error}): {again}") from error
    if dtype != np.dtype("<f4") or fortran or len(shape) != 3:
        raise UserError(
            f"{path} holds {dtype} {list(shape)}, expected C-ordered float32 [recording, parcel, "
            f"TR]: {again}"
        )
    expected, got = n_bytes + 4 * math.prod(shape), path.stat().st_size
    if got < expected:
        raise UserError(
            f"{path} is truncated: {got} bytes of {expected} for {list(shape)} float32: {again}"
        )
    return shape, n_bytes


def _read_index(path: Path) -> pl.DataFrame:
    index = read_table(
        path,
        absent="expected an index of the shards beside it; make the cohort with 'brainfusion "
        "import'.",
    )
    if absent := [name for name in INDEX_SCHEMA if name not in index.columns]:
        raise UserError(
            f"{path} has no column {', '.join(map(repr, absent))}: expected "
            f"{', '.join(INDEX_SCHEMA)} (docs/formats.md)."
        )
    if index.is_empty():
        raise UserError(f"{path} lists no recording: expected at least one; import some.")
    if index["subject"].dtype != pl.String or index["recording"].dtype != pl.String:
        raise UserError(f"{path}: 'recording' and 'subject' must be text: make it again.")
    try:
        index = index.select(pl.col(name).cast(kind) for name, kind in INDEX_SCHEMA.items())
    except pl.exceptions.PolarsError as error:
        raise UserError(f"{path}: a column has the wrong type ({error}): make it again.") from error
    required = index.drop("tr_s").null_count().row(0)
    if any(required):
        raise UserError(f"{path} has empty cells: only 'tr_s' may be unknown; make it again.")
    if n_twice := len(index) - index["recording"].n_unique():
        raise UserError(f"{path}: {n_twice} recording names repeat: expected unique names.")
    return index
