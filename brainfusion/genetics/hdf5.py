"""Embeddings in HDF5: rows `eid, model, layer, vector`, or one array of all people and genes.

    /eid [r], /vector [r, w], and of /gene_id, /model, /layer, /haplotype, /device ... [r] what is
    there: one row a vector; they may also be the fields of one compound dataset, or lie in a group

    /eid [n], /gene_id [g], /vector [n, g, w]: one array

h5py is needed, and nothing else of brainfusion needs it.

Shape legend: n people, g genes, r rows, w stored width.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from brainfusion.genetics.columns import RowVectors, renames, source_of_rows
from brainfusion.genetics.containers import SIDE_KEYS, Container, Rows, first_line, stored_dtype
from brainfusion.genetics.ids import text_ids
from brainfusion.genetics.layout import Wanted
from brainfusion.genetics.pieces import stacked_source
from brainfusion.genetics.source import COVARIATES, Source
from brainfusion.runtime.errors import UserError

HDF5_SUFFIXES = (".h5", ".hdf5")
_BATCH_BYTES = 16 * 2**20


def open_hdf5(files: list[Path], wanted: Wanted) -> Source:
    """Open an HDF5 file.

    Raises:
        UserError: h5py is not installed, several files, no known datasets, or whatever a table
            or an array of the same contents gives.
    """
    if len(files) > 1:
        raise UserError(
            f"{files[0].parent}: {len(files)} HDF5 files, expected one: give one of them, or put "
            "their rows into one."
        )
    file = files[0]
    columns = _find_columns(file)
    vector = columns.pop("vector")
    known = {name: _text_or_numbers(_read(file, place)) for name, place in columns.items()}
    if len(vector.shape) >= 3 or wanted.layout.pool is not None:
        return _open_array(file, vector, known, wanted)
    import polars as pl

    n_rows, width = vector.shape
    lengths = {len(values) for values in known.values()} | {n_rows}
    if len(lengths) > 1:
        raise UserError(
            f"{file}: datasets of several lengths ({', '.join(map(str, sorted(lengths)))}): one "
            "entry a row of vector is expected."
        )
    batch_rows = max(1, _BATCH_BYTES // (4 * width))

    def read(start: int) -> Iterator[np.ndarray]:
        for first in range(start, n_rows, batch_rows):
            yield vector.read(first, min(first + batch_rows, n_rows))

    vectors = RowVectors(read=read, width=width, dtype=vector.dtype, parts=(0, n_rows))
    return source_of_rows(pl.DataFrame(known), vectors, wanted, where=file)


def _open_array(file: Path, vector: Rows, known: dict[str, Any], wanted: Wanted) -> Source:
    container = Container(path=file, arrays={"": vector})
    subjects = text_ids(np.asarray(known["subject"]), what="subject", where=str(file))
    genes = None
    if wanted.level != "subject":
        if "gene" not in known:
            raise UserError(
                f"{file}: an array of shape {vector.shape} without gene_id: add the genes' names, "
                'or declare "level": "subject" if each person has one vector.'
            )
        genes = text_ids(np.asarray(known["gene"]), what="gene", where=str(file))
    container.sides = {
        SIDE_KEYS[name]: np.asarray(values) for name, values in known.items() if name in SIDE_KEYS
    }
    return stacked_source(
        container, "", subjects=subjects, genes=genes, layer=wanted.layer, layout=wanted.layout
    )


def _find_columns(file: Path) -> dict[str, Any]:
    """Known name -> where it is; "vector" -> Rows."""
    h5py = _h5py()
    try:
        with h5py.File(file, "r") as handle:
            places: dict[str, tuple[str, str | None]] = {}

            def visit(path: str, item: Any) -> None:
                if not isinstance(item, h5py.Dataset):
                    return
                fields = item.dtype.names
                for name in fields or [path.rsplit("/", 1)[-1]]:
                    if name in places:
                        raise UserError(
                            f"{file}: '{name}' is there twice ({places[name][0]} and {path}): keep "
                            "one group."
                        )
                    places[name] = (path, name if fields else None)

            handle.visititems(visit)
            if not places:
                raise UserError(f"{file}: no datasets; expected eid and vector.")
            renamed = renames(list(places), where=file)
            wanted = {name: places[column] for column, name in renamed.items()}
            others = {
                name: places[name]
                for name in (*COVARIATES, *SIDE_KEYS)
                if name in places and name not in renamed
            }
            path, field = wanted["vector"]
            vector = _vector_rows(file, path, field, handle[path])
    except OSError as error:
        raise UserError(
            f"{file} cannot be read as HDF5 ({first_line(error)}): it is truncated or of another "
            "kind."
        ) from error
    return {**others, **wanted, "vector": vector}


def _vector_rows(file: Path, path: str, field: str | None, dataset: Any) -> Rows:
    kind = dataset.dtype if field is None else dataset.dtype[field]
    base, inner = kind.subdtype if kind.subdtype is not None else (kind, ())
    shape = (*dataset.shape, *inner)
    if len(shape) < 2 or base.kind == "O":
        raise UserError(
            f"{file}: vector is {kind} of shape {shape}, expected numbers [rows, width]."
        )
    dtype = stored_dtype(base, where=file)

    def read(start: int, stop: int) -> np.ndarray:
        with _h5py().File(file, "r") as handle:
            rows = handle[path][start:stop]
        return np.array(rows if field is None else rows[field], dtype=np.float32)

    return Rows(shape=shape, dtype=dtype, read=read)


def _read(file: Path, place: tuple[str, str | None]) -> np.ndarray:
    path, field = place
    with _h5py().File(file, "r") as handle:
        values = handle[path][()]
    return values if field is None else values[field]


def _text_or_numbers(values: np.ndarray) -> Any:
    """Bytes and objects as text; the rest as it is."""
    if values.dtype.kind in "SO":
        flat = [v.decode("utf-8") if isinstance(v, bytes) else v for v in values.reshape(-1)]
        return flat
    return values


def _h5py() -> Any:
    try:
        import h5py
    except ImportError as error:
        raise UserError(
            "HDF5 files need h5py, which is not installed: pip install h5py, or store .npz or "
            "Parquet."
        ) from error
    return h5py
