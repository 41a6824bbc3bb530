"""Windows are crops of recordings in time.

Shape legend: b windows, p parcels, t TRs of a window.
"""

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np

from brainfusion.data.recordings import Recordings
from brainfusion.data.resample import sample_frames
from brainfusion.runtime.errors import UserError

Frames = Literal["consecutive", "brainjepa"]
_BRAINJEPA_SPAN = 3  # frames that its pretraining spreads one over: 160 over 480


def window_starts(n_trs: int, window_trs: int, *, stride: int | None = None) -> np.ndarray:
    """First TRs (int64, ascending) of windows that cover a recording, the last flush with its end.

    Args:
        n_trs: Length of the recording.
        window_trs: Length of a window.
        stride: TRs between starts, at most `window_trs` so that no TR is left out; `window_trs`
            if omitted. The last step may be shorter.

    Raises:
        UserError: The recording is shorter than a window, or the stride leaves gaps.
    """
    stride = window_trs if stride is None else stride
    if window_trs < 1 or not 1 <= stride <= window_trs:
        raise UserError(
            f"window_trs={window_trs} with stride={stride}: expected a window of at least 1 TR and "
            "a stride between 1 and the window, so that no TR is left out."
        )
    if n_trs < window_trs:
        raise UserError(
            f"a recording has {n_trs} TRs but a window takes {window_trs}: leave out short "
            "recordings, or use a model with a shorter window."
        )
    last = n_trs - window_trs
    starts = np.arange(0, last + 1, stride, dtype=np.int64)
    return starts if starts[-1] == last else np.append(starts, np.int64(last))


def training_windows(
    recordings: Recordings,
    rows: Sequence[int] | np.ndarray,
    *,
    window_trs: int,
    batch_size: int,
    seed: int,
    step: int,
    rank: int = 0,
    world_size: int = 1,
    transform: Callable[[np.ndarray, int], np.ndarray] | None = None,
    crop: Callable[[np.ndarray, int, slice | np.ndarray], np.ndarray] | None = None,
    frames: Frames = "consecutive",
) -> np.ndarray:
    """One training batch, a pure function of its arguments: a resumed run needs no state.

    Recordings are dealt without replacement, in an order drawn anew each time all were seen; starts
    are uniform over the recording, its last window included (as in BrainLM's pretraining). The
    global batch of `batch_size * world_size` windows does not depend on how it is shared out:
    rank r takes items r, r + world_size, ..., so that W ranks together see what one process with a
    W times larger batch sees.

    Args:
        recordings: Where to read.
        rows: Index rows of the training recordings.
        window_trs: Length of a window.
        batch_size: Windows for this rank.
        seed: Another seed, another order.
        step: The optimiser step, from 0.
        rank: This process.
        world_size: Number of processes.
        transform: Given the whole recording [p, t] and its row before it is cropped, as
            recordings are conditioned when they are embedded: a window's own mean and spread are
            not the recording's. It may change the length.
        crop: In place of `transform` where the length stays: given the recording, its row and the
            window's frames, returns those frames of what `transform` would. The rest of the
            recording is not made.
        frames: Which of a recording's frames a window takes, as `cut_window`.

    Returns:
        float32 [b, p, t]; missing parcels are NaN unless `transform` fills them.

    Raises:
        UserError: There are no rows, or a recording is shorter than a window.
    """
    rows = np.asarray(rows, dtype=np.int64)
    span = span_of(window_trs, frames)
    check_lengths(recordings, rows, span if transform is None else 1)
    assert transform is None or crop is None
    n_global = batch_size * world_size
    items = np.arange(step * n_global, (step + 1) * n_global)
    dealt = _deal(rows, items, seed)
    share = np.random.default_rng([seed, step, 1]).random(n_global)
    batch = []
    for item in range(rank, n_global, world_size):
        row = int(dealt[item])
        bold = recordings.read(row)
        bold = bold if transform is None else transform(bold, row)
        part = window_frames(bold.shape[1], window_trs, share=share[item], frames=frames)
        batch.append(bold[:, part] if crop is None else crop(bold, row, part))
    return np.stack(batch)


def cut_window(
    bold: np.ndarray, window_trs: int, *, share: float, frames: Frames = "consecutive"
) -> np.ndarray:
    """One window of a recording.

    Args:
        bold: [p, t], ready for the encoder.
        window_trs: Frames of the window.
        share: Where it lies among all that fit, from 0 (the first) to below 1 (the last).
        frames: "consecutive", or "brainjepa": frames spread over three times as many, by the rule
            of Brain-JEPA's pretraining (`sample_frames`).

    Returns:
        [p, window_trs] of the same type.

    Raises:
        UserError: The recording is too short.
    """
    return bold[:, window_frames(bold.shape[1], window_trs, share=share, frames=frames)]


def window_frames(
    n_trs: int, window_trs: int, *, share: float, frames: Frames = "consecutive"
) -> slice | np.ndarray:
    """The frames of a recording of `n_trs` that `cut_window` takes: a range, or positions.

    Raises:
        UserError: The recording is too short.
    """
    span = span_of(window_trs, frames)
    n_left = n_trs - span
    if n_left < 0:
        raise UserError(
            f"a recording has {n_trs} TRs but a window takes {span}: leave out short "
            "recordings, or use a model with a shorter window."
        )
    if frames == "brainjepa":
        start = share * n_left
        return sample_frames(n_trs, n_frames=window_trs, span=span, start=start)
    start = int(share * (n_left + 1))
    return slice(start, start + window_trs)


def span_of(window_trs: int, frames: Frames) -> int:
    """Frames of a recording that a window of `window_trs` spans."""
    return window_trs * _BRAINJEPA_SPAN if frames == "brainjepa" else window_trs


def check_lengths(recordings: Recordings, rows: np.ndarray, window_trs: int) -> None:
    """Check that there are recordings and that each holds a window.

    Raises:
        UserError: There are none, or some are too short; their number is named.
    """
    if not len(rows):
        raise UserError(
            "there is no recording to take windows from: expected those of the training split; "
            "check that its people have recordings."
        )
    lengths = recordings.n_trs[rows]
    if n_short := int((lengths < window_trs).sum()):
        raise UserError(
            f"{n_short} of {len(rows)} recordings are shorter than a window of {window_trs} TRs "
            f"(shortest: {lengths.min()}): leave them out, or use a model with a shorter window."
        )


def _deal(rows: np.ndarray, items: np.ndarray, seed: int) -> np.ndarray:
    """The recording of each item in an endless sequence of shuffled passes over `rows`."""
    passes, places = np.divmod(items, len(rows))
    dealt = np.empty(len(items), dtype=np.int64)
    for number in np.unique(passes):
        order = np.random.default_rng([seed, int(number), 0]).permutation(len(rows))
        now = passes == number
        dealt[now] = rows[order[places[now]]]
    return dealt
