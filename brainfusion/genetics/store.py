"""The store: vectors on disk, their ids, their mask and where they came from.

    vectors.npy         or what another storage has instead (`genetics.store_writer`)
    mask.npy            bool [subject, gene], true where there is a vector
    subjects.parquet    `subject`, in row order
    genes.parquet       `gene`, in column order
    meta.json           format, storage, shape, provenance, size and hash of each file

It is written aside and renamed: whole or absent. Opening is cheap (sizes, and the ids' hashes) and
read-only; vectors are decoded as they are asked for. `verify=True` reads and hashes everything.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from brainfusion.genetics.checks import Alarm
from brainfusion.genetics.features import GeneticFeatures, Provenance
from brainfusion.genetics.store_writer import ARRAYS, FORMAT, TABLES, StoreWriter, is_store
from brainfusion.genetics.vectors import Centred, Dense, Encoding, Indexed, StoredVectors
from brainfusion.runtime.errors import UserError
from brainfusion.runtime.files import hash_file, hash_json, read_json

__all__ = ["concatenate_stores", "is_store", "open_store", "write_store"]

_AGAIN = "make the store again from the model's files"
_BLOCK_BYTES = 64 * 2**20
_INCIDENTAL = ("notes", "date", "created")
"""Provenance that says nothing about the numbers."""


def write_store(path: Path, features: GeneticFeatures, *, storage: str = "float32") -> None:
    """Write `features` to the folder `path`, in place of a store that is there.

    Haplotypes that are kept apart stay so, however `features` combines them.

    Raises:
        UserError: `path` holds something else, or cannot be written to.
    """
    with StoreWriter(
        path,
        subjects=features.subjects,
        genes=features.genes,
        width=_stored_width(features),
        n_haplotypes=features.n_haplotypes,
        storage=storage,
    ) as writer:
        _copy(features, writer, start=0)
        writer.finish(features.provenance, features.alarms)


def open_store(path: Path, *, haplotypes: str = "mean", verify: bool = False) -> GeneticFeatures:
    """Open a store; vectors stay on disk, read-only.

    Args:
        path: The folder.
        haplotypes: How two haplotypes become one vector: "mean", "sum" or "mean-absdiff".
        verify: Hash all files too, which reads them.

    Raises:
        UserError: It is not there, incomplete, truncated, of another format, or (with `verify`)
            changed since it was written; or haplotypes that it holds already merged.
    """
    meta = _read_meta(path)
    _check_files(path, meta, verify=verify)
    mask = np.load(path / "mask.npy", mmap_mode="r", allow_pickle=False)
    encoding = _open_encoding(path, meta["storage"], mask)
    n, g, p, h = encoding.shape
    if [n, g, h] != meta["shape"] or p != meta["haplotypes"]:
        raise UserError(
            f"{path}: vectors are {[n, g, h]} with {p} haplotypes, but meta.json says "
            f"{meta['shape']} with {meta['haplotypes']}: {_AGAIN}."
        )
    features = GeneticFeatures(
        subjects=_read_ids(path, "subject"),
        genes=_read_ids(path, "gene"),
        vectors=StoredVectors(encoding),
        mask=mask,
        provenance=Provenance.from_dict(meta["provenance"], where=str(path / "meta.json")),
        alarms=tuple(Alarm(**alarm) for alarm in meta["alarms"]),
    )
    return features.with_haplotypes(haplotypes)


def concatenate_stores(
    path: Path, parts: Sequence[Path], *, storage: str | None = None, mixed: bool = False
) -> list[str]:
    """Write the people of several stores as one, in the order given; genes are matched by name.

    Args:
        path: The store to be; it may be one of the parts.
        parts: Stores of the same genes and of different people.
        storage: How to store them; as the first is by default.
        mixed: Put people together whose vectors were made differently, and say so in an alarm.

    Returns:
        What differs in how they were made, as "key: one, other".

    Raises:
        UserError: Other genes, widths or haplotypes; a person who is in two of them; provenance
            that differs, without `mixed`.
    """
    opened = [open_store(part) for part in parts]
    first = opened[0]
    differences: dict[str, None] = {}
    for part, features in zip(parts[1:], opened[1:], strict=True):
        _check_fit(first, features, where=f"{part} beside {parts[0]}")
        differences.update(dict.fromkeys(_differences(first.provenance, features.provenance)))
    subjects = [subject for features in opened for subject in features.subjects]
    if n_twice := len(subjects) - len(set(subjects)):
        raise UserError(
            f"{n_twice} people are in more than one of the stores: one row a person is expected; "
            "leave them out of one, or import all of them again without --append."
        )
    if differences and not mixed:
        raise UserError(
            f"the stores were made differently ({'; '.join(differences)}), which would look like "
            "a difference between people: extract them alike, or allow it with --mixed-provenance."
        )
    with StoreWriter(
        path,
        subjects=subjects,
        genes=first.genes,
        width=_stored_width(first),
        n_haplotypes=first.n_haplotypes,
        storage=storage or _read_meta(parts[0])["storage"],
        source=hash_json([_read_meta(part)["hash"] for part in parts]),
    ) as writer:
        start = 0
        for features in opened:
            _copy(features.select(features.subjects, first.genes), writer, start=start)
            start += features.n_subjects
        writer.finish(first.provenance, _merged_alarms(opened, list(differences)))
    return list(differences)


# -- joining ---------------------------------------------------------------------------------------


def _check_fit(first: GeneticFeatures, other: GeneticFeatures, *, where: str) -> None:
    if n_other := len(set(first.genes) ^ set(other.genes)):
        raise UserError(
            f"{where}: {n_other} genes are in one of the stores only: import the same genes."
        )
    ours, theirs = ((_stored_width(f), f.n_haplotypes) for f in (first, other))
    if ours != theirs:
        raise UserError(
            f"{where}: {theirs[0]} values and {theirs[1]} haplotypes a gene, but {ours[0]} and "
            f"{ours[1]} expected: import them from the same kind of files."
        )


def _differences(first: Provenance, other: Provenance) -> list[str]:
    ours, theirs = first.to_dict(), other.to_dict()
    keys = [key for key in {**ours, **theirs} if key not in _INCIDENTAL]
    return [
        f"{key}: {ours.get(key)}, {theirs.get(key)}"
        for key in keys
        if ours.get(key) != theirs.get(key)
    ]


def _merged_alarms(parts: Sequence[GeneticFeatures], differences: list[str]) -> list[Alarm]:
    alarms = list(dict.fromkeys(alarm for features in parts for alarm in features.alarms))
    if differences:
        alarms.append(
            Alarm(
                name="mixed provenance",
                figure=len(differences),
                finding=f"these people's vectors were made differently ({'; '.join(differences)})",
                cure="treat it as a batch effect: condition on which part a person comes from, or "
                "extract all of them alike",
            )
        )
    return alarms


def _copy(features: GeneticFeatures, writer: StoreWriter, *, start: int) -> None:
    """Add all vectors of `features` to a store, from row `start`."""
    n, g, p, h = (features.n_subjects, *writer.shape[1:])
    step = max(1, _BLOCK_BYTES // max(4 * g * p * h, 1))
    for row in range(0, n, step):
        rows = np.arange(row, min(row + step, n))
        if isinstance(features.vectors, StoredVectors):
            vectors = features.vectors.haplotypes(rows)
        else:
            vectors = features.vectors[rows]
        writer.add(
            slice(start + row, start + row + len(rows)), slice(0, g), vectors, features.mask[rows]
        )


def _stored_width(features: GeneticFeatures) -> int:
    vectors = features.vectors
    return vectors.stored_width if isinstance(vectors, StoredVectors) else features.width


# -- opening ---------------------------------------------------------------------------------------


def _open_encoding(path: Path, storage: str, mask: np.ndarray) -> Encoding:
    def load(name: str, mode: Literal["r", "c"] = "r") -> np.ndarray:
        return np.load(path / name, mmap_mode=mode, allow_pickle=False)

    if storage == "float32":
        return Dense(load("vectors.npy"))
    if storage == "centred-float16":
        return Centred(load("residuals.npy"), load("centre.npy"), load("scale.npy"), mask)
    # "c" maps privately: what might be written to memory never reaches the file.
    return Indexed(load("index.npy"), np.load(path / "offsets.npy"), load("dictionary.npy", "c"))


def _read_meta(path: Path) -> dict[str, Any]:
    file = path / "meta.json"
    if not file.exists():
        what = "is incomplete: meta.json is missing" if path.is_dir() else "does not exist"
        raise UserError(f"the genetics store {path} {what}; {_AGAIN}.")
    meta = read_json(file)
    keys = ("format", "shape", "hash", "files", "provenance", "alarms")
    if not isinstance(meta, dict) or any(key not in meta for key in keys):
        raise UserError(f"{file}: not the meta.json of a genetics store; {_AGAIN}.")
    if meta["format"] == 1:  # held float32 vectors with haplotypes merged
        return {**meta, "storage": "float32", "haplotypes": 1}
    if meta["format"] != FORMAT or meta.get("storage") not in ARRAYS or "haplotypes" not in meta:
        raise UserError(
            f"{file}: format {meta['format']}, storage {meta.get('storage')}, but this version "
            f"reads formats 1 to {FORMAT} of {', '.join(ARRAYS)}; {_AGAIN}, or update brainfusion."
        )
    if hash_json(meta["provenance"]) != meta.get("provenance_hash"):
        raise UserError(
            f"{file}: the provenance is not what was written (its hash differs): how vectors were "
            f"made is not corrected here, but in the provenance.json of the files; {_AGAIN}."
        )
    return meta


def _check_files(path: Path, meta: dict[str, Any], *, verify: bool) -> None:
    files = meta["files"]
    for name in (*ARRAYS[meta["storage"]], "mask.npy", *TABLES):
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
        if (verify or name in TABLES) and hash_file(file) != files[name]["hash"]:
            raise UserError(f"{file} is not what was written (its hash differs): {_AGAIN}.")


def _read_ids(path: Path, name: str) -> tuple[str, ...]:
    import polars as pl

    return tuple(pl.read_parquet(path / f"{name}s.parquet")[name].to_list())
