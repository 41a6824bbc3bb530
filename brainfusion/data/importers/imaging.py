"""CIFTI and NIfTI: parcels as they are stored, or means over the labels of an atlas.

A parcel's value is the mean over its covered voxels or grayordinates: those that are neither zero
nor NaN in all frames. A parcel with under half of them covered is missing (XCP-D's default), so an
atlas never loses a column. nibabel is needed, and no other kind needs it.

Shape legend: n voxels or grayordinates, p parcels, t TRs.
"""

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from brainfusion.data.importers.tables import read_table
from brainfusion.runtime.errors import UserError
from brainfusion.runtime.files import read_json

_MIN_COVERED = 0.5
_BLOCK_BYTES = 64 * 2**20
_UNITS_S = {"sec": 1.0, "msec": 1e-3, "usec": 1e-6, "unknown": 1.0}


@dataclass(frozen=True, kw_only=True, eq=False)
class Image:
    """What an image file gives: values of parcels, their names, the TR."""

    values: np.ndarray
    """float32 [t, p]."""
    names: tuple[str, ...]
    tr_s: float | None


@dataclass(frozen=True, kw_only=True, eq=False)
class Labels:
    """The parcel of each voxel of an image."""

    volume: np.ndarray
    """int64 [x, y, z]: position in `names`, -1 outside."""
    affine: np.ndarray
    names: tuple[str, ...]
    xyz_mm: np.ndarray
    """float32 [p, 3]: centroids in the space of the image."""
    named: bool
    """Whether the names are the user's, or numbers."""


def read_cifti(path: Path, labels: Path | None) -> Image:
    """A `ptseries`, or a `dtseries` as means over the labels of a `dlabel`.

    Raises:
        UserError: nibabel is not installed, the file is broken or of another form, or the atlas is
            absent or of another space.
    """
    nibabel = _nibabel()
    image = _load(path)
    if not isinstance(image, nibabel.Cifti2Image):
        raise UserError(f"{path} is no CIFTI-2 file: expected a ptseries.nii or a dtseries.nii.")
    series, brain = (image.header.get_axis(i) for i in range(2))
    if not isinstance(series, nibabel.cifti2.SeriesAxis):
        raise UserError(
            f"{path} holds no time series but {_axis_name(series)}: expected frames along its "
            "first axis; choose the time series with --glob."
        )
    tr_s = float(series.step) if series.unit == "SECOND" and series.step > 0 else None
    if isinstance(brain, nibabel.cifti2.ParcelsAxis):
        with _errors(path):
            values = np.asarray(image.dataobj, dtype=np.float32)
        return Image(values=values, names=tuple(map(str, brain.name)), tr_s=tr_s)
    if labels is None:
        raise UserError(
            f"{path} holds grayordinates, not parcels: give an atlas with --labels "
            "ATLAS.dlabel.nii, or the ptseries.nii of the same run."
        )
    codes, names = _match_grayordinates(path, brain, labels)
    means = _Means(codes, len(names))
    for frames in _blocks(image.shape[0], image.shape[1]):
        with _errors(path):
            part = np.asarray(image.dataobj[frames], dtype=np.float32)
        means.add(part)
    return Image(values=means.result(path), names=names, tr_s=tr_s)


def read_nifti(path: Path, labels: Path | None, parcels: Path | None) -> Image:
    """A 4-D image as means over the labels of a 3-D one; memory holds some frames.

    Where the grids differ, labels are put onto the image's by nearest neighbour.

    Raises:
        UserError: nibabel is not installed, a file is broken or of another form, or the labels lie
            outside the image.
    """
    if labels is None:
        raise UserError(
            f"{path.name} holds voxels, not parcels: give an atlas in the same space with --labels "
            "ATLAS.nii.gz (whole numbers), and its names with --parcels."
        )
    atlas = read_labels(labels, parcels)
    image = _load(path)
    if len(image.shape) != 4 or image.shape[3] < 2:
        raise UserError(
            f"{path} has shape {list(image.shape)}, expected a 4-D image [x, y, z, TR]: choose the "
            "recordings with --glob, for example '*_bold.nii.gz'."
        )
    codes = _on_grid(atlas, image.shape[:3], image.affine).ravel(order="F")
    if not (codes >= 0).any():
        raise UserError(
            f"{path}: no voxel lies in a label of {labels}: expected an atlas in the image's space "
            "(MNI152 for images in MNI152)."
        )
    means = _Means(codes, len(atlas.names))
    for frames in _blocks(image.shape[3], len(codes)):
        with _errors(path):
            part = np.asarray(image.dataobj[..., frames])
        means.add(part.reshape(len(codes), -1, order="F").T)
    zooms, units = image.header.get_zooms(), image.header.get_xyzt_units()
    tr_s = float(zooms[3]) * _UNITS_S.get(units[1], 1.0) if zooms[3] > 0 else None
    return Image(values=means.result(path), names=atlas.names, tr_s=tr_s)


def read_labels(path: Path, parcels: Path | None) -> Labels:
    """An atlas of whole numbers, 0 outside.

    Args:
        path: A 3-D NIfTI image.
        parcels: Names: a table with the columns `index` and `name` (BIDS' dseg.tsv), or a text file
            with one name a line, in the order of the numbers; numbers if omitted.

    Raises:
        UserError: A file is absent, broken or of another form, or names do not fit the numbers.
    """
    for file in (path, parcels):
        if file is not None and not file.is_file():
            raise UserError(f"{file} does not exist: expected an atlas image, and names of labels.")
    times = [file.stat().st_mtime_ns for file in (path, parcels) if file is not None]
    return _read_labels(path, parcels, *times)


@lru_cache(maxsize=2)
def _read_labels(path: Path, parcels: Path | None, *_times: int) -> Labels:
    image = _load(path)
    volume = np.asarray(image.dataobj)
    volume = volume[..., 0] if volume.ndim == 4 and volume.shape[3] == 1 else volume
    whole = np.round(np.nan_to_num(volume)).astype(np.int64)
    if volume.ndim != 3 or np.abs(np.nan_to_num(volume) - whole).max() > 1e-3 or whole.min() < 0:
        raise UserError(
            f"{path} has shape {list(volume.shape)} and values from {volume.min():g} to "
            f"{volume.max():g}, expected a 3-D image of whole numbers, 0 outside: a probabilistic "
            "atlas is no label atlas."
        )
    present = np.unique(whole)
    numbers = present[present > 0].tolist()
    if not numbers:
        raise UserError(f"{path} has no label above 0: expected an atlas of whole numbers.")
    if parcels is None:
        width = len(str(numbers[-1]))
        names = [f"label-{number:0{width}d}" for number in numbers]
    else:
        numbers, names = _named_numbers(parcels, numbers, path)
    lookup = np.full(max(numbers[-1], int(present[-1])) + 1, -1, dtype=np.int64)
    lookup[numbers] = np.arange(len(numbers))
    codes = lookup[whole]
    return Labels(
        volume=codes,
        affine=image.affine,
        names=tuple(names),
        xyz_mm=_centroids(codes, image.affine, len(names)),
        named=parcels is not None,
    )


def sidecar_tr(path: Path, stem: str) -> float | None:
    """The TR of the JSON file beside a recording (BIDS), None where there is none."""
    beside = path.with_name(f"{stem}.json")
    if not beside.is_file():
        return None
    facts = read_json(beside)
    if not isinstance(facts, dict):
        return None
    if isinstance(value := facts.get("RepetitionTime"), int | float) and value > 0:
        return float(value)
    rate_hz = facts.get("SamplingFrequency")
    return 1.0 / rate_hz if isinstance(rate_hz, int | float) and rate_hz > 0 else None


class _Means:
    """Sums over labels, frame by frame."""

    def __init__(self, codes: np.ndarray, n_labels: int) -> None:
        inside = np.flatnonzero(codes >= 0)
        order = np.argsort(codes[inside], kind="stable")
        self._columns, sorted_codes = inside[order], codes[inside][order]
        self._labels, self._starts = np.unique(sorted_codes, return_index=True)
        self._n_labels = n_labels
        self._seen = np.zeros(len(inside), dtype=bool)
        self._lost = np.zeros(len(inside), dtype=bool)
        self._sums: list[np.ndarray] = []

    def add(self, frames: np.ndarray) -> None:
        """Frames [t, n]."""
        values = frames[:, self._columns].astype(np.float64)
        lost = np.isnan(values)
        self._lost |= lost.any(axis=0)
        values[lost] = 0.0
        self._seen |= (values != 0).any(axis=0)
        self._sums.append(np.add.reduceat(values, self._starts, axis=1))

    def result(self, path: Path) -> np.ndarray:
        """float32 [t, p]; NaN for parcels that are not covered."""
        if n_partly := int((self._seen & self._lost).sum()):
            raise UserError(
                f"{path.name} has {n_partly} voxels that are NaN in some frames only: expected "
                "numbers, or NaN throughout; interpolate or censor those frames before the import."
            )
        covered = np.add.reduceat(self._seen.astype(np.int64), self._starts)
        sizes = np.diff(np.append(self._starts, len(self._seen)))
        enough = covered >= _MIN_COVERED * sizes
        means = np.full((sum(map(len, self._sums)), self._n_labels), np.nan, dtype=np.float32)
        sums = np.concatenate(self._sums)
        means[:, self._labels[enough]] = sums[:, enough] / covered[enough]
        return means


def _blocks(n_frames: int, n_values: int) -> Iterator[slice]:
    step = max(1, _BLOCK_BYTES // (8 * n_values))
    for start in range(0, n_frames, step):
        yield slice(start, min(start + step, n_frames))


def _match_grayordinates(
    path: Path, brain: Any, labels: Path
) -> tuple[np.ndarray, tuple[str, ...]]:
    """The label of each grayordinate, -1 where it has none, and the names."""
    if not labels.is_file():
        raise UserError(f"{labels} does not exist: --labels expects a dlabel.nii here.")
    atlas_axis, keys, names = _read_dlabel(labels, labels.stat().st_mtime_ns)
    for name, n_vertices in brain.nvertices.items():
        other = atlas_axis.nvertices.get(name)
        if other not in (None, n_vertices):
            raise UserError(
                f"{path.name} has {n_vertices} vertices in {name} but {labels} has {other}: "
                "expected one mesh; resample the atlas (wb_command -label-resample)."
            )
    volumes = [axis.affine for axis in (brain, atlas_axis) if axis.affine is not None]
    if len(volumes) == 2 and not np.allclose(*volumes, atol=1e-3):
        raise UserError(
            f"{path.name} and {labels} have voxels on different grids: expected one; resample the "
            "atlas (wb_command -cifti-resample)."
        )
    known = dict(zip(_places(atlas_axis), keys.tolist(), strict=True))
    codes = np.array([known.get(place, -1) for place in _places(brain)], dtype=np.int64)
    if not (codes >= 0).any():
        raise UserError(
            f"{path.name}: no grayordinate lies in a label of {labels}: expected an atlas of the "
            "same structures."
        )
    return codes, names


@lru_cache(maxsize=2)
def _read_dlabel(path: Path, _time: int) -> tuple[Any, np.ndarray, tuple[str, ...]]:
    """The brain axis of an atlas, each place's position in the names (-1: none), and the names."""
    nibabel = _nibabel()
    image = _load(path)
    axes = [image.header.get_axis(i) for i in range(2)] if _is_cifti(image) else []
    if not axes or not isinstance(axes[0], nibabel.cifti2.LabelAxis):
        raise UserError(f"{path} is no dlabel.nii: grayordinates need an atlas of the same kind.")
    if len(axes[0]) > 1:
        raise UserError(
            f"{path} holds {len(axes[0])} maps of labels ({', '.join(axes[0].name[:3])}): expected "
            "one; split it (wb_command -cifti-merge -column)."
        )
    table = axes[0].label[0]
    keys = np.asarray(image.dataobj)[0].astype(np.int64)
    numbers = sorted(key for key, (name, _) in table.items() if key > 0 and name != "???")
    place = {key: i for i, key in enumerate(numbers)}
    codes = np.array([place.get(key, -1) for key in keys.tolist()], dtype=np.int64)
    return axes[1], codes, tuple(str(table[key][0]) for key in numbers)


def _places(axis: Any) -> list[tuple[Any, ...]]:
    """What tells one grayordinate from another: its structure, and its vertex or voxel."""
    voxels = map(tuple, axis.voxel.tolist())
    return list(zip(axis.name.tolist(), axis.vertex.tolist(), voxels, strict=True))


def _on_grid(atlas: Labels, shape: tuple[int, ...], affine: np.ndarray) -> np.ndarray:
    """Labels on another image's grid, by nearest neighbour."""
    if atlas.volume.shape == tuple(shape) and np.allclose(atlas.affine, affine, atol=1e-3):
        return atlas.volume
    from scipy.ndimage import affine_transform

    there = np.linalg.inv(atlas.affine) @ affine  # voxel of the image -> voxel of the atlas
    shift: Any = there[:3, 3]
    return affine_transform(
        atlas.volume, there[:3, :3], shift, output_shape=shape, order=0, cval=-1
    )


def _named_numbers(parcels: Path, present: list[int], path: Path) -> tuple[list[int], list[str]]:
    """Numbers and names of the user's; the table may have parcels that the image lacks."""
    if parcels.suffix in (".tsv", ".csv", ".parquet"):
        columns, table = read_table(parcels, text=("name",))
        if not {"index", "name"} <= set(columns):
            raise UserError(
                f"{parcels} has no columns 'index' and 'name': expected the numbers of {path.name} "
                f"and their names; it has {', '.join(columns[:8])}."
            )
        table = table.filter(table["index"] > 0).sort("index")
        numbers, names = table["index"].to_list(), table["name"].to_list()
        if unknown := [number for number in present if number not in set(numbers)]:
            raise UserError(
                f"{parcels} has no name for {len(unknown)} labels of {path.name} (for example "
                f"{unknown[0]}): expected one each."
            )
        return numbers, names
    lines = [line.strip() for line in parcels.read_text(encoding="utf-8").splitlines()]
    names = [line for line in lines if line]
    if len(names) != len(present):
        raise UserError(
            f"{parcels} lists {len(names)} names but {path.name} has {len(present)} labels: "
            "expected one each in the order of the numbers, or a table with index and name."
        )
    return present, names


def _centroids(codes: np.ndarray, affine: np.ndarray, n_labels: int) -> np.ndarray:
    """float32 [p, 3] in mm; NaN for labels without voxels."""
    voxels = np.argwhere(codes >= 0)
    labels = codes[tuple(voxels.T)]
    counts = np.bincount(labels, minlength=n_labels)
    with np.errstate(invalid="ignore"):
        middle = np.stack(
            [np.bincount(labels, axis, minlength=n_labels) / counts for axis in voxels.T], axis=1
        )
    return (middle @ affine[:3, :3].T + affine[:3, 3]).astype(np.float32)


def _load(path: Path) -> Any:
    # A compressed image is read front to back: its handle has to stay open for that.
    options = {"keep_file_open": True} if path.suffix == ".gz" else {}
    with _errors(path):
        return _nibabel().load(path, **options)


@contextmanager
def _errors(path: Path) -> Iterator[None]:
    """Say in one line why an image cannot be read."""
    broken = _nibabel().filebasedimages.ImageFileError
    try:
        yield
    except (broken, OSError, ValueError, EOFError, zlib.error) as error:
        if isinstance(error, UserError):
            raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path} is no readable image ({reason}): copy it again.") from error


def _is_cifti(image: Any) -> bool:
    return isinstance(image, _nibabel().Cifti2Image)


def _axis_name(axis: Any) -> str:
    return type(axis).__name__.removesuffix("Axis").lower() + "s"


def _nibabel() -> Any:
    try:
        import nibabel
        import nibabel.cifti2
    except ImportError as error:
        raise UserError(
            "CIFTI and NIfTI files need nibabel, which is not installed: pip install "
            "'brainfusion[nifti]', or store recordings as .npy or .tsv."
        ) from error
    return nibabel
