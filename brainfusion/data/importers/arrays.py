"""Arrays: .npy files, MATLAB files, one .npy of all recordings.

Shape legend: n recordings, p parcels, t TRs.
"""

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from brainfusion.runtime.errors import UserError


def load_npy(path: Path) -> np.ndarray:
    """Map an array.

    Raises:
        UserError: The file is not whole, or holds objects.
    """
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        # Of numpy's words only the first sentence: the next is how to run what a pickle holds.
        reason = str(error).split(". ")[0].rstrip(".")
        raise UserError(
            f"{path} is not a whole .npy array of numbers ({reason}): save it again with "
            "numpy.save."
        ) from error


def read_mat(path: Path, variable: str | None) -> np.ndarray:
    """The table `variable` of a MATLAB file, or its only one.

    Raises:
        UserError: The file is broken, of version 7.3, or does not say which table is meant.
    """
    from scipy import io

    with _mat_errors(path):
        found = {name: shape for name, shape, kind in io.whosmat(path) if _is_table(shape, kind)}
    if variable is None and len(found) != 1:
        tables = ", ".join(f"{name} {list(shape)}" for name, shape in found.items()) or "none"
        raise UserError(
            f"{path} holds {len(found)} two-dimensional numeric variables ({tables}), expected "
            "one: choose it with --variable."
        )
    name = variable or next(iter(found))
    if name not in found:
        known = ", ".join(found) or "none"
        raise UserError(
            f"{path} has no numeric table '{name}': it has {known}; choose with --variable."
        )
    with _mat_errors(path):
        return np.asarray(io.loadmat(path, variable_names=[name])[name])


@contextmanager
def _mat_errors(path: Path) -> Iterator[None]:
    """Say in one line why scipy cannot read a MATLAB file."""
    from scipy.io.matlab import MatReadError

    try:
        yield
    except NotImplementedError as error:
        raise UserError(
            f"{path} is a MATLAB v7.3 (HDF5) file, expected v7 or older: save it again in MATLAB "
            "with save(..., '-v7'), or as .npy."
        ) from error
    except (MatReadError, ValueError, TypeError, EOFError, OSError, zlib.error) as error:
        raise UserError(
            f"{path} is not a readable MATLAB file ({error}): save it again."
        ) from error


def _is_table(shape: tuple[int, ...], kind: str) -> bool:
    numeric = kind in ("double", "single") or kind.startswith(("int", "uint"))
    return numeric and len(shape) == 2 and min(shape) > 1


def check_matrix(values: np.ndarray, *, where: str) -> np.ndarray:
    """Check that an array can be a recording.

    Raises:
        UserError: It has other axes than two, is empty, complex, or a connectivity matrix.
    """
    if values.ndim != 2 or 0 in values.shape:
        raise UserError(
            f"{where} has shape {list(values.shape)}, expected one recording [parcels, TRs] or "
            "[TRs, parcels]; use --kind array for one array of all."
        )
    if values.dtype.kind not in "fiu":
        raise UserError(f"{where} holds {values.dtype}, expected real numbers: convert it.")
    if n_nodes := _connectivity_size(values):
        raise UserError(
            f"{where} is a connectivity matrix of {n_nodes} nodes (shape {list(values.shape)}), "
            "expected time series: encoders need the frames; import the data field that has them."
        )
    return values


def _connectivity_size(values: np.ndarray) -> int:
    """Nodes of a correlation matrix, or of one upper triangle in a row; 0 for anything else."""
    n_rows, n_columns = values.shape
    if min(values.shape) == 1:
        n_nodes = round((1 + np.sqrt(1 + 8 * values.size)) / 2)
        return n_nodes if n_nodes > 2 and n_nodes * (n_nodes - 1) == 2 * values.size else 0
    if n_rows != n_columns or n_rows < 3:
        return 0
    values = np.asarray(values, dtype=np.float64)
    same = np.allclose(values, values.T, atol=1e-6, equal_nan=True)
    return n_rows if same and np.ptp(np.diag(values)) < 1e-6 else 0
