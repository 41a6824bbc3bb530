"""The containers in which people store embeddings; which model made them does not matter here.

- `.pt` / `.pth`: a tensor, or a dict {layer: tensor} (it may have `subjects` and `genes` lists)
- `.npy`: an array
- `.npz`: `embeddings` (or one array a layer), `subjects`, `genes`, `mask`
- `.safetensors`: tensors; `subjects` and `genes` as JSON lists in the metadata
- `.parquet`: a long table (`genetics.tables`)

A folder holds either one file of the array [person, gene, ...], or one file a gene, named after
it, of [person, ...]. Ids that are not in the file stand beside it in `subjects.txt` and
`genes.txt`, one a line. Nothing is unpickled: tensors are read with `weights_only=True`, arrays
without objects.

Shape legend: n people, g genes, c chunks, w stored width.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from brainfusion.genetics.checks import text_ids
from brainfusion.genetics.features import MINIMAL
from brainfusion.genetics.source import Source, choose_layer
from brainfusion.genetics.tables import open_long
from brainfusion.runtime.errors import UserError
from brainfusion.runtime.files import read_json

SUFFIXES = (".pt", ".pth", ".npy", ".npz", ".safetensors", ".parquet")
_SUBJECT_KEYS = ("subjects", "subject", "subject_id", "eid")
_GENE_KEYS = ("genes", "gene", "gene_id")
_UNNAMED_KEYS = ("embeddings", "embedding", "vectors", "vector")
_ID_FILES = ("subjects", "genes")
_VARIANT_KEYS = ("concat_avg_ws", "rc_concat_avg_ws")


@dataclass(kw_only=True)
class _Container:
    """One file's arrays; the layer "" is unnamed."""

    path: Path
    arrays: dict[str, Any] = field(default_factory=dict)
    subjects: tuple[str, ...] | None = None
    genes: tuple[str, ...] | None = None
    mask: np.ndarray | None = None


def read_provenance(path: Path) -> tuple[dict[str, Any] | None, Path]:
    """What `provenance.json` in or beside `path` says (None without one), and where it belongs."""
    file = (path if path.is_dir() else path.parent) / "provenance.json"
    if not file.exists():
        return None, file
    values = read_json(file)
    if not isinstance(values, dict):
        raise UserError(f"{file}: expected a JSON object, such as {MINIMAL}.")
    return values, file


def open_source(
    path: Path, *, model: str, checkpoint: str, layer: str | None, level: str
) -> Source:
    """Find the embeddings in a file or folder.

    Args:
        path: A file, or a folder of files of one kind.
        model: The model that the user names; picks rows of a table that holds several.
        checkpoint: Likewise.
        layer: The layer to read; needed where files hold several.
        level: "subject" if rows are people without genes.

    Raises:
        UserError: Nothing to read, an unreadable file, or ids that are absent or do not fit.
    """
    files = _embedding_files(path)
    if files[0].suffix == ".parquet":
        return open_long(files, model=model, checkpoint=checkpoint, layer=layer, level=level)
    first = _open(files[0])
    folder = files[0].parent
    subjects = _ids(first.subjects, folder, "subject", where=files[0])
    if subjects is None:
        raise UserError(
            f"{files[0]}: rows without ids are not joined to people by position: put the ids into "
            f"{folder / 'subjects.txt'}, one a line, in row order."
        )
    chosen = choose_layer([key for key in first.arrays if key], layer, where=files[0])
    name = None if "" in first.arrays else chosen
    genes = _ids(first.genes, folder, "gene", where=files[0])
    if len(files) == 1 and genes is not None and level != "subject":
        load = _stacked(first, name or "", n=len(subjects), genes=genes)
        return Source(subjects=subjects, genes=genes, layer=chosen, load=load)
    by_gene = _files_by_gene(files, genes, level=level)
    paths = list(by_gene.values())

    def load_file(column: int) -> tuple[np.ndarray, str]:
        container = first if len(files) == 1 else _open(paths[column])
        if container.subjects is not None and container.subjects != subjects:
            raise UserError(f"{container.path}: its people are not those of {files[0]}, in order.")
        array = container.arrays.get(name or "")
        if array is None:
            known = ", ".join(container.arrays) or "none"
            raise UserError(f"{container.path}: no layer '{name}', as in {files[0]} (has {known}).")
        _check_rows(array, len(subjects), where=container.path)
        return to_float32(array, where=container.path)

    return Source(subjects=subjects, genes=tuple(by_gene), layer=chosen, load=load_file)


def to_float32(array: Any, *, where: Path) -> tuple[np.ndarray, str]:
    """An array or tensor as float32, before any arithmetic, and the type it was stored in."""
    if isinstance(array, np.ndarray):
        if array.dtype.kind not in "fiu":
            raise UserError(
                f"{where}: values are {array.dtype}, expected floats (numpy has no bfloat16: "
                "convert with .float().numpy(), or use torch.save)."
            )
        dtype = array.dtype.name if array.dtype.kind == "f" else "float32"
        with np.errstate(over="ignore"):  # becomes inf, which is masked
            return np.asarray(array, dtype=np.float32), dtype
    import torch

    if array.dtype.is_complex or array.dtype == torch.bool:
        raise UserError(f"{where}: values are {array.dtype}, expected floats.")
    dtype = str(array.dtype).removeprefix("torch.") if array.dtype.is_floating_point else "float32"
    return array.detach().to(torch.float32).numpy(), dtype


# -- ids and layout --------------------------------------------------------------------------------


def _embedding_files(path: Path) -> list[Path]:
    if path.is_file():
        if path.suffix not in SUFFIXES:
            raise UserError(f"{path}: expected one of {', '.join(SUFFIXES)}.")
        return [path]
    found = sorted(
        file
        for file in path.iterdir()
        if file.suffix in SUFFIXES and not file.name.startswith(".") and file.stem not in _ID_FILES
    )
    if not found:
        raise UserError(f"{path}: no embeddings; expected files of {', '.join(SUFFIXES)}.")
    if len(kinds := sorted({file.suffix for file in found})) > 1:
        raise UserError(f"{path}: files of several kinds ({', '.join(kinds)}): give one of them.")
    return found


def _ids(
    inside: tuple[str, ...] | None, folder: Path, what: str, *, where: Path
) -> tuple[str, ...] | None:
    """Ids from the file or, without any in it, from beside it; both must agree."""
    beside = None
    text, array = folder / f"{what}s.txt", folder / f"{what}s.npy"
    if text.exists():
        try:
            lines = text.read_text(encoding="utf-8-sig").splitlines()
        except UnicodeDecodeError as error:
            raise UserError(f"{text} is not UTF-8 text: write one id a line.") from error
        beside = text_ids([line.strip() for line in lines], what=what, where=str(text))
    elif array.exists():
        beside = text_ids(_load_numpy(array), what=what, where=str(array))
    if inside is not None and beside is not None and inside != beside:
        raise UserError(f"{where}: its {what} ids are not those of {folder / f'{what}s.*'}.")
    return beside if inside is None else inside


def _files_by_gene(
    files: list[Path], genes: tuple[str, ...] | None, *, level: str
) -> dict[str, Path]:
    if level == "subject":
        if len(files) > 1:
            raise UserError(f"{files[0].parent}: level 'subject' is one file, found {len(files)}.")
        return {"all": files[0]}
    stems = {file.stem: file for file in files}
    if len(files) == 1 and files[0].stem in _UNNAMED_KEYS:
        raise UserError(
            f"{files[0]}: which genes? Put their names into {files[0].parent / 'genes.txt'}, one a "
            'line, or declare "level": "subject" if each person has one vector.'
        )
    if genes is None:
        text_ids(list(stems), what="gene", where=str(files[0].parent))
        return stems
    if set(genes) != set(stems):
        raise UserError(
            f"{files[0].parent}: {len(set(genes) ^ set(stems))} genes are only in genes.txt or "
            "only among the files: list exactly those that are there."
        )
    return {gene: stems[gene] for gene in genes}


def _stacked(
    container: _Container, name: str, *, n: int, genes: tuple[str, ...]
) -> Callable[[int], tuple[np.ndarray, str]]:
    array = container.arrays[name]
    _check_rows(array, n, where=container.path)
    if array.ndim == 2 and len(genes) == 1:
        array = array[:, None]
    if array.ndim < 3 or array.shape[1] != len(genes):
        raise UserError(
            f"{container.path}: an array of shape {tuple(array.shape)} for {n} people and "
            f"{len(genes)} genes; expected [{n}, {len(genes)}, width]."
        )
    mask = container.mask
    if mask is not None and mask.shape != (n, len(genes)):
        raise UserError(f"{container.path}: mask of shape {mask.shape}, expected {n, len(genes)}.")

    def load(column: int) -> tuple[np.ndarray, str]:
        values, dtype = to_float32(array[:, column], where=container.path)
        if mask is not None:
            absent = ~mask[:, column].astype(bool).reshape((n,) + (1,) * (values.ndim - 1))
            values = np.where(absent, np.float32(np.nan), values)
        return values, dtype

    return load


def _check_rows(array: Any, n: int, *, where: Path) -> None:
    if array.ndim == 0 or array.shape[0] != n:
        raise UserError(
            f"{where}: {array.shape[0] if array.ndim else 0} rows (shape {tuple(array.shape)}) for "
            f"{n} subject ids; expected one row a person."
        )


# -- containers ------------------------------------------------------------------------------------


def _open(path: Path) -> _Container:
    match path.suffix:
        case ".npy":
            return _Container(path=path, arrays={"": _load_numpy(path, mapped=True)})
        case ".npz":
            return _named(path, _load_npz(path))
        case ".safetensors":
            return _open_safetensors(path)
        case _:
            return _open_torch(path)


def _named(path: Path, items: dict[str, Any]) -> _Container:
    """Sort the entries of a file into ids, mask and arrays."""
    if variant := [key for key in _VARIANT_KEYS if key in items]:
        raise UserError(
            f"{path}: '{variant[0]}' is what vep_embeddings.py writes: one row a variant "
            "(reference beside alternative allele), in the order of parallel workers and without "
            "row ids, so rows cannot be joined to people. Extract each person's own sequence "
            "instead."
        )
    container = _Container(path=path)
    for key, value in items.items():
        if key in _SUBJECT_KEYS:
            container.subjects = text_ids(value, what="subject", where=str(path))
        elif key in _GENE_KEYS:
            container.genes = text_ids(value, what="gene", where=str(path))
        elif key == "mask":
            container.mask = np.asarray(value)
        elif not hasattr(value, "ndim"):
            raise UserError(f"{path}: '{key}' holds a {type(value).__name__}, expected a tensor.")
        else:
            container.arrays["" if key in _UNNAMED_KEYS else str(key)] = value
    if not container.arrays:
        raise UserError(f"{path}: no array in it; expected 'embeddings', or one a layer.")
    if "" in container.arrays and len(container.arrays) > 1:
        names = ", ".join(key for key in container.arrays if key)
        raise UserError(f"{path}: 'embeddings' beside other arrays ({names}): keep one of them.")
    return container


def _load_numpy(path: Path, *, mapped: bool = False) -> np.ndarray:
    try:
        return np.load(path, mmap_mode="r" if mapped else None, allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise UserError(
            f"{path} cannot be read as an array ({_first_line(error)}): it is truncated, or holds "
            "Python objects, which are never unpickled; save plain floats, and ids as text."
        ) from error


def _load_npz(path: Path) -> dict[str, np.ndarray]:
    import zipfile

    try:
        # A handle of our own is closed even where the archive is broken.
        with path.open("rb") as handle, np.load(handle, allow_pickle=False) as archive:
            return {key: archive[key] for key in archive.files}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(
            f"{path} cannot be read as arrays ({_first_line(error)}): it is truncated, or holds "
            "Python objects, which are never unpickled; save ids as text: subjects.astype(str)."
        ) from error


def _open_torch(path: Path) -> _Container:
    import pickle
    import zipfile

    import torch

    try:
        loaded = torch.load(
            path, weights_only=True, map_location="cpu", mmap=zipfile.is_zipfile(path)
        )
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, OSError) as error:
        raise UserError(
            f"{path} cannot be read as tensors ({_first_line(error)}): it is truncated, or holds "
            "pickled objects, which are never loaded; write it with torch.save({layer: tensor})."
        ) from error
    if isinstance(loaded, torch.Tensor):
        return _Container(path=path, arrays={"": loaded})
    if not isinstance(loaded, dict):
        raise UserError(
            f"{path}: a {type(loaded).__name__}, expected a tensor or {{layer: tensor}}."
        )
    return _named(path, loaded)


def _open_safetensors(path: Path) -> _Container:
    import json

    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as handle:
            metadata = handle.metadata() or {}
            items: dict[str, Any] = {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{path} cannot be read as safetensors ({_first_line(error)}): it is truncated or of "
            "another kind."
        ) from error
    for key in (*_SUBJECT_KEYS, *_GENE_KEYS):
        if key in metadata:
            try:
                items[key] = json.loads(metadata[key])
            except json.JSONDecodeError as error:
                raise UserError(f"{path}: metadata '{key}' is not a JSON list of ids.") from error
    return _named(path, items)


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return text[0][:120].rstrip(" .:") if text else type(error).__name__
