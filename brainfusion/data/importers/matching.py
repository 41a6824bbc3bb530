"""The atlas of an import, and one recording brought to it: oriented, matched by name.

Shape legend: p parcels, t TRs.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from brainfusion.data.atlas import Atlas, match_parcels
from brainfusion.data.importers.config import ImportConfig, ImportReport, check_tr
from brainfusion.data.importers.imaging import read_labels
from brainfusion.data.importers.sources import Item, Raw, read_item
from brainfusion.runtime.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Layout:
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

    def to_dict(self) -> dict[str, Any]:
        """JSON: all that decides what becomes of a recording."""
        facts = {name: value for name, value in vars(self).items() if name != "atlas"}
        return {**facts, "atlas": list(self.atlas.parcels)}


@dataclass(kw_only=True, slots=True)
class Facts:
    """What was found in one recording; an import that goes on reads it again from its journal."""

    orientation: str
    coverage: float
    """Share of the atlas's parcels with data."""
    n_trs: int
    tr_s: float
    other_tr: bool
    """Whether its file says another TR than the user."""
    permuted: bool = False
    extra: list[str]
    """Parcel names that the atlas does not have."""
    missing: bool
    constant: list[int]
    """Positions of constant parcels, which count as missing."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


class Tally:
    """Running counts of an import."""

    def __init__(self) -> None:
        self._kept: list[tuple[float, int, float]] = []
        self.people: set[str] = set()
        self._orientations: set[str] = set()
        self._extra: set[str] = set()
        self._constant: set[int] = set()
        self._n_permuted = self._n_missing = self._n_constant = self._n_other_tr = 0

    def __len__(self) -> int:
        return len(self._kept)

    def count(self, facts: Facts) -> None:
        """Count a recording that was read."""
        self._orientations.add(facts.orientation)
        self._extra.update(facts.extra)
        self._constant.update(facts.constant)
        self._n_permuted += facts.permuted
        self._n_missing += facts.missing
        self._n_constant += bool(facts.constant)
        self._n_other_tr += facts.other_tr

    def keep(self, subject: str, facts: Facts) -> None:
        """Count a recording that was written."""
        self._kept.append((facts.coverage, facts.n_trs, facts.tr_s))
        self.people.add(subject)

    def fill(self, report: ImportReport, *, n_subjects: int) -> None:
        """Put the counts into the report."""
        coverages, lengths, trs_s = zip(*self._kept, strict=True)
        report.n_recordings, report.n_people = len(self._kept), len(self.people)
        report.n_people_without_recordings = n_subjects - len(self.people)
        report.min_trs, report.max_trs = min(lengths), max(lengths)
        report.tr_s, report.max_tr_s = min(trs_s), max(trs_s)
        report.mean_coverage, report.min_coverage = float(np.mean(coverages)), min(coverages)
        found = self._orientations
        report.orientation = next(iter(found)) if len(found) == 1 else "mixed"
        report.n_extra_parcels, report.n_constant_parcels = len(self._extra), len(self._constant)
        report.n_permuted, report.n_with_missing = self._n_permuted, self._n_missing
        report.n_with_constant, report.n_other_tr = self._n_constant, self._n_other_tr


def make_layout(config: ImportConfig, kind: str, first: Item, report: ImportReport) -> Layout:
    """Decide the atlas: the user's file, else the names that are known, else numbers.

    Raises:
        UserError: The first recording cannot be read, or does not say what its parcels are.
    """
    raw = read_item(config, kind, first)
    header = raw.names
    names = _read_names(config.parcels) if config.parcels and kind != "nifti" else None
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
        return Layout(atlas=atlas, n_parcels=n_parcels, names=names, header=None, from_user=True)
    title = f"{config.name or config.out.resolve().name} parcels"
    if header is not None:
        parcels, n_twice = _number_repeats(header)
        if n_twice:
            report.warn(
                f"{n_twice} columns repeat a parcel name ('{_first_repeat(header)}', ...): they "
                "are numbered in the order they stand in, and every file must have that order"
            )
        atlas = Atlas(name=title, parcels=parcels)
        if kind == "nifti":
            atlas = _label_atlas(config, title, report)
        return Layout(
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
        return Layout(atlas=atlas, n_parcels=n_parcels, names=None, header=None, from_user=False)
    atlas = Atlas(name=title, parcels=names)
    return Layout(atlas=atlas, n_parcels=len(names), names=names, header=None, from_user=False)


def to_atlas(
    config: ImportConfig, kind: str, layout: Layout, item: Item
) -> tuple[np.ndarray, Facts]:
    """Read one recording: float32 [atlas p, t], where missing parcels are NaN rows.

    Raises:
        UserError: It cannot be read, has no TR, or does not fit the atlas.
    """
    raw = read_item(config, kind, item)
    bold, orientation = _orient(raw, item, layout, config)
    names = raw.names or layout.names
    with np.errstate(over="ignore"):  # infinity is refused, with a count, when it is written
        bold = bold.astype(np.float32)
    if layout.header is not None and raw.names is None:
        raise UserError(
            f"{item.path.name} has no parcel names but the first file has: expected a header in "
            "every file or in none."
        )
    permuted, extra = False, ()
    if names is not None and not (layout.header is not None and raw.names == layout.header):
        try:
            match = match_parcels(names, layout.atlas)
        except UserError as error:
            raise UserError(f"{item.path.name}: {error}") from error
        permuted, extra = match.permuted, match.extra
        bold = match.apply(bold)
    missing = np.isnan(bold).all(axis=1)
    constant = np.zeros_like(missing)
    if config.constant_as_missing:
        # Infinite throughout is no constant signal: it is refused with the recording's name.
        constant = np.isfinite(bold[:, 0]) & (bold == bold[:, :1]).all(axis=1)
        bold[constant] = np.nan
    facts = Facts(
        orientation=orientation,
        coverage=1.0 - float((missing | constant).mean()),
        n_trs=bold.shape[1],
        tr_s=_tr(config, raw, item),
        other_tr=config.tr_s is not None and _differ(raw.tr_s, config.tr_s),
        permuted=permuted,
        extra=list(extra),
        missing=bool(missing.any()),
        constant=np.flatnonzero(constant).tolist(),
    )
    return bold, facts


def _tr(config: ImportConfig, raw: Raw, item: Item) -> float:
    if config.tr_s is not None:
        return config.tr_s
    if raw.tr_s is None:
        raise UserError(
            f"the TR is not given and {item.path.name} does not say it: expected the seconds "
            "between frames, because windows and models depend on it; add --tr-s, for example "
            "--tr-s 0.72 for HCP."
        )
    return check_tr(raw.tr_s, where=f"{item.path.name}: tr_s")


def _differ(tr_s: float | None, given: float) -> bool:
    return tr_s is not None and abs(tr_s - given) > 0.01 * given


def _label_atlas(config: ImportConfig, title: str, report: ImportReport) -> Atlas:
    """The atlas of a label image, with the centroids of its labels."""
    assert config.labels is not None
    labels = read_labels(config.labels, config.parcels)
    if not labels.named:
        report.warn(
            f"the labels are called {labels.names[0]} to {labels.names[-1]} by their numbers; give "
            "--parcels to name them"
        )
    whole = bool(np.isfinite(labels.xyz_mm).all())
    report.warn(
        "parcel coordinates are the centroids of the labels: they are MNI152 millimetres if the "
        "label image is in that space"
        if whole
        else "some named labels have no voxel: the atlas has no coordinates"
    )
    return Atlas(name=title, parcels=labels.names, xyz_mm=labels.xyz_mm if whole else None)


def _orient(raw: Raw, item: Item, layout: Layout, config: ImportConfig) -> tuple[np.ndarray, str]:
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
