"""Which recordings a source holds, and how one is read; data are read one recording at a time.

Shape legend: n recordings, p parcels, t TRs.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from brainfusion.data.importers import arrow, hdf5
from brainfusion.data.importers.arrays import check_matrix, load_npy, read_mat
from brainfusion.data.importers.config import ImportConfig, ImportReport
from brainfusion.data.importers.imaging import Image, read_cifti, read_nifti, sidecar_tr
from brainfusion.data.importers.names import (
    choose_files,
    compile_pattern,
    identify,
    name_files,
    stem,
)
from brainfusion.data.importers.tables import read_numbers, read_table
from brainfusion.runtime.errors import UserError

SUFFIXES = {
    "npy": (".npy",),
    "tables": (".tsv", ".csv", ".txt", ".dat"),
    "mat": (".mat",),
    "cifti": (".ptseries.nii", ".dtseries.nii"),
    "nifti": (".nii", ".nii.gz"),
    "hdf5": (".h5", ".hdf5"),
    "arrow": (".arrow",),
}
_CIFTI = re.compile(r"\.[a-z]+\.nii$")


@dataclass(frozen=True, kw_only=True, slots=True)
class Item:
    """A recording that was found and not yet read."""

    recording: str
    subject: str
    session: str
    path: Path
    row: int | None = None
    """Its row in the array or table of all recordings."""
    key: str | None = None
    """Its data set or column in the file."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Raw:
    """A recording as its file holds it."""

    values: np.ndarray
    """[p, t] or [t, p]."""
    names: tuple[str, ...] | None = None
    """Parcel names, where the file has them."""
    orientation: str | None = None
    """ "parcels-first" or "trs-first", where the file says so."""
    tr_s: float | None = None
    """The TR, where the file says it."""


def find_items(config: ImportConfig, report: ImportReport) -> tuple[str, list[Item]]:
    """The kind of the source and its recordings, in the order of their names.

    Raises:
        UserError: There is nothing to read, the kind is unclear, or names do not give subjects.
    """
    if not config.source.exists():
        raise UserError(
            f"{config.source} does not exist: expected a folder of recordings (.npy, .tsv, .csv, "
            ".mat, .nii, .h5, .arrow) or one .npy array of all."
        )
    kind, files = config.kind, _files(config)
    if kind == "auto" and config.ids is not None:
        is_hdf5 = config.source.is_file() and config.source.suffix in SUFFIXES["hdf5"]
        kind = "hdf5" if is_hdf5 else "array"
    if kind == "array":
        return kind, _array_items(config)
    if kind == "auto":
        kind = _guess_kind(config.source, files)
    files = [path for path in files if kind_of(path) == kind]
    if not files:
        raise UserError(
            f"{config.source} holds no {' or '.join(SUFFIXES[kind])} file that fits "
            f"'{config.glob}': check the folder, --kind and --glob."
        )
    files, report.n_other_files = choose_files(
        files, kind, entities=config.entities, has_labels=config.labels is not None
    )
    if not files:
        raise UserError(f"{config.source}: no file has all of --entities {config.entities}.")
    if kind == "hdf5":
        return kind, _hdf5_items(config, files)
    if kind == "arrow":
        return kind, _arrow_items(config, files, report)
    root = config.source if config.source.is_dir() else config.source.parent
    report.names, named = name_files(root, files, config.pattern)
    return kind, [
        Item(recording=one.recording, subject=one.subject, session=one.session, path=one.path)
        for one in named
    ]


def read_item(config: ImportConfig, kind: str, item: Item) -> Raw:
    """Read one recording.

    Raises:
        UserError: The file is broken or holds something else than one table of numbers.
    """
    where, tr_s = item.path.name, None
    if kind in ("cifti", "nifti"):
        return _read_image(config, kind, item)
    names = orientation = None
    if kind == "tables":
        values, names, orientation = read_numbers(
            item.path, drop_columns=config.drop_columns, orientation=config.orientation
        )
        tr_s = sidecar_tr(item.path, stem(item.path))
    elif kind == "mat":
        values = read_mat(item.path, config.variable)
    elif kind == "hdf5":
        assert item.key is not None
        values, names, tr_s = hdf5.read_set(item.path, item.key, item.row)
        where = f"{where}:{item.key}"
    elif kind == "arrow":
        assert item.key is not None
        assert item.row is not None
        values = arrow.read_recording(item.path, item.key, item.row)
        where = f"{where}:{item.key}"
    else:
        values = load_npy(item.path)
        values = values if item.row is None else values[item.row]
    values = check_matrix(values, where=where)
    return Raw(values=values, names=names, orientation=orientation, tr_s=tr_s)


def kind_of(path: Path) -> str | None:
    """The kind of a file by the ending of its name; None for any other."""
    for kind, endings in SUFFIXES.items():
        if path.name.endswith(endings):
            is_other_cifti = kind == "nifti" and _CIFTI.search(path.name)
            return None if is_other_cifti else kind
    return None


def _read_image(config: ImportConfig, kind: str, item: Item) -> Raw:
    image: Image
    if kind == "cifti":
        image = read_cifti(item.path, config.labels)
    else:
        image = read_nifti(item.path, config.labels, config.parcels)
    stated = sidecar_tr(item.path, stem(item.path))
    both = (image.tr_s, stated)
    if config.tr_s is None and None not in both and abs(image.tr_s - stated) > 0.01 * stated:  # type: ignore[operator]
        raise UserError(
            f"{item.path.name} has a TR of {image.tr_s:g} s in its header but {stated:g} s in the "
            "JSON beside it: say which with --tr-s."
        )
    return Raw(
        values=check_matrix(image.values, where=item.path.name),
        names=image.names,
        orientation="trs-first",
        tr_s=stated or image.tr_s,
    )


def _files(config: ImportConfig) -> list[Path]:
    if config.source.is_file():
        return [config.source]
    tables = (config.subjects, config.parcels, config.ids, config.atlas, config.labels)
    others = {path.resolve() for path in tables if path is not None}
    out = config.out.resolve()
    parts = out.parent / f".{out.name}-parts"
    return sorted(
        path
        for path in config.source.rglob(config.glob)
        if path.is_file()
        and not path.name.startswith(".")
        and path.resolve() not in others
        and not {out, parts} & set(path.resolve().parents)
    )


def _guess_kind(source: Path, files: list[Path]) -> str:
    if source.is_file() and source.suffix == ".npy" and load_npy(source).ndim == 3:
        raise UserError(
            f"{source} is one array of all recordings: give --ids, a text file with one subject a "
            "line in the array's order."
        )
    counts = Counter(kind for path in files if (kind := kind_of(path)))
    found = [kind for kind in SUFFIXES if counts[kind]]
    if len(found) != 1:
        holds = ", ".join(f"{counts[kind]} {kind}" for kind in found) or "none of them"
        raise UserError(
            f"{source}: cannot tell what to read (it holds {holds}): choose with --kind "
            f"{', '.join(SUFFIXES)} or array, and --glob."
        )
    return found[0]


def _array_items(config: ImportConfig) -> list[Item]:
    if not config.source.is_file() or config.source.suffix != ".npy":
        raise UserError(f"{config.source}: kind 'array' expects one .npy file of all recordings.")
    if config.ids is None:
        raise UserError(
            "kind 'array' needs --ids: a text file with one subject a line in the array's order, "
            "or a table with the columns subject, session, recording."
        )
    array = load_npy(config.source)
    if array.ndim != 3:
        raise UserError(
            f"{config.source} has shape {list(array.shape)}, expected [recording, parcel, TR] or "
            "[recording, TR, parcel]."
        )
    columns = _read_ids(config)
    return _rows_of_array(config, columns, len(array), key=None)


def _read_ids(config: ImportConfig) -> dict[str, list[str]]:
    """The columns subject, session and recording of --ids, as far as they are there."""
    assert config.ids is not None
    if not config.ids.is_file():
        raise UserError(f"{config.ids} does not exist: expected one subject a line, or a table.")
    if config.ids.suffix not in (".csv", ".tsv", ".parquet"):
        return {"subject": config.ids.read_text(encoding="utf-8").split()}
    keys = ("subject", "session", "recording")
    names, table = read_table(config.ids, text=keys)
    if "subject" not in names:
        raise UserError(f"{config.ids} has no column 'subject'; it has {', '.join(names[:8])}.")
    return {key: [str(v) for v in table[key]] for key in keys if key in names}


def _rows_of_array(
    config: ImportConfig, columns: dict[str, list[str]], n_rows: int, *, key: str | None
) -> list[Item]:
    subjects = columns["subject"]
    if len(subjects) != n_rows:
        raise UserError(
            f"{config.ids or 'its ids'} lists {len(subjects)} recordings but {config.source} holds "
            f"{n_rows}: expected one line a recording, in the array's order."
        )
    nth: Counter[str] = Counter()
    items = []
    for row, subject in enumerate(subjects):
        nth[subject] += 1
        session = columns["session"][row] if "session" in columns else str(nth[subject])
        name = columns["recording"][row] if "recording" in columns else f"{subject}_{nth[subject]}"
        items.append(
            Item(
                recording=name,
                subject=subject,
                session=session,
                path=config.source,
                row=row,
                key=key,
            )
        )
    return items


def _hdf5_items(config: ImportConfig, files: Sequence[Path]) -> list[Item]:
    """A data set a recording, or the rows of one stacked array."""
    found = {path: hdf5.find_sets(path, config.variable) for path in files}
    stacked = [
        (path, key) for path in files for key, shape in found[path].items() if len(shape) > 2
    ]
    flat = [(path, key) for path in files for key, shape in found[path].items() if len(shape) == 2]
    if stacked and (flat or len(stacked) > 1):
        listed = ", ".join(key for _, key in [*stacked, *flat][:5])
        raise UserError(
            f"{config.source} holds {len(stacked)} stacked arrays and {len(flat)} single "
            f"recordings ({listed}): expected one array of all, or one data set a recording; "
            "choose with --variable."
        )
    if stacked:
        [(path, key)] = stacked
        ids = hdf5.read_ids(path, config.id_column) if config.ids is None else None
        if ids is None and config.ids is None:
            raise UserError(
                f"{path} has one array of all recordings and no data set of ids: give --ids, or "
                f"--id-column (by itself one of {', '.join(hdf5.ID_SETS)} is found)."
            )
        columns = {"subject": ids} if ids is not None else _read_ids(config)
        at = replace(config, source=path)
        return _rows_of_array(at, columns, found[path][key][0], key=key)
    one_each = all(len(sets) == 1 for sets in found.values())
    root = config.source if config.source.is_dir() else config.source.parent
    pattern = compile_pattern(config.pattern) if config.pattern else None
    items = []
    for path, key in flat:
        inside = path.relative_to(root).with_suffix("").as_posix()
        name = inside if one_each else key if len(files) == 1 else f"{inside}/{key}"
        # The last group that is no fixed word names who was scanned: sub-01/rest, not rest.
        spoken = name if one_each or pattern else key.split("/")[0]
        items.append(_named_item(config, name, spoken, pattern, path=path, key=key))
    return items


def _arrow_items(config: ImportConfig, files: Sequence[Path], report: ImportReport) -> list[Item]:
    """The rows of Arrow files that have a column of recordings."""
    items = []
    pattern = compile_pattern(config.pattern) if config.pattern else None
    nth: Counter[str] = Counter()
    for path in files:
        column = arrow.find_column(path, config.variable)
        if column is None:
            report.n_other_files += 1
            continue
        id_column, ids = arrow.read_ids(path, config.id_column)
        report.names = f"column {id_column}"
        for row, text in enumerate(ids):
            text = text.removesuffix(".dat")
            nth[text] += 1
            name = text if nth[text] == 1 else f"{text}_{nth[text]}"
            spoken = text if id_column == "Filename" or pattern else None
            items.append(
                _named_item(
                    config, name, spoken, pattern, path=path, key=column, row=row, whole=text
                )
            )
    if not items:
        raise UserError(
            f"{config.source}: no Arrow file has a column of recordings (lists of lists of "
            "numbers): expected BrainLM's, for example Raw_Recording; check the folder."
        )
    return items


def _named_item(
    config: ImportConfig,
    name: str,
    spoken: str | None,
    pattern: re.Pattern[str] | None,
    *,
    path: Path,
    key: str,
    row: int | None = None,
    whole: str = "",
) -> Item:
    """An item inside a container, whose text `spoken` says who was scanned when."""
    named = (whole, "1") if spoken is None else identify(spoken, pattern)
    if named is None:
        raise UserError(
            f"'{spoken}' in {path.name} does not fit --pattern '{config.pattern}': correct it."
        )
    return Item(recording=name, subject=named[0], session=named[1], path=path, key=key, row=row)
