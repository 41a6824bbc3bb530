"""From files to a cohort folder: read, orient, match parcels by name, check, write.

Shape legend: p parcels, t TRs.
"""

import errno
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import polars as pl

from brainfusion.data.atlas import Atlas, match_parcels
from brainfusion.data.cohort import Cohort, write_cohort_tables
from brainfusion.data.importers.config import ImportConfig, ImportReport
from brainfusion.data.importers.people import match_people
from brainfusion.data.importers.sources import Item, Raw, find_items, read_item
from brainfusion.data.recordings import RecordingWriter
from brainfusion.runtime.errors import UserError
from brainfusion.runtime.files import atomic_folder, check_writable, write_json
from brainfusion.runtime.logs import Progress


def import_npy_folder(config: ImportConfig) -> ImportReport:
    """Import a folder of .npy files, one recording [p, t] or [t, p] each."""
    return import_cohort(replace(config, kind="npy"))


def import_tables(config: ImportConfig) -> ImportReport:
    """Import a folder of text tables (TSV, CSV, white space), one recording each."""
    return import_cohort(replace(config, kind="tables"))


def import_mat(config: ImportConfig) -> ImportReport:
    """Import a folder of MATLAB files (v7 and older), one recording each."""
    return import_cohort(replace(config, kind="mat"))


def import_array(config: ImportConfig) -> ImportReport:
    """Import one .npy array [recording, p, t] or [recording, t, p], with a list of ids."""
    return import_cohort(replace(config, kind="array"))


def import_cohort(config: ImportConfig) -> ImportReport:
    """Make the cohort folder `config.out`, whole or not at all; memory holds one recording.

    Returns:
        What was read, dropped and why; the same is written to the cohort's `import.json`.

    Raises:
        UserError: Anything that is wrong with the input or the output folder, in one line.
    """
    if config.tr_s is None:
        raise UserError(
            "the TR is not given: expected the seconds between frames, because windows and models "
            "depend on it; add --tr-s, for example --tr-s 0.72 for HCP."
        )
    if config.out.exists() and not config.overwrite:
        raise UserError(
            f"{config.out} exists: give another --out, or --overwrite to replace that cohort."
        )
    kind, items = find_items(config)
    report = ImportReport(
        source=str(config.source), kind=kind, tr_s=config.tr_s, n_files=len(items)
    )
    subjects, items = match_people(config, items, report)
    check_writable(config.out.parent)
    try:
        with atomic_folder(config.out) as aside:
            _write(aside, config, kind, items, subjects, report)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
            raise
        raise UserError(
            f"cannot write {config.out} ({error.strerror}): nothing was left there; free space or "
            "give another --out."
        ) from error
    return report


def _write(
    folder: Path,
    config: ImportConfig,
    kind: str,
    items: Sequence[Item],
    subjects: pl.DataFrame,
    report: ImportReport,
) -> None:
    assert config.tr_s is not None
    layout = _layout(config, kind, items[0], report)
    atlas = layout.atlas
    report.atlas, report.n_parcels = atlas.name, atlas.n_parcels
    tally = _Tally()
    progress = Progress("import", len(items))
    with RecordingWriter(folder / "recordings", n_parcels=atlas.n_parcels) as writer:
        for done, item in enumerate(items, start=1):
            bold = _to_atlas(read_item(config, kind, item), item, layout, config, tally)
            coverage = 1.0 - float(np.isnan(bold).all(axis=1).mean())
            progress.update(done)
            if coverage < config.min_coverage:
                if config.low_coverage == "refuse":
                    raise UserError(
                        f"{item.path.name} ('{item.recording}') has data in {coverage:.1%} of the "
                        f"parcels of '{atlas.name}', expected at least {config.min_coverage:.0%}: "
                        "leave such recordings out with --low-coverage skip, or lower "
                        "--min-coverage."
                    )
                report.n_skipped_coverage += 1
                continue
            writer.add(
                bold,
                recording=item.recording,
                subject=item.subject,
                session=item.session,
                tr_s=config.tr_s,
            )
            tally.keep(item.subject, coverage, bold.shape[1])
    if not tally.coverages:
        raise UserError(
            f"all {len(items)} recordings have data in under {config.min_coverage:.0%} of the "
            f"parcels of '{atlas.name}': check that it is their atlas, or lower --min-coverage."
        )
    if config.subjects is None:
        subjects = subjects.filter(
            pl.col("subject").is_in(pl.Series(sorted(tally.people)).implode())
        )
    tally.fill(report, n_subjects=len(subjects))
    write_cohort_tables(
        folder,
        name=config.name or config.out.resolve().name,
        origin="imported",
        subjects=subjects,
        atlas=atlas,
        notes=config.notes,
    )
    write_json(folder / "import.json", report.to_dict())
    Cohort.open(folder)


@dataclass(frozen=True, kw_only=True)
class _Layout:
    """What the recordings are matched to."""

    atlas: Atlas
    n_parcels: int
    """Parcels that a file without names must have."""
    names: tuple[str, ...] | None
    """The order of files without names, where the user gave it."""
    header: tuple[str, ...] | None
    """The names of the first file as written, when the atlas was made of them."""
    from_user: bool
    """Whether the atlas is a file of the user's."""


class _Tally:
    """Running counts of an import."""

    def __init__(self) -> None:
        self.coverages: list[float] = []
        self.lengths: list[int] = []
        self.people: set[str] = set()
        self.orientations: set[str] = set()
        self.extra: set[str] = set()
        self.constant: set[int] = set()
        self.n_permuted = self.n_with_missing = self.n_with_constant = 0

    def keep(self, subject: str, coverage: float, n_trs: int) -> None:
        """Count a recording that was written."""
        self.coverages.append(coverage)
        self.lengths.append(n_trs)
        self.people.add(subject)

    def fill(self, report: ImportReport, *, n_subjects: int) -> None:
        """Put the counts into the report."""
        report.n_recordings, report.n_people = len(self.coverages), len(self.people)
        report.n_people_without_recordings = n_subjects - len(self.people)
        report.min_trs, report.max_trs = min(self.lengths), max(self.lengths)
        report.mean_coverage = float(np.mean(self.coverages))
        report.min_coverage = min(self.coverages)
        report.orientation = self.orientations.pop() if len(self.orientations) == 1 else "mixed"
        report.n_extra_parcels, report.n_constant_parcels = len(self.extra), len(self.constant)
        report.n_permuted, report.n_with_missing = self.n_permuted, self.n_with_missing
        report.n_with_constant = self.n_with_constant


def _layout(config: ImportConfig, kind: str, first: Item, report: ImportReport) -> _Layout:
    """Decide the atlas: the user's file, else the names that are known, else numbers."""
    raw = read_item(config, kind, first)
    header = raw.names
    names = _read_names(config.parcels) if config.parcels else None
    if header is not None and names is not None:
        raise UserError(
            f"{first.path.name} has parcel names of its own, so --parcels {config.parcels} would "
            "hide them: leave the flag out."
        )
    if kind == "tables":
        report.n_dropped_columns = len(config.drop_columns)
    if config.atlas is not None:
        atlas = Atlas.load(config.atlas)
        if header is None and names is None:
            report.warn(
                f"the recordings carry no parcel names: they are taken to be in the order of "
                f"'{atlas.name}'; give --parcels to have them matched"
            )
        n_parcels = len(names) if names else atlas.n_parcels
        return _Layout(atlas=atlas, n_parcels=n_parcels, names=names, header=None, from_user=True)
    title = f"{config.name or config.out.resolve().name} parcels"
    if header is not None:
        parcels, n_twice = _number_repeats(header)
        if n_twice:
            report.warn(
                f"{n_twice} columns repeat a parcel name ('{_first_repeat(header)}', ...): they "
                "are numbered in the order they stand in, and every file must have that order"
            )
        atlas = Atlas(name=title, parcels=parcels)
        return _Layout(
            atlas=atlas, n_parcels=len(header), names=None, header=header, from_user=False
        )
    if names is None:
        if config.orientation == "auto":
            raise UserError(
                f"{first.path.name} has shape {list(raw.values.shape)} and nothing says which axis "
                "is parcels: give --orientation parcels-first or trs-first, --atlas or --parcels."
            )
        n_parcels = raw.values.shape[0 if config.orientation == "parcels-first" else 1]
        width = max(3, len(str(n_parcels)))
        atlas = Atlas(
            name=title, parcels=tuple(f"parcel-{i + 1:0{width}d}" for i in range(n_parcels))
        )
        report.warn(
            f"the recordings carry no parcel names: they are called {atlas.parcels[0]} to "
            f"{atlas.parcels[-1]} in file order, which must be the same in every file; give "
            "--parcels or --atlas"
        )
        return _Layout(atlas=atlas, n_parcels=n_parcels, names=None, header=None, from_user=False)
    atlas = Atlas(name=title, parcels=names)
    return _Layout(atlas=atlas, n_parcels=len(names), names=names, header=None, from_user=False)


def _to_atlas(
    raw: Raw, item: Item, layout: _Layout, config: ImportConfig, tally: _Tally
) -> np.ndarray:
    """One recording as float32 [atlas p, t]; missing parcels are NaN rows."""
    bold, orientation = _orient(raw, item, layout, config)
    tally.orientations.add(orientation)
    names = raw.names or layout.names
    with np.errstate(over="ignore"):  # infinity is refused, with a count, when it is written
        bold = bold.astype(np.float32)
    if layout.header is not None and raw.names is None:
        raise UserError(
            f"{item.path.name} has no parcel names but the first file has: expected a header in "
            "every file or in none."
        )
    if names is not None and not (layout.header is not None and raw.names == layout.header):
        try:
            match = match_parcels(names, layout.atlas)
        except UserError as error:
            raise UserError(f"{item.path.name}: {error}") from error
        tally.n_permuted += match.permuted
        tally.extra.update(match.extra)
        bold = match.apply(bold)
    missing = np.isnan(bold).all(axis=1)
    tally.n_with_missing += bool(missing.any())
    if config.constant_as_missing:
        constant = ~missing & (bold == bold[:, :1]).all(axis=1)
        bold[constant] = np.nan
        tally.n_with_constant += bool(constant.any())
        tally.constant.update(np.flatnonzero(constant).tolist())
    return bold


def _orient(raw: Raw, item: Item, layout: _Layout, config: ImportConfig) -> tuple[np.ndarray, str]:
    """The values as [p, t], and which axis came first."""
    expected = len(raw.names) if raw.names is not None else layout.n_parcels
    orientation = raw.orientation or config.orientation
    rows, columns = raw.values.shape
    if orientation == "auto":
        fits = [n == expected for n in (rows, columns)]
        if all(fits):
            raise UserError(
                f"{item.path.name} has shape [{rows}, {columns}] and both axes fit {expected} "
                "parcels: give --orientation parcels-first or trs-first."
            )
        orientation = "parcels-first" if fits[0] else "trs-first"
    values = raw.values if orientation == "parcels-first" else raw.values.T
    if len(values) != expected:
        got = f"shape [{rows}, {columns}]" if orientation != config.orientation else len(values)
        got = f"{got} parcels" if isinstance(got, int) else got
        if layout.names is not None:
            owner = f"--parcels lists {expected} names"
        elif layout.from_user:
            owner = f"the atlas '{layout.atlas.name}' has {expected} parcels"
        else:
            owner = f"the first recording has {expected} parcels"
        raise UserError(
            f"{item.path.name} has {got} but {owner}. Parcel order carries meaning, so recordings "
            "are not padded or cut: give the parcels' names (--parcels, or a header) so that they "
            "can be matched, or re-parcellate with that atlas."
        )
    return values, orientation


def _read_names(path: Path) -> tuple[str, ...]:
    if not path.is_file():
        raise UserError(f"{path} does not exist: --parcels expects a text file, one name a line.")
    names = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    return tuple(name for name in names if name)


def _number_repeats(names: Sequence[str]) -> tuple[tuple[str, ...], int]:
    """Make names unique by number ("A", "A.2"); returns how many were numbered."""
    seen: dict[str, int] = {}
    taken, unique = set(names), []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        new = name if seen[name] == 1 else f"{name}.{seen[name]}"
        if new != name and new in taken:
            raise UserError(f"parcel names repeat ('{name}') and '{new}' is taken: rename them.")
        unique.append(new)
    return tuple(unique), sum(a != b for a, b in zip(names, unique, strict=True))


def _first_repeat(names: Sequence[str]) -> str:
    return next(name for i, name in enumerate(names) if name in names[:i])
