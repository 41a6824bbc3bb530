"""What a pretraining run reads: recordings that are long enough, conditioned, cut into windows.

Shape legend: b windows, p parcels, t TRs of a window.
"""

import dataclasses
import functools
from dataclasses import dataclass, field

import numpy as np

from brainfusion.data.cohort import Cohort
from brainfusion.data.conditioning import InputConditioning
from brainfusion.data.recordings import Recordings
from brainfusion.data.resample import resampled_length, same_tr
from brainfusion.data.standardise import Frames, Scale, Standardiser, check_kind
from brainfusion.data.windows import cut_window, span_of, training_windows, window_frames
from brainfusion.encoders.pretrain_config import DataConfig, PretrainConfig
from brainfusion.runtime.distributed import Ranks
from brainfusion.runtime.errors import UserError
from brainfusion.runtime.logs import say


@dataclass(frozen=True, kw_only=True, eq=False)
class PretrainInputs:
    """Windows of training and validation people; batches are pure in (seed, step, rank)."""

    recordings: Recordings
    data: DataConfig
    window_trs: int
    conditioning: InputConditioning
    """What the checkpoint keeps: its TR is that of a window's frames."""
    train_rows: list[int]
    validation_rows: list[int]
    _scales: dict[int, Scale] = field(default_factory=dict, repr=False)
    """What recordings that were read before are scaled by: a further window costs its own frames
    alone. Threads may fill it at once: they would write the same."""

    @classmethod
    def fit(cls, settings: PretrainConfig, cohort: Cohort) -> "PretrainInputs":
        """Choose recordings and fit the conditioning on those of training people.

        Raises:
            UserError: An unknown standardiser, a TR that is needed and not known, too few
                recordings that are long enough, or data that cannot be scaled as asked.
        """
        data, recordings = settings.data, cohort.recordings
        check_kind(data.standardiser)
        tr_s = _common_tr(cohort, data)
        train_rows, validation_rows = _rows(settings, cohort)
        window_trs = settings.encoder.n_trs
        if data.frames == "brainjepa":
            assert tr_s is not None
            tr_s *= (span_of(window_trs, data.frames) - 1) / max(window_trs - 1, 1)
        conditioning = InputConditioning(
            standardiser=Standardiser.fit(
                data.standardiser,
                recordings,
                train_rows,
                cohort=cohort.name,
                divide_by=data.divide_by,
            ),
            tr_s=tr_s,
            resampling="nearest" if data.frames == "brainjepa" else data.resampling,
            statistics=None,
        )
        statistics = conditioning.measure(recordings, train_rows)
        return cls(
            recordings=recordings,
            data=data,
            window_trs=window_trs,
            conditioning=dataclasses.replace(conditioning, statistics=statistics),
            train_rows=train_rows,
            validation_rows=validation_rows,
        )

    def batch(self, batch_size: int, *, seed: int, step: int, ranks: Ranks) -> np.ndarray:
        """This rank's share of the step's windows, float32 [b, p, t]: every `world_size`-th.

        Args:
            batch_size: Windows of all ranks together.
            seed: Another seed, another order.
            step: The optimiser step, from 0.
            ranks: This process among all.
        """
        return self._windows(batch_size, seed=seed, step=step, ranks=ranks)

    def _windows(
        self,
        batch_size: int,
        *,
        seed: int,
        step: int,
        ranks: Ranks,
        rows: list[int] | None = None,
    ) -> np.ndarray:
        """This rank's windows; index rows of their recordings are appended to `rows`."""

        def whole(bold: np.ndarray, row: int) -> np.ndarray:
            if rows is not None:
                rows.append(row)
            return self._prepared(bold, row)

        def part(bold: np.ndarray, row: int, frames: Frames) -> np.ndarray:
            if rows is not None:
                rows.append(row)
            return self._scaled(bold, row, frames)

        return training_windows(
            self.recordings,
            self.train_rows,
            window_trs=self.window_trs,
            batch_size=batch_size // ranks.world_size,
            seed=seed,
            step=step,
            rank=ranks.rank,
            world_size=ranks.world_size,
            transform=whole if self._is_resampled else None,
            crop=None if self._is_resampled else part,
            frames=self.data.frames,
        )

    def rows_of(
        self, batch_size: int, seed: int, step: int, ranks: Ranks
    ) -> tuple[list[int], list[int]]:
        """Index rows of this rank's recordings in a step's batch, and those that are not finite.

        The batch is read again: this is for the error that names them.
        """
        rows: list[int] = []
        windows = self._windows(batch_size, seed=seed, step=step, ranks=ranks, rows=rows)
        bad = [not np.isfinite(window).all() for window in windows]
        return rows, [row for row, is_bad in zip(rows, bad, strict=True) if is_bad]

    def first_window(self, row: int) -> np.ndarray:
        """The window [p, t] with which a recording begins."""
        bold = self.recordings.read(row)
        if self._is_resampled:
            return cut_window(self._prepared(bold, row), self.window_trs, share=0.0)
        frames = window_frames(bold.shape[1], self.window_trs, share=0.0, frames=self.data.frames)
        return self._scaled(bold, row, frames)

    @functools.cached_property
    def _is_resampled(self) -> bool:
        """Whether any recording has another TR than the one that is asked for."""
        to_tr_s = self.data.tr_s
        own = self.recordings.index["tr_s"].unique()
        return to_tr_s is not None and not all(same_tr(tr_s, to_tr_s) for tr_s in own)

    def _prepared(self, bold: np.ndarray, row: int) -> np.ndarray:
        """A whole recording at the encoder's TR, ready to be cut."""
        return self.conditioning.prepare(bold, tr_s=self.recordings.index["tr_s"][row])

    def _scaled(self, bold: np.ndarray, row: int, frames: Frames) -> np.ndarray:
        """These frames of a recording at its own TR: to the bit what the whole would have there."""
        standardiser = self.conditioning.standardiser
        scale = self._scales.get(row)
        if scale is None:
            scale = self._scales[row] = standardiser.scale_of(bold)
        return standardiser.transform(bold, part=frames, scale=scale)


def _common_tr(cohort: Cohort, data: DataConfig) -> float | None:
    """The TR that recordings are brought to, or have in common; None where they have none."""
    values = cohort.recordings.index["tr_s"]
    n_unknown = values.null_count() + int(values.is_nan().sum())
    known = values.drop_nulls().drop_nans()
    low, high = float(known.min() or 0.0), float(known.max() or 0.0)  # type: ignore[arg-type]
    for_what = f"tr_s={data.tr_s:g}" if data.tr_s is not None else f"frames='{data.frames}'"
    if n_unknown and (data.tr_s is not None or data.frames == "brainjepa"):
        raise UserError(
            f"{n_unknown} of {len(values)} recordings of the cohort '{cohort.name}' have a TR that "
            f"is not known, which {for_what} needs: import them again with --tr-s, the seconds "
            "between frames."
        )
    if data.tr_s is not None:
        if not (same_tr(low, data.tr_s) and same_tr(high, data.tr_s)):
            own = f"{low:g} s" if same_tr(low, high) else f"{low:g} to {high:g} s"
            say(
                f"recordings are resampled from {own} to {data.tr_s:g} s ({data.resampling}, no "
                "anti-alias filter)."
            )
        return data.tr_s
    if not n_unknown and same_tr(low, high):
        return float(known.median())  # type: ignore[arg-type]
    what = f"have TRs from {low:g} to {high:g} s" if len(known) else "have no TR"
    if len(known) and n_unknown:
        what = f"have a TR that is not known in {n_unknown} of {len(values)} cases"
    if data.frames == "brainjepa":
        raise UserError(
            f"recordings of the cohort '{cohort.name}' {what}, but {for_what} thins out those of "
            "one TR: give --tr-s and leave out --frames, or train on recordings of one TR."
        )
    say(f"recordings {what}: each keeps its own; --tr-s resamples them to one.")
    return None


def _rows(settings: PretrainConfig, cohort: Cohort) -> tuple[list[int], list[int]]:
    """Recordings of training and of validation people that are long enough."""
    data, index = settings.data, cohort.recordings.index
    span = span_of(settings.encoder.n_trs, data.frames)
    at = "" if data.tr_s is None else f" at {data.tr_s:g} s"
    lengths = index["n_trs"].to_numpy()
    if data.tr_s is not None:
        lengths = np.array(
            [
                resampled_length(n_trs, tr_s=tr_s, to_tr_s=data.tr_s)
                for n_trs, tr_s in index.select("n_trs", "tr_s").iter_rows()
            ]
        )
    long_enough = lengths >= span
    if short := int((~long_enough).sum()):
        say(f"{short} of {len(index)} recordings are shorter than {span} TRs{at} and are left out.")
    labels = np.array(cohort.splits().label(index["subject"].to_list()))
    rows = [
        np.flatnonzero((labels == side) & long_enough).tolist() for side in ("train", "validation")
    ]
    if not all(rows):
        raise UserError(
            f"the cohort '{cohort.name}' has {len(rows[0])} training and {len(rows[1])} validation "
            f"recordings of at least {span} TRs{at}: both are needed; use a smaller --n-trs."
        )
    return rows[0], rows[1]
