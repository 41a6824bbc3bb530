"""One file of arrays, opened so that rows are read when they are asked for.

- `.pt` / `.pth`: a tensor, or a dict {layer: tensor}
- `.npy`: an array
- `.npz`: `embeddings`, or one array a layer
- `.safetensors`: tensors; ids and the like as JSON in the metadata

Beside arrays a file may hold `subjects`, `genes`, `mask` (where there is a vector), `lengths` or
`attention_mask` (of tokens), `indels` (flags), `length_bp`, and words of how it was made
(`source.COVARIATES`). Nothing is unpickled: tensors are read with `weights_only=True`, arrays
without objects.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from brainfusion.genetics.ids import text_ids
from brainfusion.genetics.source import COVARIATES
from brainfusion.runtime.errors import UserError

SUBJECT_KEYS = ("subjects", "subject", "subject_id", "subject_ids", "eid", "eids", "participant_id")
GENE_KEYS = ("genes", "gene", "gene_id", "gene_ids")
UNNAMED_KEYS = ("embeddings", "embedding", "vectors", "vector")
SIDE_KEYS = {
    "mask": "mask",
    "lengths": "lengths",
    "seq_lens": "lengths",
    "attention_mask": "attention_mask",
    "indels": "indels",
    "indel": "indels",
    "length_bp": "length_bp",
}
_VARIANT_KEYS = ("concat_avg_ws", "rc_concat_avg_ws")
_SAFETENSORS_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Rows:
    """An array of which rows are read when they are asked for."""

    shape: tuple[int, ...]
    dtype: str
    """The type as stored."""
    read: Callable[[int, int], np.ndarray]
    """(start, stop) -> float32 of these rows, the caller's own."""

    def all(self) -> np.ndarray:
        """The whole array."""
        return self.read(0, self.shape[0])


@dataclass(kw_only=True)
class Container:
    """One file's arrays by layer; the layer "" is unnamed."""

    path: Path
    arrays: dict[str, Rows] = field(default_factory=dict)
    subjects: tuple[str, ...] | None = None
    genes: tuple[str, ...] | None = None
    sides: dict[str, np.ndarray] = field(default_factory=dict)
    """Small arrays beside them: mask, lengths, attention_mask, indels, length_bp."""
    covariates: dict[str, str] = field(default_factory=dict)
    """What the file says of how it was made."""


def open_container(path: Path) -> Container:
    """Open a file by its suffix.

    Raises:
        UserError: It is truncated, of another kind, or holds what is no array.
    """
    match path.suffix:
        case ".npy":
            array = load_numpy(path, mapped=True)
            return Container(path=path, arrays={"": _rows(array, where=path)})
        case ".npz":
            return _named(path, _open_npz(path))
        case ".safetensors":
            return _open_safetensors(path)
        case _:
            return _open_torch(path)


def load_numpy(path: Path, *, mapped: bool = False) -> np.ndarray:
    """An `.npy` file without Python objects.

    Raises:
        UserError: It cannot be read.
    """
    try:
        return np.load(path, mmap_mode="r" if mapped else None, allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise UserError(
            f"{path} cannot be read as an array ({first_line(error)}): it is truncated, or holds "
            "Python objects, which are never unpickled; save plain floats, and ids as text."
        ) from error


def first_line(error: BaseException) -> str:
    """The first line of an error's text."""
    text = str(error).strip().splitlines()
    return text[0][:120].rstrip(" .:") if text else type(error).__name__


def stored_dtype(dtype: np.dtype, *, where: Path) -> str:
    """The name of a stored type; whole numbers count as float32.

    Raises:
        UserError: No numbers.
    """
    if dtype.kind not in "fiu":
        raise UserError(
            f"{where}: values are {dtype}, expected floats (numpy has no bfloat16: "
            "convert with .float().numpy(), or use torch.save)."
        )
    return dtype.name if dtype.kind == "f" else "float32"


# -- arrays of each kind ---------------------------------------------------------------------------


def _rows(array: Any, *, where: Path) -> Rows:
    """Rows of an array or tensor, in memory or mapped."""
    if isinstance(array, np.ndarray):
        dtype = stored_dtype(array.dtype, where=where)

        def read(start: int, stop: int) -> np.ndarray:
            # A mapped file is opened anew: the pages of earlier reads would stay in memory.
            mapped = isinstance(array, np.memmap)
            source = np.load(where, mmap_mode="r", allow_pickle=False) if mapped else array
            with np.errstate(over="ignore"):  # becomes inf, which is masked
                return np.array(source[start:stop], dtype=np.float32)

        return Rows(shape=array.shape, dtype=dtype, read=read)
    import torch

    if array.dtype.is_complex or array.dtype == torch.bool:
        raise UserError(f"{where}: values are {array.dtype}, expected floats.")
    dtype = str(array.dtype).removeprefix("torch.") if array.dtype.is_floating_point else "float32"

    def read_tensor(start: int, stop: int) -> np.ndarray:
        return array[start:stop].detach().to(torch.float32, copy=True).contiguous().numpy()

    return Rows(shape=tuple(array.shape), dtype=dtype, read=read_tensor)


def _named(path: Path, items: dict[str, Any]) -> Container:
    """Sort the entries of a file into ids, flags and arrays."""
    if variant := [key for key in _VARIANT_KEYS if key in items]:
        raise UserError(
            f"{path}: '{variant[0]}' is what vep_embeddings.py writes: one row a variant "
            "(reference beside alternative allele), in the order of parallel workers and without "
            "row ids, so rows cannot be joined to people. Extract each person's own sequence "
            "instead (genetics.variants reads such files as variants)."
        )
    container = Container(path=path)
    for key, value in items.items():
        if key in SUBJECT_KEYS:
            container.subjects = text_ids(value, what="subject", where=str(path))
        elif key in GENE_KEYS:
            container.genes = text_ids(value, what="gene", where=str(path))
        elif key in SIDE_KEYS:
            side = value.all() if isinstance(value, Rows) else np.asarray(value)
            container.sides[SIDE_KEYS[key]] = side
        elif key in COVARIATES and _text(value) is not None:
            container.covariates[key] = _text(value) or ""
        elif not hasattr(value, "shape"):
            raise UserError(f"{path}: '{key}' holds a {type(value).__name__}, expected a tensor.")
        else:
            rows = value if isinstance(value, Rows) else _rows(value, where=path)
            container.arrays["" if key in UNNAMED_KEYS else str(key)] = rows
    if not container.arrays:
        raise UserError(f"{path}: no array in it; expected 'embeddings', or one a layer.")
    if "" in container.arrays and len(container.arrays) > 1:
        names = ", ".join(key for key in container.arrays if key)
        raise UserError(f"{path}: 'embeddings' beside other arrays ({names}): keep one of them.")
    return container


def _text(value: object) -> str | None:
    """A word or number of a covariate, or None for anything else."""
    if isinstance(value, np.ndarray) and value.ndim == 0:
        value = value.item()
    return str(value) if isinstance(value, (str, int, float, bool)) else None


def _open_npz(path: Path) -> dict[str, Any]:
    """Entries of an archive: large numeric ones as `Rows`, read from the archive in passing."""
    import zipfile

    try:
        items: dict[str, Any] = {}
        # A handle of our own is closed even where the archive is broken.
        with path.open("rb") as handle, np.load(handle, allow_pickle=False) as archive:
            for key in archive.files:
                rows = _npz_rows(path, f"{key}.npy") if key not in SIDE_KEYS else None
                items[key] = archive[key] if rows is None else rows
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(
            f"{path} cannot be read as arrays ({first_line(error)}): it is truncated, or holds "
            "Python objects, which are never unpickled; save ids as text: subjects.astype(str)."
        ) from error
    return items


def _npz_rows(path: Path, member: str) -> Rows | None:
    """A member as `Rows` that reads forward through the archive; None where it is not plain."""
    import zipfile

    with zipfile.ZipFile(path) as archive:
        if member not in archive.namelist():
            return None
        with archive.open(member) as handle:
            shape, fortran, dtype = _npy_header(handle)
    if fortran or dtype.kind != "f" or len(shape) < 2:
        return None
    row_bytes = int(np.prod(shape[1:])) * dtype.itemsize
    handles: dict[str, Any] = {}

    def rewound() -> Any:
        for old in ("member", "archive"):
            if old in handles:
                handles.pop(old).close()
        archive = zipfile.ZipFile(path)
        handle = archive.open(member)
        _npy_header(handle)
        handles.update(member=handle, archive=archive, row=0)
        return handle

    def read(start: int, stop: int) -> np.ndarray:
        stop = min(stop, shape[0])
        try:
            if "member" not in handles or handles["row"] > start:
                rewound()
            handle = handles["member"]
            while handles["row"] < start:  # a compressed member has no random access
                n_rows = min(start - handles["row"], max(1, 2**22 // max(1, row_bytes)))
                handle.read(n_rows * row_bytes)
                handles["row"] += n_rows
            data = handle.read((stop - start) * row_bytes)
            handles["row"] = stop
            values = np.frombuffer(data, dtype=dtype).reshape(stop - start, *shape[1:])
        except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
            raise UserError(
                f"{path} cannot be read as arrays ({first_line(error)}): it is truncated."
            ) from error
        if stop == shape[0]:
            handles.pop("member").close()
            handles.pop("archive").close()
        with np.errstate(over="ignore"):  # becomes inf, which is masked
            return np.array(values, dtype=np.float32)

    return Rows(shape=shape, dtype=stored_dtype(dtype, where=path), read=read)


def _npy_header(handle: Any) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = np.lib.format.read_magic(handle)
    reader = (
        np.lib.format.read_array_header_1_0
        if version == (1, 0)
        else np.lib.format.read_array_header_2_0
    )
    return reader(handle)


def _open_torch(path: Path) -> Container:
    import pickle
    import zipfile

    import torch

    try:
        loaded = torch.load(
            path, weights_only=True, map_location="cpu", mmap=zipfile.is_zipfile(path)
        )
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, OSError) as error:
        raise UserError(
            f"{path} cannot be read as tensors ({first_line(error)}): it is truncated, or holds "
            "pickled objects, which are never loaded; write it with torch.save({layer: tensor})."
        ) from error
    if isinstance(loaded, torch.Tensor):
        return Container(path=path, arrays={"": _rows(loaded, where=path)})
    if not isinstance(loaded, dict):
        raise UserError(
            f"{path}: a {type(loaded).__name__}, expected a tensor or {{layer: tensor}}."
        )
    return _named(path, loaded)


def _open_safetensors(path: Path) -> Container:
    from safetensors import SafetensorError, safe_open

    items: dict[str, Any] = {}
    try:
        with safe_open(path, framework="pt") as handle:
            metadata = handle.metadata() or {}
            for key in handle.keys():  # noqa: SIM118
                piece = handle.get_slice(key)
                shape, kind = tuple(piece.get_shape()), piece.get_dtype()
                if key in SIDE_KEYS:
                    items[key] = handle.get_tensor(key).float().numpy()
                else:
                    items[key] = _safetensors_rows(path, key, shape, kind)
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{path} cannot be read as safetensors ({first_line(error)}): it is truncated or of "
            "another kind."
        ) from error
    for key in (*SUBJECT_KEYS, *GENE_KEYS):
        if key in metadata:
            try:
                items[key] = json.loads(metadata[key])
            except json.JSONDecodeError as error:
                raise UserError(f"{path}: metadata '{key}' is not a JSON list of ids.") from error
    items.update({key: value for key, value in metadata.items() if key in COVARIATES})
    return _named(path, items)


def _safetensors_rows(path: Path, key: str, shape: tuple[int, ...], kind: str) -> Rows:
    from safetensors import safe_open

    if kind == "BOOL" or kind.startswith("C"):
        raise UserError(f"{path}: values of '{key}' are {kind}, expected floats.")

    def read(start: int, stop: int) -> np.ndarray:
        with safe_open(path, framework="pt") as handle:
            return handle.get_slice(key)[start:stop].float().contiguous().numpy()

    return Rows(shape=shape, dtype=_SAFETENSORS_DTYPES.get(kind, "float32"), read=read)
