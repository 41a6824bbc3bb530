"""Standardisation as a fitted object: it travels with a checkpoint and says what it was fitted on.

The formulas are those of BrainLM (Ortega Caro et al. 2024, vandijklab/BrainLM at commit b591d88d,
toolkit/BrainLM_Toolkit.py) and Brain-JEPA (Dong et al. 2024, arXiv:2409.19407,
Eric-LRL/Brain-JEPA at commit b1dfa93e).

Shape legend: p parcels, t TRs.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from brainfusion.data.recordings import Recordings
from brainfusion.runtime.errors import UserError, nearest

KINDS = {
    "none": "values as they are",
    "recording-zscore": "minus the recording's mean, over its standard deviation (Brain-JEPA)",
    "parcel-zscore": "each parcel minus its time mean, over its standard deviation",
    "parcel-centred": "each parcel minus its time mean, in the data's unit (BrainLM's columns)",
    "brainlm-robust": "minus the time mean, then (x - median) / IQR (BrainLM, the paper's text)",
    "brainlm-code": "minus the time mean, then x - median / IQR (BrainLM, the published code)",
    "brainjepa-robust": "(x - median) / IQR of the recordings' time means (Brain-JEPA)",
}
DIVISORS = {
    "brainlm-image": 5.6430855,
    "brainlm-global-std": 41.44047,
    "brainlm-99th-percentile": 111.13143061224855,
}
"""BrainLM's constants for `divide_by`, measured on its own data: of the image-shaped models (111M,
650M), after `brainlm-robust`; of two columns of its data sets, after `parcel-centred`."""
Frames = slice | np.ndarray
"""Which frames of a recording: a range, or positions."""
Scale = tuple[np.ndarray, ...]
"""What a standardiser takes from each recording, of `Standardiser.scale_of`."""
_ALL = slice(None)
FITTED = ("brainlm-robust", "brainlm-code", "brainjepa-robust")
_BRAINLM_TRS = 200
_MAX_SAMPLE = 2**27  # float32 values: 512 MiB of sampled frames
_NOISE = 1e-6  # a spread below this share of the mean is float32 rounding


@dataclass(frozen=True, kw_only=True, eq=False)
class Standardiser:
    """Scales BOLD the way a model was trained on; missing parcels (NaN) become 0.

    m and s are mean and unbiased standard deviation, taken over the parcels and TRs given:

    - `none`: x.
    - `recording-zscore`: (x - m) / s with one m and one s over all parcels and TRs. Brain-JEPA's
      downstream data (one pair a recording) and its `use_standatdization` (one pair a clip).
    - `parcel-zscore`: (x - m) / s with m and s of each parcel over the TRs.
    - `parcel-centred`: x - m of each parcel, as several of BrainLM's columns start.
    - `brainlm-robust`: c = x - m of each parcel; (c - median) / IQR, where median and IQR of each
      parcel come from c over the first 200 TRs of each training recording, stacked; zeros are left
      out of the quartiles. The formula of BrainLM's paper.
    - `brainlm-code`: c - median / IQR, the same statistics. What BrainLM's toolkit computes, by
      operator precedence (vandijklab/BrainLM#19). Which of the two the published weights were fed
      is not documented.
    - `brainjepa-robust`: (x - median) / IQR, where median and IQR of each parcel are taken over the
      training recordings' time means. Brain-JEPA's pretraining data: fluctuations are divided by a
      spread between people. Needs data whose time means were kept.

    A parcel without spread becomes 0. Everything is divided by `divide_by` in the end.
    """

    kind: str
    n_parcels: int
    cohort: str
    n_people: int
    n_recordings: int
    median: np.ndarray | None = None
    """float64 [p]; None for kinds that are not fitted. 0 where a parcel had no data."""
    iqr: np.ndarray | None = None
    """float64 [p]: 75th minus 25th percentile; 0 where a parcel had no spread."""
    divide_by: float = 1.0
    """A constant that scales the result; `DIVISORS` has the published ones."""

    @classmethod
    def fit(
        cls,
        kind: str,
        recordings: Recordings,
        rows: Sequence[int] | np.ndarray,
        *,
        cohort: str,
        divide_by: float = 1.0,
    ) -> "Standardiser":
        """Fit on the recordings at `rows`, one at a time; memory stays under about 1 GiB.

        Args:
            kind: One of `KINDS`.
            recordings: Where to read.
            rows: Index rows of the training recordings.
            cohort: The cohort's name, for the record.
            divide_by: A constant that scales the result.

        Raises:
            UserError: An unknown kind, no rows, a constant that is not above zero, or data without
                the spread that the kind needs.
        """
        check_kind(kind)
        check_divisor(divide_by)
        rows = np.asarray(rows, dtype=np.int64)
        if not len(rows):
            raise UserError(
                f"the standardiser '{kind}' was given no recording to fit on: expected those of "
                "the training split; check that its people have recordings."
            )
        median = iqr = None
        if kind in ("brainlm-robust", "brainlm-code"):
            median, iqr = _brainlm_statistics(recordings, rows)
        elif kind == "brainjepa-robust":
            median, iqr = _brainjepa_statistics(recordings, rows)
        return cls(
            kind=kind,
            n_parcels=recordings.n_parcels,
            cohort=cohort,
            n_people=recordings.index["subject"].gather(rows).n_unique(),
            n_recordings=len(rows),
            median=median,
            iqr=iqr,
            divide_by=divide_by,
        )

    @property
    def fitted_on(self) -> str:
        """What it saw: "700 people of cohort X"."""
        return f"{self.n_people} people of cohort {self.cohort}"

    def transform(
        self, bold: np.ndarray, *, part: Frames = _ALL, scale: Scale | None = None
    ) -> np.ndarray:
        """Standardise whole recordings or windows.

        Args:
            bold: [..., p, t] in the unit and atlas order of the data it was fitted on; a missing
                parcel is NaN. The means and standard deviations in the formulas are of each [p, t].
            part: The frames to return; all if omitted. Means and standard deviations stay those of
                the whole, so that the values are the same to the bit; the rest is not made.
            scale: What `scale_of` gave for the whole; measured here if omitted.

        Returns:
            float32 [..., p, frames], without NaN.

        Raises:
            UserError: Another number of parcels.
        """
        scale = self.scale_of(bold) if scale is None else scale
        x = np.asarray(bold, dtype=np.float32)[..., part]
        missing = np.isnan(x)
        some = bool(missing.any())
        if some:
            x = np.where(missing, np.float32(0), x)
        if self.kind in ("recording-zscore", "parcel-zscore"):
            x = _zscored(x, *scale)
        elif self.kind == "parcel-centred":
            x = (x - scale[0]).astype(np.float32)
        elif self.kind != "none":
            x = self._robust(x, scale)
        if self.divide_by != 1.0:
            x = x / np.float32(self.divide_by)
        if some:
            return np.where(missing, np.float32(0), x)
        return x.copy() if self.kind == "none" and self.divide_by == 1.0 else x

    def scale_of(self, bold: np.ndarray) -> Scale:
        """What the kind takes from each whole recording: a mean and one over a deviation, or less.

        Kept, it makes a further window of a recording cost its own frames alone.

        Args:
            bold: As for `transform`.

        Returns:
            float64 arrays that broadcast to [..., p, t]: mean and inverse of the standard deviation
            (0 where there is no spread) for z-scores, the time means where those are taken off,
            none otherwise.

        Raises:
            UserError: Another number of parcels.
        """
        if bold.ndim < 2 or bold.shape[-2] != self.n_parcels:
            got = bold.shape[-2] if bold.ndim >= 2 else f"no parcel axis (shape {bold.shape})"
            raise UserError(
                f"this data has {got} parcels but the standardiser was fitted on {self.n_parcels} "
                f"({self.fitted_on}): use data of the same atlas, or refit it on this cohort."
            )
        if self.kind in ("none", "brainjepa-robust"):
            return ()
        x = np.asarray(bold, dtype=np.float32)
        present = ~np.isnan(x)
        if present.all():
            present = None
        else:
            x = np.where(present, x, np.float32(0))
        if self.kind == "recording-zscore":
            return _mean_and_inverse(x, present, axis=(-2, -1))
        if self.kind == "parcel-zscore":
            return _mean_and_inverse(x, present, axis=(-1,))
        return (_mean(x, present, axis=(-1,))[0],)

    def to_dict(self) -> dict[str, Any]:
        """The JSON form, part of a checkpoint's state.json."""
        return {
            "kind": self.kind,
            "n_parcels": self.n_parcels,
            "cohort": self.cohort,
            "n_people": self.n_people,
            "n_recordings": self.n_recordings,
            "median": None if self.median is None else self.median.tolist(),
            "iqr": None if self.iqr is None else self.iqr.tolist(),
            "divide_by": self.divide_by,
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Standardiser":
        """The inverse of `to_dict`.

        Raises:
            UserError: Keys are missing or unknown, or statistics do not fit the kind.
        """
        keys = [field.name for field in fields(cls)]
        if not isinstance(values, dict) or set(values) != set(keys):
            raise UserError(
                f"standardiser: expected the keys {', '.join(keys)}: restore the checkpoint's "
                "state.json."
            )
        check_kind(values["kind"])
        check_divisor(values["divide_by"])
        statistics: dict[str, np.ndarray | None] = {"median": None, "iqr": None}
        if values["kind"] in FITTED:
            for name in statistics:
                array = np.asarray(values[name], dtype=np.float64)
                if array.shape != (values["n_parcels"],) or not np.isfinite(array).all():
                    raise UserError(
                        f"standardiser: '{name}' must be {values['n_parcels']} numbers, one a "
                        "parcel: restore the checkpoint's state.json."
                    )
                statistics[name] = array
        return cls(**{**values, **statistics})

    def _robust(self, x: np.ndarray, scale: Scale) -> np.ndarray:
        assert self.median is not None
        assert self.iqr is not None
        median, iqr = self.median[:, None], self.iqr[:, None]
        safe = np.where(iqr > 0, iqr, 1.0)
        centred = x - scale[0] if scale else x.astype(np.float64)
        if self.kind == "brainlm-code":
            scaled = centred - median / safe
        else:
            scaled = (centred - median) / safe
        return np.where(iqr > 0, scaled, 0.0).astype(np.float32)


def check_kind(kind: str) -> None:
    """Check a kind's name.

    Raises:
        UserError: It is none of `KINDS`; the nearest is named.
    """
    if kind not in KINDS:
        raise UserError(f"unknown standardiser '{kind}'. {nearest(str(kind), KINDS)}")


def check_divisor(divide_by: float) -> None:
    """Check a constant that standardised values are divided by.

    Raises:
        UserError: It is not a number above zero.
    """
    if not (isinstance(divide_by, int | float) and math.isfinite(divide_by) and divide_by > 0):
        raise UserError(
            f"divide_by={divide_by}: expected a number above zero, for example 5.6430855, or 1 to "
            "leave values as they are."
        )


def _mean(
    x: np.ndarray, present: np.ndarray | None, *, axis: tuple[int, ...]
) -> tuple[np.ndarray, Any]:
    """The mean over present values, float64, and their number; `x` is 0 where it is not present."""
    n: Any = math.prod(x.shape[i] for i in axis)
    if present is not None:
        n = present.sum(axis=axis, keepdims=True)
    return x.sum(axis=axis, keepdims=True, dtype=np.float64) / np.maximum(n, 1), n


def _mean_and_inverse(
    x: np.ndarray, present: np.ndarray | None, *, axis: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """The mean and one over the standard deviation, 0 where that is rounding."""
    mean, n = _mean(x, present, axis=axis)
    centred = x - mean.astype(np.float32)  # in float32, four times as fast
    if present is not None:
        centred *= present
    variance = np.square(centred, out=centred).sum(axis=axis, keepdims=True, dtype=np.float64)
    std = np.sqrt(variance / np.maximum(n - 1, 1))
    spread = std > _NOISE * np.abs(mean)
    return mean, np.where(spread, 1.0 / np.where(spread, std, 1.0), 0.0)


def _zscored(x: np.ndarray, mean: np.ndarray, inverse: np.ndarray) -> np.ndarray:
    rounded = mean.astype(np.float32)
    scaled = x - rounded
    scaled *= inverse.astype(np.float32)
    # What rounding the mean left.
    scaled += ((rounded - mean) * inverse).astype(np.float32)
    return scaled


def _means(
    recordings: Recordings, rows: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Each recording with its present parcels (bool [p]) and their time means (float64 [p])."""
    for row in rows:
        bold = recordings.read(int(row))
        yield bold, ~np.isnan(bold[:, 0]), bold.mean(axis=1, dtype=np.float64)


def _brainlm_statistics(recordings: Recordings, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    n_parcels = recordings.n_parcels
    # Differs from upstream: a large cohort's frames are thinned evenly, because all first 200 TRs
    # of 40,000 people would take 14 GB; the quantiles of the remaining millions agree.
    n_values = max(_MAX_SAMPLE // n_parcels, 1)
    if len(rows) > n_values:
        rows = rows[np.linspace(0, len(rows) - 1, n_values).astype(np.int64)]
    n_frames = min(_BRAINLM_TRS, n_values // len(rows))
    sample = np.full((n_parcels, len(rows) * n_frames), np.nan, dtype=np.float32)
    filled = 0
    for bold, present, mean in _means(recordings, rows):
        n_first = min(_BRAINLM_TRS, bold.shape[1])
        frames = np.unique(np.linspace(0, n_first - 1, min(n_frames, n_first)).astype(np.int64))
        part = slice(filled, filled + len(frames))
        sample[present, part] = bold[present][:, frames] - mean[present, None]
        filled = part.stop
    sample = sample[:, :filled]
    median, iqr = np.zeros(n_parcels), np.zeros(n_parcels)
    for parcel, values in enumerate(sample):
        seen = values[~np.isnan(values)].astype(np.float64)
        if len(seen):
            median[parcel] = np.median(seen)
        if (nonzero := seen != 0).any():
            low, high = np.percentile(seen[nonzero], [25, 75])
            iqr[parcel] = high - low
    if not (iqr > 0).any():
        raise UserError(
            "the training recordings are constant in every parcel: expected BOLD time series; "
            "check what was imported."
        )
    return median, iqr


def _brainjepa_statistics(
    recordings: Recordings, rows: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    n_parcels = recordings.n_parcels
    means = np.full((len(rows), n_parcels), np.nan)
    within = np.zeros(n_parcels)
    for i, (bold, present, mean) in enumerate(_means(recordings, rows)):
        means[i] = np.where(present, mean, np.nan)
        within += np.where(present, bold.std(axis=1), 0.0) / len(rows)
    median, iqr = np.zeros(n_parcels), np.zeros(n_parcels)
    for parcel, values in enumerate(means.T):
        seen = values[~np.isnan(values)]
        if len(seen):
            low, median[parcel], high = np.percentile(seen, [25, 50, 75])
            iqr[parcel] = high - low
    # Centred recordings leave means of rounding size: dividing by those would blow the data up.
    iqr[iqr <= 1e-4 * within] = 0.0
    if (iqr > 0).mean() < 0.5:
        raise UserError(
            f"'brainjepa-robust' divides by the spread of time means between recordings, and "
            f"{int((iqr == 0).sum())} of {n_parcels} parcels have none over {len(rows)} of them: "
            "expected recordings whose time means were kept; use 'recording-zscore' or "
            "'brainlm-robust' for centred data."
        )
    return median, iqr
