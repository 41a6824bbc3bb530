"""From a sample of brainmarks to the input of an encoder.

A sample is `bold` [frames, parcels], z-scored a parcel and often in half precision, `mean` and
`std` [1, parcels] that undo it, and `tr` in seconds. Conditioning is that of `brainfusion embed`
(`brainfusion.data.conditioning`), so that features here and there agree.

Shape legend: w windows, p parcels, t TRs.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import numpy as np
import polars as pl
import torch
from jaxtyping import Float

from brainfusion.data.conditioning import InputConditioning, PublishedInput
from brainfusion.data.recordings import Recordings
from brainfusion.data.standardise import FITTED, Standardiser
from brainfusion.data.windows import window_starts
from brainfusion.runtime.errors import UserError
from brainfusion.runtime.logs import say

SPACES = {
    "schaefer400": 400,
    "a424": 424,
    "schaefer400_tians3": 450,
    "schaefer400_tians3_buckner7": 457,
}
"""brainmarks' parcellated spaces and their parcels."""

Sample = Mapping[str, Any]


class EncoderTransform:
    """From a sample of brainmarks to windows of conditioned BOLD.

    Args:
        n_parcels: Parcels of the encoder's space.
        window_trs: TRs that the encoder sees at once.
        published: How to condition; statistics, if it needs any, come from `fit`.
        conditioning: Of one of our checkpoints, in place of `published`; `fit` leaves it as it is.
        n_windows: None takes the windows that cover the recording, the last flush with its end, as
            `encode` does: samples of one batch must then be equally long. A number takes so many,
            evenly spread from the first frame on, whatever the length.
        row_order: Where the encoder wants its rows in another order than the space's.
    """

    def __init__(
        self,
        *,
        n_parcels: int,
        window_trs: int,
        published: PublishedInput | None = None,
        conditioning: InputConditioning | None = None,
        n_windows: int | None = None,
        row_order: np.ndarray | None = None,
    ) -> None:
        assert (published is None) != (conditioning is None)
        if n_windows is not None and n_windows < 1:
            raise UserError(f"n_windows={n_windows}: expected 1 or more, or null for all.")
        self.n_parcels, self.window_trs, self.n_windows = n_parcels, window_trs, n_windows
        self.published, self.conditioning, self.row_order = published, conditioning, row_order
        self._said = False
        if published is not None and published.standardiser not in FITTED:
            unfitted = Standardiser(
                kind=published.standardiser,
                n_parcels=n_parcels,
                cohort="none",
                n_people=0,
                n_recordings=0,
                divide_by=published.divide_by,
            )
            self.conditioning = _conditioning(published, unfitted)

    def fit(self, train_dataset: Iterable[Sample]) -> None:
        """Fit medians and IQRs on the training split, and on nothing else.

        Raises:
            UserError: There is no sample, or one of another space.
        """
        if self.published is None or self.published.standardiser not in FITTED:
            return  # nothing to fit: a checkpoint's own statistics, or none at all
        training = _Training(train_dataset, self.n_parcels)
        standardiser = Standardiser.fit(
            self.published.standardiser,
            cast(Recordings, training),
            np.arange(len(training)),
            cohort="brainmarks' training split",
            divide_by=self.published.divide_by,
        )
        say(f"scaling ({standardiser.kind}) fitted on {len(training)} training samples.")
        self.conditioning = _conditioning(self.published, standardiser)

    def __call__(self, sample: Sample) -> dict[str, Any]:
        """The sample with `bold` float32 [w, p, t] in place of [frames, p].

        Raises:
            UserError: `fit` is due, a key is missing, or the sample is of another space.
        """
        if self.conditioning is None:
            raise UserError(
                "the transform has no medians and IQRs yet: call its fit() with the training split "
                "first, as brainmarks does."
            )
        bold = raw_bold(sample, self.n_parcels)
        bold = self.conditioning.prepare(bold, tr_s=_value(sample, "tr"))
        if (n_trs := bold.shape[1]) < self.window_trs:
            if not self._said:
                say(
                    f"a sample has {n_trs} TRs where a window takes {self.window_trs}: what short "
                    "samples lack is filled with each parcel's mean."
                )
                self._said = True
            tail = bold.mean(axis=1, keepdims=True)
            bold = np.concatenate([bold, tail.repeat(self.window_trs - n_trs, axis=1)], axis=1)
        windows = np.stack([bold[:, i : i + self.window_trs] for i in self._starts(bold.shape[1])])
        if self.row_order is not None:
            windows = windows[:, self.row_order]
        return {**sample, "bold": torch.from_numpy(np.ascontiguousarray(windows))}

    def _starts(self, n_trs: int) -> list[int]:
        if self.n_windows is None:
            return window_starts(n_trs, self.window_trs).tolist()
        last = n_trs - self.window_trs
        return np.linspace(0, last, self.n_windows).round().astype(int).tolist()


def space_of(n_parcels: int) -> str:
    """The space of brainmarks that has so many parcels.

    Raises:
        UserError: There is none.
    """
    for space, size in SPACES.items():
        if size == n_parcels:
            return space
    known = ", ".join(f"{space} ({size})" for space, size in SPACES.items())
    raise UserError(
        f"brainmarks has no parcellation with the {n_parcels} parcels of this encoder, only "
        f"{known}: use weights that were trained on one of those."
    )


def raw_bold(sample: Sample, n_parcels: int) -> Float[np.ndarray, "p t"]:
    """Undo brainmarks' z-scoring: float32, parcels first; a parcel without data (std 0) is NaN.

    In single precision: half would round a BOLD mean of 10,000 to a multiple of 8.

    Raises:
        UserError: A key is missing, or the sample is of another space.
    """
    bold, mean, std = (
        np.asarray(_entry(sample, key), dtype=np.float32) for key in ("bold", "mean", "std")
    )
    if bold.ndim != 2 or bold.shape[1] != n_parcels or not len(bold):
        raise UserError(
            f"a sample's bold has shape {list(bold.shape)}, expected [frames, {n_parcels}]: take "
            f"the data set in the space '{space_of(n_parcels)}'."
        )
    std = std.reshape(1, n_parcels)
    raw = np.where(std != 0, bold * std + mean.reshape(1, n_parcels), np.float32(np.nan))
    return np.ascontiguousarray(raw.T)


class _Training:
    """The training split as `Standardiser.fit` reads recordings: one at a time, in one pass."""

    def __init__(self, samples: Iterable[Sample], n_parcels: int) -> None:
        lazy = hasattr(samples, "__getitem__") and hasattr(samples, "__len__")
        self._samples = cast(Sequence[Sample], samples) if lazy else list(samples)
        self._people: dict[int, str] = {}
        self.n_parcels = n_parcels

    def __len__(self) -> int:
        return len(self._samples)

    def read(self, row: int) -> np.ndarray:
        """Sample `row` as raw BOLD [p, t]."""
        sample = self._samples[row]
        self._people[row] = str(sample.get("sub", row))
        return raw_bold(sample, self.n_parcels)

    @property
    def index(self) -> pl.DataFrame:
        """Whose the samples are; one that was not read, or says nothing, counts for itself."""
        return pl.DataFrame({"subject": [self._people.get(i, str(i)) for i in range(len(self))]})


def _conditioning(published: PublishedInput, standardiser: Standardiser) -> InputConditioning:
    return InputConditioning(
        standardiser=standardiser,
        tr_s=published.tr_s,
        resampling=published.resampling,
        statistics=None,
    )


def _entry(sample: Sample, key: str) -> Any:
    if key not in sample:
        raise UserError(
            f"a sample has no '{key}': expected bold, mean, std and tr, as brainmarks' data sets "
            "have them."
        )
    return sample[key]


def _value(sample: Sample, key: str) -> float:
    return float(_entry(sample, key))
