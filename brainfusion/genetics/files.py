"""Finding embeddings in a file or a folder; which model made them does not matter here.

- one file of the array [person, gene, ...], with `subjects` and `genes` in it or beside it in
  `subjects.txt` and `genes.txt`, one a line
- a folder of one file a gene, a person, or a person and gene (`genetics.grid`)
- tables of one row a vector: Parquet (`genetics.tables`), HDF5 (`genetics.hdf5`)
- tables of one row a person and one column a number: CSV, TSV, PLINK (`genetics.wide`)

Shape legend: n people, g genes, w stored width.
"""

from pathlib import Path

from brainfusion.genetics.containers import UNNAMED_KEYS, load_numpy, open_container
from brainfusion.genetics.grid import open_grid
from brainfusion.genetics.hdf5 import HDF5_SUFFIXES, open_hdf5
from brainfusion.genetics.ids import text_ids
from brainfusion.genetics.layout import Wanted
from brainfusion.genetics.names import matched_names
from brainfusion.genetics.pieces import agreed, no_subjects, stacked_source
from brainfusion.genetics.source import Source, choose_layer
from brainfusion.genetics.tables import is_wide, open_long
from brainfusion.genetics.wide import WIDE_SUFFIXES, open_wide
from brainfusion.runtime.errors import UserError

ARRAY_SUFFIXES = (".pt", ".pth", ".npy", ".npz", ".safetensors")
SUFFIXES = (*ARRAY_SUFFIXES, ".parquet", *HDF5_SUFFIXES, *WIDE_SUFFIXES)
_ID_FILES = ("subjects", "genes")


def open_source(path: Path, wanted: Wanted) -> Source:
    """Find the embeddings in a file, or a folder of files of one kind.

    Raises:
        UserError: Nothing to read, an unreadable file, or ids that are absent or do not fit.
    """
    root = path if path.is_dir() else path.parent
    files = _embedding_files(path)
    suffix = files[0].suffix
    if suffix in WIDE_SUFFIXES or (suffix == ".parquet" and is_wide(files[0])):
        return open_wide(files, level=wanted.level)
    if suffix == ".parquet":
        return open_long(files, wanted)
    if suffix in HDF5_SUFFIXES:
        return open_hdf5(files, wanted)
    subjects, genes = _ids_beside(root, "subject"), _ids_beside(root, "gene")
    names = matched_names(
        root, files, wanted.layout, subjects=subjects, genes=genes, level=wanted.level
    )
    if names is not None:
        return open_grid(names, wanted, subjects=subjects, genes=genes)
    return _open_one(files[0], wanted, subjects=subjects, genes=genes)


def _open_one(
    file: Path,
    wanted: Wanted,
    *,
    subjects: tuple[str, ...] | None,
    genes: tuple[str, ...] | None,
) -> Source:
    """One array of all people, [n, g, ...]."""
    container = open_container(file)
    subjects = agreed(container.subjects, subjects, "subject", where=file)
    if subjects is None:
        raise no_subjects(file)
    genes = agreed(container.genes, genes, "gene", where=file)
    if wanted.level == "subject":
        genes = None
    elif genes is None and file.stem in UNNAMED_KEYS:
        raise UserError(
            f"{file}: which genes? Put their names into {file.parent / 'genes.txt'}, one a "
            'line, or declare "level": "subject" if each person has one vector.'
        )
    elif genes is None:
        genes = text_ids([file.stem], what="gene", where=str(file))
    layer = choose_layer([key for key in container.arrays if key], wanted.layer, where=file)
    return stacked_source(
        container,
        "" if "" in container.arrays else layer or "",
        subjects=subjects,
        genes=genes,
        layer=layer,
        layout=wanted.layout,
    )


def _embedding_files(path: Path) -> list[Path]:
    if path.is_file():
        if path.suffix not in SUFFIXES:
            raise UserError(f"{path}: expected one of {', '.join(SUFFIXES)}.")
        return [path]
    found = [file for file in path.iterdir() if _is_embedding(file)]
    if not found:  # one folder deeper
        found = [file for file in path.glob("*/*") if _is_embedding(file)]
    if not found:
        raise UserError(f"{path}: no embeddings; expected files of {', '.join(SUFFIXES)}.")
    if len(kinds := sorted({file.suffix for file in found})) > 1:
        raise UserError(f"{path}: files of several kinds ({', '.join(kinds)}): give one of them.")
    return sorted(found)


def _is_embedding(file: Path) -> bool:
    return file.suffix in SUFFIXES and not file.name.startswith(".") and file.stem not in _ID_FILES


def _ids_beside(folder: Path, what: str) -> tuple[str, ...] | None:
    """Ids from `subjects.txt` or `.npy` (`genes` likewise), or None."""
    text, array = folder / f"{what}s.txt", folder / f"{what}s.npy"
    if text.exists():
        try:
            lines = text.read_text(encoding="utf-8-sig").splitlines()
        except UnicodeDecodeError as error:
            raise UserError(f"{text} is not UTF-8 text: write one id a line.") from error
        return text_ids([line.strip() for line in lines], what=what, where=str(text))
    if array.exists():
        return text_ids(load_numpy(array), what=what, where=str(array))
    return None
