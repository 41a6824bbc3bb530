"""The store: one memory-mapped array, its ids, its mask and where it came from.

    vectors.npy         float32 [subject, gene, width]
    subjects.parquet    `subject`, in row order
    genes.parquet       `gene`, in column order
    mask.npy            bool [subject, gene], true where there is a vector
    meta.json           format, shape, provenance, hash of vectors, size and hash of each file

It is written aside and renamed: whole or absent. Opening is cheap (sizes, and the ids' hashes) and
read-only; `verify=True` reads and hashes everything.
"""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from brainfusion.genetics.checks import Alarm
from brainfusion.genetics.features import GeneticFeatures, Provenance
from brainfusion.runtime.errors import UserError
from brainfusion.runtime.files import atomic_folder, hash_file, read_json, write_json

FORMAT = 1
_ARRAYS = ("vectors.npy", "mask.npy")
_TABLES = ("subjects.parquet", "genes.parquet")
_AGAIN = "make the store again from the model's files"


def is_store(path: Path) -> bool:
    """Whether a folder is a store, whole or not (a model's own files are no store)."""
    return path.is_dir() and any((path / name).exists() for name in ("meta.json", _TABLES[0]))


def write_store(path: Path, features: GeneticFeatures) -> None:
    """Write `features` to the folder `path`, in place of a store that is there.

    Raises:
        UserError: `path` holds something else, or cannot be written to.
    """
    import polars as pl

    if path.exists() and not is_store(path) and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{path} exists and is no store: give another folder, or move it away.")
    try:
        with atomic_folder(path) as folder:
            np.save(folder / "vectors.npy", features.vectors, allow_pickle=False)
            np.save(folder / "mask.npy", features.mask, allow_pickle=False)
            ids = {"subject": features.subjects, "gene": features.genes}
            for name, values in ids.items():
                table = pl.DataFrame({name: list(values)}, schema={name: pl.String})
                table.write_parquet(folder / f"{name}s.parquet")
            files = {
                name: {"bytes": (folder / name).stat().st_size, "hash": hash_file(folder / name)}
                for name in (*_ARRAYS, *_TABLES)
            }
            meta = {
                "format": FORMAT,
                "kind": "genetics",
                "shape": list(features.vectors.shape),
                "hash": files["vectors.npy"]["hash"],
                "files": files,
                "provenance": features.provenance.to_dict(),
                "alarms": [dataclasses.asdict(alarm) for alarm in features.alarms],
            }
            write_json(folder / "meta.json", meta)
    except OSError as error:
        raise UserError(
            f"cannot write the store {path} ({error.strerror or error}): give another folder, or "
            "free space and check its permissions."
        ) from error


def open_store(path: Path, *, verify: bool = False) -> GeneticFeatures:
    """Open a store; vectors stay on disk, mapped read-only.

    Args:
        path: The folder.
        verify: Hash all files too, which reads them.

    Raises:
        UserError: It is not there, incomplete, truncated, of another format, or (with `verify`)
            changed since it was written.
    """
    meta = _read_meta(path)
    _check_files(path, meta["files"], verify=verify)
    vectors = np.load(path / "vectors.npy", mmap_mode="r", allow_pickle=False)
    mask = np.load(path / "mask.npy", allow_pickle=False)
    mask.setflags(write=False)
    if list(vectors.shape) != meta["shape"] or vectors.dtype != np.float32:
        raise UserError(
            f"{path}: vectors are {vectors.dtype} {list(vectors.shape)}, but meta.json says "
            f"float32 {meta['shape']}: {_AGAIN}."
        )
    return GeneticFeatures(
        subjects=_read_ids(path, "subject"),
        genes=_read_ids(path, "gene"),
        vectors=vectors,
        mask=mask,
        provenance=Provenance.from_dict(meta["provenance"], where=str(path / "meta.json")),
        alarms=tuple(Alarm(**alarm) for alarm in meta["alarms"]),
    )


def _read_meta(path: Path) -> dict[str, Any]:
    file = path / "meta.json"
    if not file.exists():
        what = "is incomplete: meta.json is missing" if path.is_dir() else "does not exist"
        raise UserError(f"the genetics store {path} {what}; {_AGAIN}.")
    meta = read_json(file)
    keys = ("format", "shape", "hash", "files", "provenance", "alarms")
    if not isinstance(meta, dict) or any(key not in meta for key in keys):
        raise UserError(f"{file}: not the meta.json of a genetics store; {_AGAIN}.")
    if meta["format"] != FORMAT:
        raise UserError(
            f"{file}: format {meta['format']}, but this version reads format {FORMAT}; {_AGAIN}, "
            "or update brainfusion."
        )
    return meta


def _check_files(path: Path, files: dict[str, dict[str, Any]], *, verify: bool) -> None:
    for name in (*_ARRAYS, *_TABLES):
        file = path / name
        if name not in files or not file.exists():
            raise UserError(
                f"the genetics store {path} is incomplete: {name} is missing; {_AGAIN}."
            )
        size, expected = file.stat().st_size, files[name]["bytes"]
        if size != expected:
            raise UserError(
                f"{file} has {size} bytes, but {expected} were written (truncated, or replaced by "
                f"hand): {_AGAIN}."
            )
        if (verify or name in _TABLES) and hash_file(file) != files[name]["hash"]:
            raise UserError(f"{file} is not what was written (its hash differs): {_AGAIN}.")


def _read_ids(path: Path, name: str) -> tuple[str, ...]:
    import polars as pl

    return tuple(pl.read_parquet(path / f"{name}s.parquet")[name].to_list())
