"""One recording in a file, in the parcel order of an atlas: what a query is asked with.

Files are read as by an import, and parcels are matched by name, in the same way.

Shape legend: p parcels, t TRs.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from brainfusion.data.atlas import Atlas
from brainfusion.data.importers import arrow, hdf5
from brainfusion.data.importers.arrays import load_npy
from brainfusion.data.importers.config import ImportConfig, ImportReport
from brainfusion.data.importers.matching import Facts, Layout, make_layout, to_atlas
from brainfusion.data.importers.sources import SUFFIXES, Item, kind_of, read_item
from brainfusion.data.recordings import check_bold
from brainfusion.runtime.errors import UserError
from brainfusion.runtime.logs import say

_NAMED = ("cifti", "nifti")
"""Kinds whose files always name their parcels."""
_PERHAPS_NAMED = ("tables", "hdf5")


@dataclass(frozen=True, kw_only=True, eq=False)
class Recording:
    """One recording of one person."""

    bold: np.ndarray
    """float32 [p, t], raw; a parcel without data is NaN in all its TRs."""
    tr_s: float
    """Seconds between frames."""
    atlas: Atlas
    """Its parcels, in the order of `bold`."""
    path: Path
    named: bool
    """Whether the file names its parcels; otherwise they were taken in the atlas's order."""


def read_recording(
    path: Path | str,
    atlas: Atlas,
    *,
    tr_s: float | None = None,
    orientation: str = "auto",
    parcels: Path | None = None,
    labels: Path | None = None,
    variable: str | None = None,
    row: int | None = None,
    drop_columns: Sequence[str] = (),
) -> Recording:
    """Read one recording; how it was understood is said.

    Args:
        path: .npy, .mat, a table (.tsv, .csv, .txt), CIFTI, NIfTI, HDF5 or Arrow.
        atlas: What parcels are matched to, by name; a file without names has its order.
        tr_s: Seconds between frames; what the file says if omitted.
        orientation: "parcels-first" or "trs-first"; "auto" goes by the number of parcels.
        parcels: A text file with the names of unnamed parcels, one a line, in their order; of
            NIfTI, of the labels in the order of their numbers.
        labels: The atlas that makes parcels of a dtseries (dlabel.nii) or of NIfTI (an image).
        variable: Of a .mat or HDF5 file the table, of Arrow the column.
        row: Of a file of several recordings, which: from 0.
        drop_columns: Columns of a table that are no parcels.

    Raises:
        UserError: What `import_cohort` refuses, too; several recordings and no `row`.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(
            f"{path} does not exist: expected a recording "
            f"({', '.join(ending for endings in SUFFIXES.values() for ending in endings)})."
        )
    kind = kind_of(path)
    if kind is None:
        raise UserError(
            f"{path.name} is no recording by its name: expected one of "
            f"{', '.join(ending for endings in SUFFIXES.values() for ending in endings)}."
        )
    config = ImportConfig(
        source=path, out=path.with_name(f"{path.name}-cohort"), tr_s=tr_s, kind=kind,  # type: ignore[arg-type]
        orientation=orientation, parcels=parcels, labels=labels, variable=variable,  # type: ignore[arg-type]
        drop_columns=tuple(drop_columns),
    )  # fmt: skip
    item = _item(path, kind, variable, row)
    layout, named = _layout(config, kind, item, atlas)
    bold, facts = to_atlas(config, kind, layout, item)
    bold, _ = check_bold(bold, recording=path.name, n_parcels=atlas.n_parcels)
    _report(path, bold, facts, named=named, atlas=atlas)
    return Recording(bold=bold, tr_s=facts.tr_s, atlas=atlas, path=path, named=named)


def _item(path: Path, kind: str, variable: str | None, row: int | None) -> Item:
    """The only recording of a file, or number `row` of several."""
    key, n_rows = None, None
    if kind == "npy":
        array = load_npy(path)
        n_rows = len(array) if array.ndim == 3 else None
    elif kind == "hdf5":
        sets = hdf5.find_sets(path, variable)
        if len(sets) > 1:
            raise UserError(
                f"{path.name} holds {len(sets)} data sets ({', '.join(list(sets)[:5])}): choose "
                "the recording with --variable."
            )
        [(key, shape)] = sets.items()
        n_rows = shape[0] if len(shape) == 3 else None
    elif kind == "arrow":
        key = arrow.find_column(path, variable)
        if key is None:
            raise UserError(f"{path.name} has no column of recordings: expected BrainLM's.")
        n_rows = arrow.open_table(path).num_rows
        row = 0 if n_rows == 1 and row is None else row
    if (n_rows is None) != (row is None) or (row is not None and not 0 <= row < (n_rows or 0)):
        holds = "one recording" if n_rows is None else f"{n_rows} recordings"
        wanted = "leave --row out" if n_rows is None else f"choose with --row 0 to {n_rows - 1}"
        raise UserError(f"{path.name} holds {holds}: {wanted}.")
    return Item(recording=path.name, subject="", session="", path=path, row=row, key=key)


def _layout(config: ImportConfig, kind: str, item: Item, atlas: Atlas) -> tuple[Layout, bool]:
    """What the recording is matched to, and whether it names its parcels."""
    if config.parcels is not None and kind not in _NAMED:
        given = make_layout(config, kind, item, ImportReport(source="", kind=kind))
        return replace(given, atlas=atlas), True
    named = kind in _NAMED
    if kind in _PERHAPS_NAMED:
        named = read_item(config, kind, item).names is not None
    layout = Layout(atlas=atlas, n_parcels=atlas.n_parcels, names=None, header=None, from_user=True)
    return layout, named


def _report(path: Path, bold: np.ndarray, facts: Facts, *, named: bool, atlas: Atlas) -> None:
    how = (
        "parcels matched by name"
        if named
        else (
            f"it names no parcels, which are taken to be in the order of the atlas '{atlas.name}'"
        )
    )
    say(
        f"{path.name}: {len(bold)} parcels x {bold.shape[1]} TRs of {facts.tr_s:g} s, read "
        f"{facts.orientation}; {how}."
    )
    if facts.other_tr:
        say(f"warning: {path.name} says another TR than the {facts.tr_s:g} s that was given.")
    counts = {
        "parcels that the atlas does not have, left out": len(facts.extra),
        "parcels of the atlas without data": int(np.isnan(bold[:, 0]).sum()),
    }
    for what, count in counts.items():
        if count:
            say(f"{path.name}: {what}: {count}.")
