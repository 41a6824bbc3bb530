"""What conditioned recordings look like: kept in checkpoints, compared before embedding.

Shape legend: p parcels, t TRs.
"""

import base64
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from brainfusion.runtime.errors import UserError

MEASURES = {
    "mean": "mean of all values, in units of their standard deviation",
    "log_sd": "natural logarithm of the standard deviation over time, pooled over parcels",
    "level_share": "share of the variance that lies between the parcels' time means",
    "sd_variation": "interquartile range of the parcels' standard deviations, over their median",
    "lag1": "correlation of a frame with the next, averaged over parcels",
    "lag4": "correlation of a frame with the fourth after it, averaged over parcels",
    "fc_mean": "correlation of two parcels, averaged over pairs",
    "flat": "share of parcels without signal (missing ones are zero by now)",
}
_FLAT = 1e-6  # a spread below this share of the recording's is rounding
_STEPS = 127  # a correlation is kept to 1 / 127
_UNKNOWN = -128


@dataclass(frozen=True, kw_only=True, eq=False)
class InputStatistics:
    """`MEASURES` of some recordings, and their connectivity."""

    n_recordings: int
    """Recordings measured: a sample, evenly over those given."""
    tr_s: float | None
    """Their TR in seconds, after resampling; None where it is not known."""
    mean: dict[str, float]
    """Each measure, averaged over recordings; NaN where no recording has it."""
    spread: dict[str, float]
    """Standard deviation of each measure over recordings; NaN for one recording."""
    connectivity: np.ndarray
    """float32 [p, p]: correlations averaged over recordings; NaN where none has the pair."""
    connectivity_noise: float
    """Variance of one recording's connectivity around the average, over the variance of that
    average over pairs; from two halves of the recordings. NaN where it cannot be told."""

    @classmethod
    def of(
        cls, recordings: Iterable[np.ndarray], *, n_recordings: int, tr_s: float | None
    ) -> "InputStatistics":
        """Measure conditioned recordings, one in memory at a time.

        Args:
            recordings: `n_recordings` arrays float [p, t] without NaN, of any length.
            n_recordings: How many there are; those of one person should follow one another, so
                that they fall into the same half.
            tr_s: Their TR in seconds.
        """
        rows: list[dict[str, float]] = []
        halves = []
        for i, bold in enumerate(recordings):
            if i in (0, (n_recordings + 1) // 2):
                halves.append(np.zeros((2, len(bold), len(bold))))
            measures, connectivity = _measure(bold)
            rows.append(measures)
            known = np.isfinite(connectivity)
            halves[-1] += np.stack([np.where(known, connectivity, 0.0), known])
        assert len(rows) == n_recordings >= 1
        table = {name: np.array([row[name] for row in rows]) for name in MEASURES}
        table = {name: values[np.isfinite(values)] for name, values in table.items()}
        group = _average(np.sum(halves, axis=0))
        return cls(
            n_recordings=n_recordings,
            tr_s=tr_s,
            mean={name: float(v.mean()) if len(v) else math.nan for name, v in table.items()},
            spread={
                name: float(v.std(ddof=1)) if len(v) > 1 else math.nan for name, v in table.items()
            },
            connectivity=group,
            connectivity_noise=_noise([_average(half) for half in halves], n_recordings),
        )

    @property
    def n_parcels(self) -> int:
        """Parcels of the recordings, p."""
        return len(self.connectivity)

    def likeness(self, other: "InputStatistics", *, shift: int = 0) -> float:
        """Correlation over pairs of the two connectivities, NaN where there is none.

        Args:
            other: Of as many parcels.
            shift: Take row i of `other` for row i + shift, the last ones for the first.
        """
        moved = np.roll(other.connectivity, (shift, shift), axis=(0, 1))
        return _correlation(_pairs(self.connectivity), _pairs(moved))

    def expected_likeness(self, n_recordings: int) -> float:
        """The `likeness` to `n_recordings` others of the same kind; NaN where that is not known."""
        noise = self.connectivity_noise
        return 1.0 / math.sqrt((1.0 + noise / self.n_recordings) * (1.0 + noise / n_recordings))

    def to_dict(self) -> dict[str, Any]:
        """The JSON form: numbers to five digits; connectivity as base64 of int8, r * 127."""
        steps = np.round(_pairs(self.connectivity) * _STEPS)
        steps = np.where(np.isnan(steps), _UNKNOWN, steps).astype(np.int8)
        return {
            "n_recordings": self.n_recordings,
            "tr_s": self.tr_s,
            "mean": {name: _rounded(value) for name, value in self.mean.items()},
            "spread": {name: _rounded(value) for name, value in self.spread.items()},
            "connectivity": base64.b64encode(steps.tobytes()).decode("ascii"),
            "connectivity_noise": _rounded(self.connectivity_noise),
        }

    @classmethod
    def from_dict(cls, values: Any) -> "InputStatistics":
        """The inverse of `to_dict`, up to its rounding.

        Raises:
            UserError: It is not what `to_dict` wrote.
        """
        try:
            return cls(
                n_recordings=int(values["n_recordings"]),
                tr_s=None if values["tr_s"] is None else float(values["tr_s"]),
                mean={name: _number(values["mean"][name]) for name in MEASURES},
                spread={name: _number(values["spread"][name]) for name in MEASURES},
                connectivity=_matrix(values["connectivity"]),
                connectivity_noise=_number(values["connectivity_noise"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"conditioning: the statistics of the inputs are not whole ({error!r}): restore "
                "the checkpoint's state.json."
            ) from error


def _measure(bold: np.ndarray) -> tuple[dict[str, float], np.ndarray]:
    """The measures of one recording and its connectivity [p, p]; NaN where there is no signal."""
    n_parcels, n_trs = bold.shape
    means = bold.mean(axis=1, dtype=np.float64)
    centred = bold - means[:, None]
    sds = np.sqrt((centred**2).mean(axis=1))
    present = sds > _FLAT * max(float(sds.max(initial=0.0)), float(np.abs(means).max(initial=0.0)))
    connectivity = np.full((n_parcels, n_parcels), np.nan)
    measures = dict.fromkeys(MEASURES, math.nan) | {"flat": float(1.0 - present.mean())}
    n = int(present.sum())
    if n < 2 or n_trs <= 4:
        return measures, connectivity
    means, sds = means[present], sds[present]
    z = centred[present] / sds[:, None]
    r = z @ z.T / n_trs
    connectivity[np.ix_(present, present)] = r
    low, middle, high = (float(value) for value in np.percentile(sds, [25, 50, 75]))
    within, between = float((sds**2).mean()), float(means.var())
    measures |= {
        "mean": float(means.mean()) / math.sqrt(within + between),
        "log_sd": 0.5 * math.log(within),
        "level_share": between / (within + between),
        "sd_variation": (high - low) / middle,
        "lag1": float((z[:, 1:] * z[:, :-1]).sum() / (n * n_trs)),
        "lag4": float((z[:, 4:] * z[:, :-4]).sum() / (n * n_trs)),
        "fc_mean": float((r.sum() - n) / (n * (n - 1))),
    }
    return measures, connectivity


def _average(sums: np.ndarray) -> np.ndarray:
    total, count = sums
    return np.where(count > 0, total / np.maximum(count, 1), np.nan).astype(np.float32)


def _noise(halves: list[np.ndarray], n_recordings: int) -> float:
    """`connectivity_noise` from the connectivity of both halves of `n_recordings`.

    Two averages of n / 2 recordings correlate as 1 / (1 + noise / (n / 2)).
    """
    if len(halves) < 2:
        return math.nan
    r = _correlation(_pairs(halves[0]), _pairs(halves[1]))
    return (1.0 / r - 1.0) * n_recordings / 2.0 if r > 0.0 else math.nan


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    both = np.isfinite(a) & np.isfinite(b)
    a, b = a[both].astype(np.float64), b[both].astype(np.float64)
    if len(a) < 2 or not (a.std() > 0 and b.std() > 0):
        return math.nan
    return float(np.corrcoef(a, b)[0, 1])


def _pairs(matrix: np.ndarray) -> np.ndarray:
    return matrix[np.triu_indices(len(matrix), k=1)]


def _matrix(text: str) -> np.ndarray:
    """The connectivity [p, p] of `to_dict`'s text."""
    steps = np.frombuffer(base64.b64decode(text, validate=True), dtype=np.int8)
    n_parcels = round((1.0 + math.sqrt(1.0 + 8.0 * len(steps))) / 2.0)
    if n_parcels * (n_parcels - 1) // 2 != len(steps):
        raise ValueError(f"{len(steps)} pairs are of no number of parcels")
    values = np.where(steps == _UNKNOWN, np.nan, steps / np.float32(_STEPS))
    matrix = np.zeros((n_parcels, n_parcels), dtype=np.float32)
    matrix[np.triu_indices(n_parcels, k=1)] = values
    return matrix + matrix.T + np.eye(n_parcels, dtype=np.float32)


def _rounded(value: float) -> float | None:
    return float(f"{value:.5g}") if math.isfinite(value) else None


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)
