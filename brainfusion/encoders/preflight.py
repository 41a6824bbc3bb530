"""Does a cohort look like what an encoder was trained on? Asked before features are written.

Both sides are measured after the checkpoint's conditioning (`InputStatistics`), because that is
what reaches the encoder. A measure is unusual when it differs from training by more than

    spread * (1.5 + 3 / sqrt(n cohort) + 3 / sqrt(n training - 3)),

spread being its standard deviation over training recordings: one and a half of them for a
systematic difference, and three standard errors of either mean, so that another sample of the same
people stays silent (few training recordings tell the spread badly, hence the 3). Differences below
`SMALLEST` are never worth a word.

Connectivity is compared pair by pair. Noise lowers the correlation of two groups; how far is known
from two halves of the training recordings (`InputStatistics.expected_likeness`). Below `UNLIKE` of
that, rows are taken for other parcels than their names say; where a shift of rows lifts it above
that, and by `SHIFT_GAIN` at least, the shift is named. Groups of so few recordings that less than
`TOO_NOISY` is expected are not judged by it.
"""

import math
from collections.abc import Sequence

import numpy as np

from brainfusion.data.cohort import Cohort
from brainfusion.data.input_statistics import MEASURES, InputStatistics
from brainfusion.encoders.checkpoints import Pretrained

N_MEASURED = 32
"""Recordings of the cohort that are measured, at most."""
FEWEST = 8
"""Training recordings below which their spread says nothing."""
SMALLEST = {
    "mean": 0.1,
    "log_sd": 0.1,
    "level_share": 0.05,
    "sd_variation": 0.1,
    "lag1": 0.05,
    "lag4": 0.05,
    "fc_mean": 0.05,
    "flat": 0.05,
}
TR_TOLERANCE = 0.05
UNLIKE, SHIFT_GAIN, TOO_NOISY = 0.5, 0.05, 0.3
_SHIFTS = (-3, -2, -1, 1, 2, 3)
_TEXTS = {
    "mean": ("the mean of all values, in standard deviations,", "another baseline or unit"),
    "log_sd": ("the standard deviation over time", "another unit, or data scaled before"),
    "level_share": (
        "the share of the variance that lies between the parcels' time means",
        "time means removed in one and kept in the other",
    ),
    "sd_variation": (
        "the variation of standard deviations between parcels",
        "parcels scaled one by one in one and not in the other",
    ),
    "lag1": (
        "the correlation of a frame with the next",
        "another TR than stated, or temporal filtering",
    ),
    "lag4": (
        "the correlation of a frame with the fourth after it",
        "another TR than stated, or temporal filtering",
    ),
    "fc_mean": (
        "the mean correlation between parcels",
        "the global signal removed in one and left in the other",
    ),
    "flat": ("the share of parcels without signal", "missing parcels"),
}


def preflight(
    pretrained: Pretrained, cohort: Cohort, rows: Sequence[int] | np.ndarray, order: np.ndarray
) -> list[str]:
    """Compare a cohort with the recordings that a checkpoint was trained on.

    Args:
        pretrained: An encoder with its conditioning.
        cohort: What is about to be embedded.
        rows: Index rows of its recordings; `N_MEASURED` of them are read.
        order: Row of a recording for each parcel of the checkpoint, -1 where it has none.

    Returns:
        Sentences that warn, each with the cohort's number and training's; none when all is usual.

    Raises:
        UserError: There are no rows, or a TR is not known that the conditioning needs.
    """
    conditioning = pretrained.conditioning
    trained = conditioning.statistics
    if trained is None:
        return [
            "the checkpoint holds no statistics of its training recordings, so the cohort's are "
            "not compared with them."
        ]
    seen = conditioning.measure(cohort.recordings, rows, order=order, n_at_most=N_MEASURED)
    return compare(seen, trained)


def compare(seen: InputStatistics, trained: InputStatistics) -> list[str]:
    """The sentences of `preflight` from the two sides' statistics."""
    found = _compare_tr(seen.tr_s, trained.tr_s)
    if trained.n_recordings < FEWEST:
        return [
            *found,
            f"the checkpoint was trained on {trained.n_recordings} recordings, under the {FEWEST} "
            "that would tell what is usual, so the cohort's are not compared with them.",
        ]
    return found + _compare_measures(seen, trained) + _compare_connectivity(seen, trained)


def _compare_tr(seen: float | None, trained: float | None) -> list[str]:
    if trained is None or (seen is not None and abs(seen / trained - 1.0) <= TR_TOLERANCE):
        return []
    own = "has a TR that is not known" if seen is None else f"has a TR of {seen:.4g} s"
    return [
        f"the cohort {own}, but the encoder was trained at {trained:.4g} s and does not resample: "
        "its features see other frequencies."
    ]


def _compare_measures(seen: InputStatistics, trained: InputStatistics) -> list[str]:
    errors = 3.0 / math.sqrt(seen.n_recordings) + 3.0 / math.sqrt(trained.n_recordings - 3)
    found = []
    for name in MEASURES:
        own, usual, spread = seen.mean[name], trained.mean[name], trained.spread[name]
        if not all(map(math.isfinite, (own, usual, spread))):
            continue
        if abs(own - usual) <= max(SMALLEST[name], spread * (1.5 + errors)):
            continue
        what, reason = _TEXTS[name]
        numbers = [own, usual, usual - 2.0 * spread, usual + 2.0 * spread]
        texts = [_text(name, value) for value in numbers]
        found.append(
            f"{what} is {texts[0]} in this cohort but {texts[1]} in training (most recordings "
            f"{texts[2]} to {texts[3]}): {reason}?"
        )
    return found


def _text(name: str, value: float) -> str:
    """A measure as a number that people know."""
    return f"{math.exp(value):.3g}" if name == "log_sd" else f"{round(value, 3) + 0.0:g}"


def _compare_connectivity(seen: InputStatistics, trained: InputStatistics) -> list[str]:
    expected = trained.expected_likeness(seen.n_recordings)
    r = trained.likeness(seen)
    if not (math.isfinite(r) and expected >= TOO_NOISY):
        return []
    shifted = {shift: trained.likeness(seen, shift=shift) for shift in _SHIFTS}
    best = max(shifted, key=lambda shift: np.nan_to_num(shifted[shift], nan=-1.0))
    if shifted[best] > max(r + SHIFT_GAIN, UNLIKE * expected):
        return [
            f"connectivity correlates {r:.2f} with that of training as parcels are named, but "
            f"{shifted[best]:.2f} if each row is the parcel {abs(best)} "
            f"{'before' if best < 0 else 'after'} its name: is the list of names that the cohort "
            "was imported with off by as much?"
        ]
    if r < UNLIKE * expected:
        return [
            f"connectivity correlates {r:.2f} with that of training, where {expected:.2f} is "
            "usual for as many recordings: are parcels named in the order of the data?"
        ]
    return []
