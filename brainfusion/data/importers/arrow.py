"""Arrow folders as Hugging Face's datasets keep them, with BrainLM's columns.

BrainLM's toolkit (vandijklab/BrainLM, toolkit/BrainLM_Toolkit.py at commit daca67b1) stores each
recording many times, scaled in different ways, some [p, t] and some [t, p]: which column is read is
the user's choice, never a guess. Its `Patient ID` is the file name after ".dat", which is empty:
then `Filename` names the subject.

Shape legend: p parcels, t TRs.
"""

from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from brainfusion.runtime.errors import UserError, nearest

_END = bytes(4)
ID_COLUMNS = ("Patient ID", "subject", "participant_id", "eid", "Filename")


def find_column(path: Path, variable: str | None) -> str | None:
    """The column of recordings in an Arrow file; None in a file that has none (coordinates).

    Raises:
        UserError: The file is broken, there are several and none was chosen, or not that one.
    """
    schema = open_table(path).schema
    nested = [field.name for field in schema if _is_matrix(field.type)]
    if variable is None:
        if len(nested) > 1:
            raise UserError(
                f"{path} has {len(nested)} columns of recordings ({', '.join(nested[:9])}): they "
                "are scaled in different ways; choose with --variable, for example Raw_Recording."
            )
        return nested[0] if nested else None
    if not nested:
        return None
    if variable not in nested:
        raise UserError(
            f"{path} has no column of recordings '{variable}'. {nearest(variable, nested)}"
        )
    return variable


def read_ids(path: Path, id_column: str | None) -> tuple[str, list[str]]:
    """The column that names who was scanned, and its values as text.

    Raises:
        UserError: There is none, or it is empty.
    """
    table = open_table(path)
    names = table.column_names
    if id_column is not None and id_column not in names:
        raise UserError(f"{path} has no column '{id_column}'. {nearest(id_column, names)}")
    for name in [id_column] if id_column else [name for name in ID_COLUMNS if name in names]:
        values = [_text(value, path, name) for value in table.column(name).to_pylist()]
        if all(values):
            return name, values
        if id_column is not None or any(values):
            n_empty = sum(not value for value in values)
            raise UserError(
                f"{path}: column '{name}' is empty in {n_empty} of {len(values)} rows: expected "
                "who was scanned; name another column with --id-column."
            )
    raise UserError(
        f"{path} has no column that names subjects: expected one of {', '.join(ID_COLUMNS)} "
        f"that is not empty; name it with --id-column (it has {', '.join(names[:12])})."
    )


def read_recording(path: Path, column: str, row: int) -> np.ndarray:
    """One recording as the column holds it, float32 [p, t] or [t, p].

    Raises:
        UserError: Its rows have several lengths, or it is empty.
    """
    value = open_table(path).column(column)[row]
    lists = value.values  # the outer list's elements, each a list of numbers
    if lists is None or not len(lists):
        raise UserError(f"{path}: row {row} of '{column}' is empty: leave it out.")
    lengths = lists.value_lengths().unique().to_pylist()
    if len(lengths) != 1 or not lengths[0]:
        raise UserError(
            f"{path}: row {row} of '{column}' has inner lists of several lengths: expected a table "
            "[parcels, TRs] or [TRs, parcels]."
        )
    flat = lists.flatten().to_numpy(zero_copy_only=False)  # nulls become NaN
    with np.errstate(over="ignore"):  # infinity is refused, with a count, when it is written
        return flat.astype(np.float32).reshape(len(lists), lengths[0])


def open_table(path: Path) -> pa.Table:
    """A memory-mapped table: only the recordings that are read are loaded.

    Raises:
        UserError: The file is no Arrow stream or file, or not whole.
    """
    state = path.stat()
    return _open_table(path, state.st_size, state.st_mtime_ns)


@lru_cache(maxsize=4)
def _open_table(path: Path, size: int, _time: int) -> pa.Table:
    try:
        source = pa.memory_map(str(path))
        try:
            table = pa.ipc.open_stream(source).read_all()
        except pa.ArrowInvalid:
            source.seek(0)
            return pa.ipc.open_file(source).read_all()
        # pyarrow takes a stream that ends between two batches for whole, with the rest lost.
        source.seek(max(0, size - 4))
        reason = None if source.read(4) == _END else "the end of the stream is missing"
    except (pa.ArrowInvalid, OSError) as error:
        table, reason = None, str(error).splitlines()[0]
    if table is None or reason is not None:
        raise UserError(
            f"{path} is not a whole Arrow file ({reason}): copy it again, or write it again with "
            "save_to_disk."
        )
    return table


def _is_matrix(kind: Any) -> bool:
    """Whether a column's type is a list of lists of numbers."""
    kind = getattr(kind, "storage_type", kind)
    if not _is_list(kind) or not _is_list(kind.value_type):
        return False
    inner = kind.value_type.value_type
    return pa.types.is_floating(inner) or pa.types.is_integer(inner)


def _is_list(kind: Any) -> bool:
    return (
        pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    )


def _text(value: Any, path: Path, name: str) -> str:
    if isinstance(value, float):
        raise UserError(f"{path}: column '{name}' holds decimal numbers, expected ids as text.")
    return "" if value is None else str(value)
