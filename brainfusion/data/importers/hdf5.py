"""HDF5: one data set a recording, or one stacked array of all with ids.

A data set's attribute `tr_s` or `RepetitionTime` gives its TR, and the file's data set `parcels` (a
list of text) the names. h5py is needed, and no other kind needs it.

Shape legend: n recordings, p parcels, t TRs.
"""

from pathlib import Path
from typing import Any

import numpy as np

from brainfusion.runtime.errors import UserError, nearest

_NAMES = ("parcels", "parcel_names", "labels")
_TR = ("tr_s", "RepetitionTime", "repetition_time")
ID_SETS = ("subject", "subjects", "participant_id", "eid", "ids")


def find_sets(path: Path, variable: str | None) -> dict[str, tuple[int, ...]]:
    """Data sets of numbers with two or three axes, by their name in the file.

    Args:
        path: The file.
        variable: Only this one.

    Raises:
        UserError: The file is broken, or has no such data set.
    """
    h5py = _h5py()
    found: dict[str, tuple[int, ...]] = {}

    def visit(name: str, item: Any) -> None:
        if (
            isinstance(item, h5py.Dataset)
            and item.dtype.kind in "fiu"
            and len(item.shape) in (2, 3)
        ):
            found[name] = item.shape

    with open_file(path) as handle:
        handle.visititems(visit)
    if variable is not None:
        name = variable.strip("/")
        inside = {key: shape for key, shape in found.items() if key.startswith(f"{name}/")}
        if name not in found and not inside:
            raise UserError(
                f"{path} has no data set '{variable}' of numbers. {nearest(name, list(found)[:10])}"
            )
        found = inside or {name: found[name]}
    if not found:
        raise UserError(
            f"{path} has no data set with two or three axes of numbers: expected one a recording, "
            "or one array [recording, parcel, TR]."
        )
    return found


def read_set(
    path: Path, name: str, row: int | None
) -> tuple[np.ndarray, tuple[str, ...] | None, float | None]:
    """One recording: values, parcel names and TR, where the file has them.

    Raises:
        UserError: The file is broken.
    """
    with open_file(path) as handle:
        data = handle[name]
        tr_s = next((float(data.attrs[key]) for key in _TR if key in data.attrs), None)
        beside = [data.parent, handle]
        listed = next((place[key] for place in beside for key in _NAMES if key in place), None)
        names = None if listed is None else tuple(_text(value) for value in listed[()])
        try:
            return (data[()] if row is None else data[row]), names, tr_s
        except OSError as error:
            raise UserError(
                f"{path}: the data set '{name}' cannot be read ({_first_line(error)}): copy the "
                "file again."
            ) from error


def read_ids(path: Path, name: str | None) -> list[str] | None:
    """Ids of a stacked array, from a data set of the file; None where there is none.

    Raises:
        UserError: The one that was asked for is not there, or holds decimal numbers.
    """
    with open_file(path) as handle:
        if name is not None and name not in handle:
            raise UserError(f"{path} has no data set '{name}'. {nearest(name, list(handle))}")
        key = name or next((key for key in ID_SETS if key in handle), None)
        if key is None:
            return None
        values = handle[key][()]
    if values.dtype.kind == "f":
        raise UserError(f"{path}: '{key}' holds decimal numbers, expected ids: write them as text.")
    return [_text(value) for value in values]


def open_file(path: Path) -> Any:
    """An HDF5 file for reading.

    Raises:
        UserError: h5py is not installed, or the file is broken.
    """
    try:
        return _h5py().File(path, "r")
    except OSError as error:
        raise UserError(
            f"{path} is not a whole HDF5 file ({_first_line(error)}): copy or write it again."
        ) from error


def _h5py() -> Any:
    try:
        import h5py
    except ImportError as error:
        raise UserError(
            "HDF5 files need h5py, which is not installed: pip install 'brainfusion[hdf5]', or "
            "store recordings as .npy."
        ) from error
    return h5py


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]
