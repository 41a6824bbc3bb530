"""Which recordings a source holds, and how one is read; data are read one recording at a time.

Shape legend: n recordings, p parcels, t TRs.
"""

import re
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from brainfusion.data.importers.config import ImportConfig
from brainfusion.data.importers.tables import read_numbers, read_table
from brainfusion.runtime.errors import UserError

SUFFIXES = {"npy": (".npy",), "tables": (".tsv", ".csv", ".txt"), "mat": (".mat",)}


@dataclass(frozen=True, kw_only=True, slots=True)
class Item:
    """A recording that was found and not yet read."""

    recording: str
    subject: str
    session: str
    path: Path
    row: int | None = None
    """Its row in the array of all recordings."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Raw:
    """A recording as its file holds it."""

    values: np.ndarray
    """[p, t] or [t, p]."""
    names: tuple[str, ...] | None = None
    """Parcel names, where the file has them."""
    orientation: str | None = None
    """ "parcels-first" or "trs-first", where the file says so."""


def find_items(config: ImportConfig) -> tuple[str, list[Item]]:
    """The kind of the source and its recordings, in the order of their names.

    Raises:
        UserError: There is nothing to read, the kind is unclear, or names do not give subjects.
    """
    if not config.source.exists():
        raise UserError(
            f"{config.source} does not exist: expected a folder of recordings (.npy, .tsv, .csv, "
            ".mat) or one .npy array of all."
        )
    kind = config.kind
    if kind == "array" or (kind == "auto" and config.ids is not None):
        return "array", _array_items(config)
    files = _files(config)
    if kind == "auto":
        kind = _guess_kind(config.source, files)
    files = [path for path in files if path.suffix in SUFFIXES[kind]]
    if not files:
        raise UserError(
            f"{config.source} holds no {' or '.join(SUFFIXES[kind])} file that fits "
            f"'{config.glob}': check the folder, --kind and --glob."
        )
    return kind, _name_items(config, files)


def read_item(config: ImportConfig, kind: str, item: Item) -> Raw:
    """Read one recording.

    Raises:
        UserError: The file is broken or holds something else than one table of numbers.
    """
    if kind == "tables":
        values, names, orientation = read_numbers(
            item.path, drop_columns=config.drop_columns, orientation=config.orientation
        )
        return Raw(values=values, names=names, orientation=orientation)
    if kind == "mat":
        values = _read_mat(item.path, config.variable)
    else:
        values = _load_npy(item.path)
        if item.row is not None:
            values = values[item.row]
    return Raw(values=_check_matrix(values, where=item.path.name))


def _files(config: ImportConfig) -> list[Path]:
    if config.source.is_file():
        return [config.source]
    tables = (config.subjects, config.parcels, config.ids, config.atlas)
    others = {path.resolve() for path in tables if path is not None}
    out = config.out.resolve()
    return sorted(
        path
        for path in config.source.rglob(config.glob)
        if path.is_file()
        and not path.name.startswith(".")
        and path.resolve() not in others
        and out not in path.resolve().parents
    )


def _guess_kind(source: Path, files: list[Path]) -> str:
    if source.is_file() and source.suffix == ".npy" and _load_npy(source).ndim == 3:
        raise UserError(
            f"{source} is one array of all recordings: give --ids, a text file with one subject a "
            "line in the array's order."
        )
    counts = {
        kind: sum(path.suffix in suffixes for path in files) for kind, suffixes in SUFFIXES.items()
    }
    found = [kind for kind, count in counts.items() if count]
    if len(found) != 1:
        holds = ", ".join(f"{counts[kind]} {kind}" for kind in found) or "none of them"
        raise UserError(
            f"{source}: cannot tell what to read (it holds {holds}): choose with --kind npy, "
            "tables, mat or array, and --glob."
        )
    return found[0]


def _name_items(config: ImportConfig, files: list[Path]) -> list[Item]:
    root = config.source if config.source.is_dir() else config.source.parent
    pattern = _compile(config.pattern)
    if pattern is None:
        repeated = [
            stem for stem, count in Counter(path.stem for path in files).items() if count > 1
        ]
        if repeated:
            raise UserError(
                f"{len(repeated)} file names stand in several folders ('{repeated[0]}', ...), so "
                "they do not name the subject: give --pattern, for example "
                "'subjects/(?P<subject>[^/]+)/', which is searched in the path below the source."
            )
    items, unnamed = [], []
    for path in files:
        relative = path.relative_to(root)
        named = _identify(relative, pattern)
        if named is None:
            unnamed.append(relative.as_posix())
            continue
        subject, session = named
        recording = relative.with_suffix("").as_posix()
        items.append(Item(recording=recording, subject=subject, session=session, path=path))
    if unnamed:
        raise UserError(
            f"{len(unnamed)} of {len(files)} files do not fit --pattern '{config.pattern}' (for "
            f"example {unnamed[0]}): correct it, or choose the files with --glob."
        )
    return items


def _compile(pattern: str | None) -> re.Pattern[str] | None:
    if pattern is None:
        return None
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise UserError(
            f"--pattern '{pattern}' is no regular expression ({error}): expected for example "
            "'sub-(?P<subject>[^_]+)_run-(?P<session>[0-9]+)'."
        ) from error
    if "subject" not in compiled.groupindex:
        raise UserError(
            f"--pattern '{pattern}' has no group (?P<subject>...): expected for example "
            "'sub-(?P<subject>[^_]+)'."
        )
    return compiled


def _identify(relative: Path, pattern: re.Pattern[str] | None) -> tuple[str, str] | None:
    """Subject and session from a path; None where the pattern does not fit."""
    if pattern is not None:
        match = pattern.search(relative.as_posix())
        if match is None or not match["subject"]:
            return None
        return match["subject"], match.groupdict().get("session") or "1"
    session = re.search(r"(?:^|_)ses-([^_]+)", relative.stem)
    return relative.stem.split("_")[0] or relative.stem, session[1] if session else "1"


def _array_items(config: ImportConfig) -> list[Item]:
    if not config.source.is_file() or config.source.suffix != ".npy":
        raise UserError(f"{config.source}: kind 'array' expects one .npy file of all recordings.")
    if config.ids is None:
        raise UserError(
            "kind 'array' needs --ids: a text file with one subject a line in the array's order, "
            "or a table with the columns subject, session, recording."
        )
    array = _load_npy(config.source)
    if array.ndim != 3:
        raise UserError(
            f"{config.source} has shape {list(array.shape)}, expected [recording, parcel, TR] or "
            "[recording, TR, parcel]."
        )
    if not config.ids.is_file():
        raise UserError(f"{config.ids} does not exist: expected one subject a line, or a table.")
    columns: dict[str, list[str]] = {}
    if config.ids.suffix in (".csv", ".tsv", ".parquet"):
        keys = ("subject", "session", "recording")
        names, table = read_table(config.ids, text=keys)
        if "subject" not in names:
            raise UserError(f"{config.ids} has no column 'subject'; it has {', '.join(names[:8])}.")
        columns = {key: [str(v) for v in table[key]] for key in keys if key in names}
    else:
        columns["subject"] = config.ids.read_text(encoding="utf-8").split()
    subjects = columns["subject"]
    if len(subjects) != len(array):
        raise UserError(
            f"{config.ids} lists {len(subjects)} recordings but {config.source} holds "
            f"{len(array)}: expected one line a recording, in the array's order."
        )
    nth: Counter[str] = Counter()
    items = []
    for row, subject in enumerate(subjects):
        nth[subject] += 1
        session = columns["session"][row] if "session" in columns else str(nth[subject])
        name = columns["recording"][row] if "recording" in columns else f"{subject}_{nth[subject]}"
        items.append(
            Item(recording=name, subject=subject, session=session, path=config.source, row=row)
        )
    return items


def _load_npy(path: Path) -> np.ndarray:
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise UserError(
            f"{path} is not a whole .npy array of numbers ({error}): save it again with numpy.save."
        ) from error


def _read_mat(path: Path, variable: str | None) -> np.ndarray:
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


def _check_matrix(values: np.ndarray, *, where: str) -> np.ndarray:
    if values.ndim != 2 or 0 in values.shape:
        raise UserError(
            f"{where} has shape {list(values.shape)}, expected one recording [parcels, TRs] or "
            "[TRs, parcels]; use --kind array for one array of all."
        )
    if values.dtype.kind not in "fiu":
        raise UserError(f"{where} holds {values.dtype}, expected real numbers: convert it.")
    return values
