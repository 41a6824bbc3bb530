"""Writing a store block by block, in any order, in memory that does not grow with the people.

A storage is how the vectors lie on disk (`docs/formats.md`):

- "float32": as they are
- "dictionary": each distinct vector of a gene once, and a number a haplotype. Exact, too, and small
  where haplotypes are shared.
- "centred-float16": float16 of what differs from the gene's centre, times a power of two. A value v
  comes back within 2^-11 |v - centre| + 2^-37 max|v| + 2^-23 |v|. What differs between people is a
  thousandth of a pooled vector, so of that all but about 1e-7 of the variance is kept, where
  float16 of the vector itself loses up to a third.

Shape legend: n people, g genes, p haplotypes, h width, r rows and c columns of a block, u distinct
vectors.
"""

import dataclasses
import os
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import numpy as np

from brainfusion.genetics.checks import Alarm
from brainfusion.genetics.features import Provenance
from brainfusion.genetics.haplotypes import Dictionary
from brainfusion.runtime.errors import UserError, nearest
from brainfusion.runtime.files import atomic_folder, hash_file, hash_json, write_json

FORMAT = 2
TABLES = ("subjects.parquet", "genes.parquet")
Storage = Literal["float32", "centred-float16", "dictionary"]
ARRAYS: dict[Storage, tuple[str, ...]] = {
    "float32": ("vectors.npy",),
    "centred-float16": ("residuals.npy", "centre.npy", "scale.npy"),
    "dictionary": ("dictionary.npy", "offsets.npy", "index.npy"),
}
"""The files of each storage, besides `mask.npy`."""

_PEAK = 2.0**12
"""What the largest value of a gene's first block becomes in float16, whose own largest is 65,504:
later values may be 16 times that, and normal numbers reach down to 2^-26 of it."""
_COPY_ROWS = 4096


class StoreWriter:
    """Writes a store to the folder `path`, in place of a store that is there: whole or absent.

        with StoreWriter(path, subjects=..., genes=..., width=2048) as writer:
            for block in stream:
                writer.add(block.rows, block.columns, block.vectors, block.mask)
            writer.finish(stream.provenance, stream.alarms)

    Leaving the block without `finish`, or on an error, leaves `path` as it was.

    Raises:
        UserError: `path` holds something else, cannot be written to, or the disk is too small.
    """

    def __init__(
        self,
        path: Path,
        *,
        subjects: Sequence[str],
        genes: Sequence[str],
        width: int,
        storage: str = "float32",
        n_haplotypes: int = 1,
        source: str | None = None,
    ) -> None:
        """Prepare; nothing is written yet.

        Args:
            path: The folder to be; its parent is made if it is not there.
            subjects: Ids in row order.
            genes: Names in column order.
            width: Numbers in a vector.
            storage: A key of `ARRAYS`.
            n_haplotypes: 2 where blocks keep both haplotypes apart.
            source: A hash of what the vectors are made from, kept in meta.json.
        """
        if storage not in ARRAYS:
            raise UserError(f"unknown storage '{storage}'. {nearest(storage, ARRAYS)}")
        if path.exists() and not is_store(path) and (not path.is_dir() or any(path.iterdir())):
            raise UserError(f"{path} exists and is no store: give another folder, or move it away.")
        if not subjects or not genes or width < 1:
            raise UserError(
                f"nothing to store in {path}: {len(subjects)} people x {len(genes)} genes x "
                f"{width} values; give at least one of each."
            )
        self._path, self._source, self._storage = path, source, storage
        self._ids = {"subject": tuple(subjects), "gene": tuple(genes)}
        self.shape = (len(self._ids["subject"]), len(self._ids["gene"]), n_haplotypes, width)
        self._n_cells, self._finished = 0, False
        self._stack = ExitStack()

    def __enter__(self) -> "StoreWriter":
        try:
            self._folder = self._stack.enter_context(atomic_folder(self._path))
            self._mask = _ArrayFile(self._folder / "mask.npy", self.shape[:2], np.bool_)
            self._vectors = _WRITERS[self._storage](self._folder, self.shape, self._ids["gene"])
        except OSError as error:
            self._stack.__exit__(type(error), error, error.__traceback__)
            raise self._cannot(error) from error
        return self

    def add(self, rows: slice, columns: slice, vectors: np.ndarray, mask: np.ndarray) -> None:
        """Write one block; blocks are disjoint, and together they are everything.

        Args:
            rows: Which people.
            columns: Which genes.
            vectors: float32 [r, c, h], or [r, c, p, h] where haplotypes are kept apart.
            mask: bool [r, c]; what it hides is stored as zeros.
        """
        n, g, p, h = self.shape
        r, c = len(range(*rows.indices(n))), len(range(*columns.indices(g)))
        expected = (r, c, h) if p == 1 and vectors.ndim == 3 else (r, c, p, h)
        if vectors.shape != expected or vectors.dtype != np.float32 or mask.shape != (r, c):
            raise ValueError(
                f"a block of {vectors.dtype} {vectors.shape} with mask {mask.shape}; expected "
                f"float32 {expected} with mask {(r, c)}"
            )
        vectors = vectors.reshape(r, c, p, h)
        if not mask.all():
            vectors = np.where(mask[:, :, None, None], vectors, np.float32(0.0))
        try:
            self._mask.write((rows, columns), mask)
            self._vectors.add(rows, columns, vectors, mask)
        except OSError as error:
            raise self._cannot(error) from error
        self._n_cells += r * c

    def finish(self, provenance: Provenance, alarms: Sequence[Alarm] = ()) -> None:
        """Close the files, hash them, and say where they come from."""
        n, g, p, h = self.shape
        if self._n_cells != n * g:
            raise ValueError(f"blocks cover {self._n_cells} of {n * g} vectors")
        try:
            self._vectors.close()
            self._write_ids()
            names = (*ARRAYS[self._storage], "mask.npy", *TABLES)  # type: ignore[index]
            files = {
                name: {"bytes": (self._folder / name).stat().st_size, "hash": hash_file(file)}
                for name, file in ((name, self._folder / name) for name in names)
            }
            declared = provenance.to_dict()
            meta = {
                "format": FORMAT,
                "kind": "genetics",
                "storage": self._storage,
                "shape": [n, g, h],
                "haplotypes": p,
                "hash": hash_json({name: files[name]["hash"] for name in names}),
                "source": self._source,
                "files": files,
                "provenance": declared,
                "provenance_hash": hash_json(declared),
                "alarms": [dataclasses.asdict(alarm) for alarm in alarms],
            }
            write_json(self._folder / "meta.json", meta)
        except OSError as error:
            raise self._cannot(error) from error
        self._finished = True

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None and not self._finished:
            error = ValueError("the store was left before it was finished")
            self._stack.__exit__(ValueError, error, None)
            raise error
        try:
            self._stack.__exit__(kind, error, trace)
        except OSError as failure:
            if failure is error:
                return
            raise self._cannot(failure) from failure

    def _write_ids(self) -> None:
        import polars as pl

        for name, values in self._ids.items():
            table = pl.DataFrame({name: list(values)}, schema={name: pl.String})
            table.write_parquet(self._folder / f"{name}s.parquet")

    def _cannot(self, error: OSError) -> UserError:
        return UserError(
            f"cannot write the store {self._path} ({error.strerror or error}): give another "
            "folder, or free space and check its permissions."
        )


def is_store(path: Path) -> bool:
    """Whether a folder is a store, whole or not (a model's own files are no store)."""
    return path.is_dir() and any((path / name).exists() for name in ("meta.json", TABLES[0]))


# -- storages --------------------------------------------------------------------------------------


class _ArrayFile:
    """A `.npy` whose space is claimed at once and that is mapped only while it is written to.

    So a full disk is an error at the start rather than a crash in the middle, and what was written
    does not stay in this process's memory.
    """

    def __init__(self, path: Path, shape: tuple[int, ...], dtype: Any) -> None:
        self.path = path
        np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
        if hasattr(os, "posix_fallocate"):
            with path.open("r+b") as handle:
                os.posix_fallocate(handle.fileno(), 0, path.stat().st_size)

    def write(self, where: tuple[slice | int, ...], values: np.ndarray) -> None:
        np.lib.format.open_memmap(self.path, mode="r+")[where] = values


class _Float32:
    """vectors.npy: float32 [n, g, h], or [n, g, 2, h]."""

    def __init__(self, folder: Path, shape: tuple[int, ...], genes: Sequence[str]) -> None:
        self._merged = shape[2] == 1
        self._file = _ArrayFile(folder / "vectors.npy", _squeezed(shape), np.float32)

    def add(self, rows: slice, columns: slice, vectors: np.ndarray, mask: np.ndarray) -> None:
        self._file.write((rows, columns), vectors[:, :, 0] if self._merged else vectors)

    def close(self) -> None:
        pass


class _CentredFloat16:
    """residuals.npy, float16, is as vectors.npy; centre.npy [g, h] and scale.npy [g] are float32.

    A gene's centre is the mean over its first block: any vector near the others would do, and what
    is read back does not depend on it but for rounding.
    """

    def __init__(self, folder: Path, shape: tuple[int, ...], genes: Sequence[str]) -> None:
        self._folder, self._genes, self._merged = folder, genes, shape[2] == 1
        self._file = _ArrayFile(folder / "residuals.npy", _squeezed(shape), np.float16)
        self._centre = np.zeros((shape[1], shape[3]), dtype=np.float32)
        self._scale = np.zeros(shape[1], dtype=np.float32)

    def add(self, rows: slice, columns: slice, vectors: np.ndarray, mask: np.ndarray) -> None:
        for position, gene in enumerate(range(*columns.indices(len(self._genes)))):
            present, values = mask[:, position], vectors[:, position]
            if not self._scale[gene] and present.any():
                self._centre[gene] = values[present].mean(axis=(0, 1), dtype=np.float64)
                largest = max(float(np.abs(values).max()), float(np.finfo(np.float32).tiny))
                self._scale[gene] = 2.0 ** np.ceil(np.log2(largest / _PEAK))
            if not self._scale[gene]:
                continue
            with np.errstate(over="ignore"):  # infinity is refused below
                residuals = (values - self._centre[gene]) / self._scale[gene]
            residuals[~present] = 0.0
            if np.abs(residuals).max() > np.finfo(np.float16).max:
                raise UserError(
                    f"gene {self._genes[gene]}: a value is more than 10 times as large as all of "
                    "the people before it, beyond what centred-float16 can hold: look at that "
                    "gene, or use --storage float32."
                )
            kept = residuals[:, 0] if self._merged else residuals
            self._file.write((rows, gene), kept.astype(np.float16))

    def close(self) -> None:
        np.save(self._folder / "centre.npy", self._centre, allow_pickle=False)
        np.save(self._folder / "scale.npy", self._scale, allow_pickle=False)


class _DictionaryFiles:
    """dictionary.npy, float32 [all genes' u, h]; offsets.npy [g + 1]; index.npy [n, p, g].

    New vectors are appended as they come, and sorted by gene at the end unless they came so.
    """

    def __init__(self, folder: Path, shape: tuple[int, ...], genes: Sequence[str]) -> None:
        n, g, p, self._width = shape
        self._folder = folder
        self._index = _ArrayFile(folder / "index.npy", (n, p, g), np.uint32)
        self._dictionaries = [Dictionary() for _ in range(g)]
        self._gene_of: list[np.ndarray] = []  # of each appended vector, a block at a time
        self._spool = folder / "dictionary.npy"
        self._n_spooled = 0
        self._header_bytes = self._write_header("wb", 0)

    def add(self, rows: slice, columns: slice, vectors: np.ndarray, mask: np.ndarray) -> None:
        r, _, p, h = vectors.shape
        for position, gene in enumerate(range(*columns.indices(len(self._dictionaries)))):
            values = np.ascontiguousarray(vectors[:, position]).reshape(r * p, h)
            numbers, new = self._dictionaries[gene].add(values)
            with self._spool.open("ab") as handle:
                handle.write(values[new].data)
            self._gene_of.append(np.full(len(new), gene, dtype=np.int32))
            self._n_spooled += len(new)
            self._index.write((rows, slice(None), gene), numbers.reshape(r, p))

    def close(self) -> None:
        sizes = np.array([len(dictionary) for dictionary in self._dictionaries])
        offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        np.save(self._folder / "offsets.npy", offsets, allow_pickle=False)
        self._dictionaries = []
        assert self._write_header("r+b", self._n_spooled) == self._header_bytes
        order = np.argsort(np.concatenate(self._gene_of), kind="stable")
        if np.any(np.diff(order) != 1):
            self._sort(order)
        if sizes.max() <= 2**16:
            self._narrow_index()

    def _write_header(self, mode: str, n_rows: int) -> int:
        """The header, in which numpy leaves room for a first axis that grows; its bytes."""
        header = {"descr": "<f4", "fortran_order": False, "shape": (n_rows, self._width)}
        with self._spool.open(mode) as handle:
            np.lib.format.write_array_header_1_0(handle, header)  # type: ignore[arg-type]
            return handle.tell()

    def _sort(self, order: np.ndarray) -> None:
        aside = self._folder / "sorted.npy"
        shape = (len(order), self._width)
        out = _ArrayFile(aside, shape, np.float32)
        for start in range(0, len(order), _COPY_ROWS):
            spooled = np.load(self._spool, mmap_mode="r", allow_pickle=False)
            part = slice(start, start + _COPY_ROWS)
            out.write((part,), spooled[order[part]])
        aside.replace(self._spool)

    def _narrow_index(self) -> None:
        """Numbers below 65,536 need two bytes."""
        wide, aside = self._index.path, self._folder / "narrow.npy"
        shape = np.load(wide, mmap_mode="r", allow_pickle=False).shape
        narrow = _ArrayFile(aside, shape, np.uint16)
        for start in range(0, shape[0], _COPY_ROWS):
            part = slice(start, start + _COPY_ROWS)
            numbers = np.load(wide, mmap_mode="r", allow_pickle=False)[part]
            narrow.write((part,), numbers.astype(np.uint16))
        aside.replace(wide)


_WRITERS: dict[str, Any] = {
    "float32": _Float32,
    "centred-float16": _CentredFloat16,
    "dictionary": _DictionaryFiles,
}


def _squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape without the axis of haplotypes, where there is only one."""
    n, g, p, h = shape
    return (n, g, h) if p == 1 else (n, g, p, h)
