"""What becomes of a raw recording before an encoder sees it: an object that checkpoints keep.

One order for all encoders: the whole recording is standardised at its own TR, then resampled to the
encoder's TR; windows are cut last. Two things are done elsewhere, each in one place: a cohort's
parcels are put into the checkpoint's order by name before `prepare` (`match_parcels` in
`brainfusion.data.atlas`), and the image-shaped BrainLM sorts rows by the Y coordinate in its own
`forward` and `encode`, from the coordinates of the atlas, which is in the checkpoint too.

Shape legend: p parcels, t TRs.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from brainfusion.data.input_statistics import InputStatistics
from brainfusion.data.recordings import Recordings
from brainfusion.data.resample import METHODS, Resampling, resample, resampled_length, same_tr
from brainfusion.data.standardise import DIVISORS, Standardiser
from brainfusion.runtime.errors import UserError

__all__ = ["PUBLISHED", "InputConditioning", "InputStatistics", "PublishedInput"]

N_MEASURED = 64
"""Recordings that statistics are taken from, at most."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PublishedInput:
    """How the inputs of published weights were made, as far as that is known."""

    tr_s: float
    """Seconds between frames."""
    resampling: Resampling
    """How the benchmark's wrappers get there."""
    standardiser: str
    """One of `brainfusion.data.standardise.KINDS`."""
    divide_by: float = 1.0
    """A constant that scales the result."""


PUBLISHED: dict[str, PublishedInput] = {
    "brainlm": PublishedInput(tr_s=0.735, resampling="linear", standardiser="brainlm-robust"),
    "brainlm-image": PublishedInput(
        tr_s=0.735,
        resampling="linear",
        standardiser="brainlm-robust",
        divide_by=DIVISORS["brainlm-image"],
    ),
    "brainjepa": PublishedInput(tr_s=2.0, resampling="nearest", standardiser="recording-zscore"),
}
"""BrainLM 5M and 13M; BrainLM 111M and 650M; Brain-JEPA. Medians and IQRs of the data that BrainLM
was trained on were never published, so they are fitted on the cohort that is embedded. Brain-JEPA
was pretrained at 2.2 s (every third frame of 0.735 s) and is evaluated by its authors, and by the
benchmark, at 2 s."""


@dataclass(frozen=True, kw_only=True, eq=False)
class InputConditioning:
    """From a raw recording to what the encoder was trained on."""

    standardiser: Standardiser
    tr_s: float | None
    """The encoder's TR in seconds; None: recordings keep their own."""
    resampling: Resampling
    """How a recording gets to that TR."""
    statistics: InputStatistics | None
    """Of the training recordings after conditioning; None where nobody has them."""

    def prepare(self, bold: np.ndarray, *, tr_s: float | None) -> np.ndarray:
        """Standardise a whole recording, then resample it.

        Args:
            bold: [..., p, t] raw, in the checkpoint's parcel order; a missing parcel is NaN.
            tr_s: Seconds between its frames; None or NaN where that is not known.

        Returns:
            float32 [..., p, t'] without NaN, t' of `length`.

        Raises:
            UserError: The TR is not known but the encoder has one, or another number of parcels.
        """
        own = self._known(tr_s)
        scaled = self.standardiser.transform(bold)
        if self.tr_s is None or same_tr(own, self.tr_s):
            return scaled
        return resample(scaled, tr_s=own, to_tr_s=self.tr_s, method=self.resampling)

    def length(self, n_trs: int, *, tr_s: float | None) -> int:
        """Frames that `prepare` makes of a recording of `n_trs`.

        Raises:
            UserError: The TR is not known but the encoder has one.
        """
        own = self._known(tr_s)
        if self.tr_s is None:
            return n_trs
        return resampled_length(n_trs, tr_s=own, to_tr_s=self.tr_s)

    def measure(
        self,
        recordings: Recordings,
        rows: Sequence[int] | np.ndarray,
        *,
        order: np.ndarray | None = None,
        n_at_most: int = N_MEASURED,
    ) -> InputStatistics:
        """Statistics of recordings after conditioning.

        Args:
            recordings: Where to read.
            rows: Index rows; evenly thinned to `n_at_most`.
            order: Row of a recording for each parcel of the checkpoint, -1 where it has none; the
                recordings' own order if omitted.
            n_at_most: Recordings measured.

        Raises:
            UserError: There are no rows, or as `prepare` says.
        """
        if not len(rows):
            raise UserError(
                "there is no recording to measure: expected those that are embedded or trained on; "
                "check that its people have recordings."
            )
        chosen = np.linspace(0, len(rows) - 1, min(len(rows), n_at_most)).round().astype(np.int64)
        rows = np.asarray(rows, dtype=np.int64)[chosen]
        trs_s = recordings.index["tr_s"].to_numpy()[rows]

        def conditioned() -> Iterator[np.ndarray]:
            for row, tr_s in zip(rows, trs_s, strict=True):
                bold = recordings.read(int(row))
                if order is not None:
                    bold = np.where(order[:, None] >= 0, bold[order], np.float32(np.nan))
                yield self.prepare(bold, tr_s=float(tr_s))

        known = trs_s[np.isfinite(trs_s)]
        own = float(np.median(known)) if len(known) else None
        tr_s = own if self.tr_s is None else self.tr_s
        return InputStatistics.of(conditioned(), n_recordings=len(rows), tr_s=tr_s)

    def to_dict(self) -> dict[str, Any]:
        """The JSON form, the key `conditioning` of a checkpoint's state.json."""
        return {
            "standardiser": self.standardiser.to_dict(),
            "tr_s": self.tr_s,
            "resampling": self.resampling,
            "statistics": None if self.statistics is None else self.statistics.to_dict(),
        }

    @classmethod
    def from_dict(cls, values: Any) -> "InputConditioning":
        """The inverse of `to_dict`.

        Raises:
            UserError: Keys are missing or unknown, or a value cannot be.
        """
        keys = [field.name for field in fields(cls)]
        if not isinstance(values, dict) or set(values) != set(keys):
            raise UserError(
                f"conditioning: expected the keys {', '.join(keys)}: restore the checkpoint's "
                "state.json."
            )
        tr_s, resampling, statistics = (values[key] for key in keys[1:])
        known = tr_s is None or (isinstance(tr_s, int | float) and math.isfinite(tr_s) and tr_s > 0)
        if resampling not in METHODS or not known:
            raise UserError(
                f"conditioning: tr_s={tr_s} with resampling '{resampling}': expected seconds above "
                f"zero or null, and one of {', '.join(METHODS)}: restore the checkpoint's "
                "state.json."
            )
        standardiser = Standardiser.from_dict(values["standardiser"])
        statistics = None if statistics is None else InputStatistics.from_dict(statistics)
        if statistics is not None and statistics.n_parcels != standardiser.n_parcels:
            raise UserError(
                f"conditioning: statistics of {statistics.n_parcels} parcels beside a standardiser "
                f"of {standardiser.n_parcels}: restore the checkpoint's state.json."
            )
        return cls(
            standardiser=standardiser,
            tr_s=None if tr_s is None else float(tr_s),
            resampling=resampling,
            statistics=statistics,
        )

    def _known(self, tr_s: float | None) -> float:
        """A recording's TR; NaN where nobody asks for it."""
        if tr_s is not None and math.isfinite(tr_s):
            return float(tr_s)
        if self.tr_s is None:
            return math.nan
        raise UserError(
            f"a TR that is not known: recordings are resampled to the encoder's {self.tr_s:g} s, "
            "and the cohort does not say theirs; import it again with --tr-s, the seconds between "
            "frames."
        )
