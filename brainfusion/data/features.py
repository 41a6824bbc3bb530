"""Feature files: one vector a person, with where it came from in the file's metadata."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from brainfusion.runtime.errors import UserError
from brainfusion.runtime.files import atomic_file

_KEY = b"brainfusion"


@dataclass(frozen=True, kw_only=True, eq=False)
class Features:
    """One vector a person."""

    subjects: tuple[str, ...]
    vectors: np.ndarray
    """float32 [person, width]."""
    provenance: dict[str, Any] = field(default_factory=dict)
    extra: pl.DataFrame | None = None
    """Other columns of the file, row by row (for example `split`)."""

    def select(self, subjects: Sequence[str]) -> np.ndarray:
        """The vectors of these people, in this order.

        Raises:
            UserError: Someone has no vector.
        """
        row = {subject: i for i, subject in enumerate(self.subjects)}
        absent = [subject for subject in subjects if subject not in row]
        if absent:
            raise UserError(
                f"{len(absent)} of {len(subjects)} people have no features (for example "
                f"{', '.join(absent[:3])}): embed their recordings, or leave them out."
            )
        return self.vectors[[row[subject] for subject in subjects]]


def write_features(
    path: Path,
    subjects: Sequence[str],
    vectors: np.ndarray,
    *,
    provenance: dict[str, Any],
    extra: dict[str, Sequence[str]] | None = None,
) -> None:
    """Write a feature file (docs/formats.md), wholly or not at all."""
    vectors = np.ascontiguousarray(vectors, dtype=np.float32)
    assert vectors.ndim == 2
    assert len(subjects) == len(vectors)
    flat = pa.array(vectors.reshape(-1))
    table = pa.table(
        {
            "subject": pa.array(list(subjects), pa.string()),
            **{name: pa.array(list(values), pa.string()) for name, values in (extra or {}).items()},
            "vector": pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1]),
        }
    )
    table = table.replace_schema_metadata({_KEY: json.dumps(provenance)})
    with atomic_file(path) as aside:
        pq.write_table(table, aside)


def read_features(path: Path) -> Features:
    """Read a feature file of anyone's making: columns `subject` and `vector`.

    Raises:
        UserError: The file is absent or broken, ids repeat, widths differ, or values are not
            finite.
    """
    if not path.exists():
        raise UserError(
            f"{path} does not exist: make it with 'brainfusion embed', or put a Parquet file with "
            "the columns 'subject' and 'vector' there."
        )
    try:
        table = pq.read_table(path)
    except (pa.ArrowInvalid, OSError) as error:
        text = " ".join(str(error).split())
        raise UserError(
            f"{path} is not a readable Parquet file ({text}): make it again."
        ) from error
    if absent := {"subject", "vector"} - set(table.column_names):
        raise UserError(f"{path} has no column {sorted(absent)}: expected 'subject' and 'vector'.")
    if not pa.types.is_string(table.schema.field("subject").type) and not pa.types.is_large_string(
        table.schema.field("subject").type
    ):
        raise UserError(
            f"{path}: column 'subject' is {table.schema.field('subject').type}, expected text: ids "
            "that were numbers may have lost leading zeros; write them as text."
        )
    if not table.num_rows:
        raise UserError(f"{path} holds nobody: expected one row a person; make it again.")
    subjects = table.column("subject").to_pylist()
    if n_empty := sum(not subject for subject in subjects):
        raise UserError(f"{path}: {n_empty} rows have no subject id: fill them in, or drop them.")
    if len(set(subjects)) != len(subjects):
        raise UserError(
            f"{path}: {len(subjects) - len(set(subjects))} subject ids repeat: one row a person; "
            "average a person's recordings first."
        )
    vectors = _matrix(table.column("vector"), path)
    bad = int((~np.isfinite(vectors).all(axis=1)).sum())
    if bad:
        raise UserError(f"{path}: {bad} of {len(vectors)} vectors hold NaN or infinity: drop them.")
    metadata = (table.schema.metadata or {}).get(_KEY)
    rest = [name for name in table.column_names if name not in ("subject", "vector")]
    return Features(
        subjects=tuple(subjects),
        vectors=vectors,
        provenance=json.loads(metadata) if metadata else {},
        extra=pl.DataFrame(pl.from_arrow(table.select(rest))) if rest else None,
    )


def _matrix(column: pa.ChunkedArray, path: Path) -> np.ndarray:
    kind = column.type
    lists = pa.types.is_list(kind) or pa.types.is_large_list(kind)
    if not lists and not pa.types.is_fixed_size_list(kind):
        raise UserError(f"{path}: column 'vector' is {kind}, expected a list of numbers a row.")
    if not (pa.types.is_floating(kind.value_type) or pa.types.is_integer(kind.value_type)):
        raise UserError(f"{path}: column 'vector' is {kind}, expected numbers in the lists.")
    if column.null_count:
        raise UserError(
            f"{path}: {column.null_count} of {len(column)} people have no vector: drop their rows."
        )
    widths = np.unique(pc.call_function("list_value_length", [column]).to_numpy())
    if len(widths) > 1:
        raise UserError(f"{path}: vectors have different widths: {widths[:5].tolist()}.")
    if not widths[0]:
        raise UserError(f"{path}: the vectors are empty: make the file again.")
    flat = pc.call_function("list_flatten", [column]).to_numpy().astype(np.float32)
    return flat.reshape(len(column), -1)
