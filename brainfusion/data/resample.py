"""Recordings at another TR, and Brain-JEPA's choice of frames.

What the standard benchmark's wrappers do to feed published encoders: BrainLM linear to 0.735 s,
Brain-JEPA nearest to 2.0 s. **No anti-alias filter is applied**, there or here: a longer TR folds
what lies above its Nyquist frequency (0.25 Hz at 2 s) onto lower ones, and encoders were trained on
data made that way. Filter before the import if you want none of it.

Shape legend: p parcels, t TRs.
"""

import math
from typing import Literal

import numpy as np

from brainfusion.runtime.errors import UserError

Resampling = Literal["linear", "nearest"]
METHODS = ("linear", "nearest")
_SAME_TR = 1e-6  # relative: a TR that went through float32 is the same TR
_WHOLE = 1e-6  # of a frame: a position this close to the last frame is that frame


def resample(
    bold: np.ndarray, *, tr_s: float, to_tr_s: float, method: Resampling = "linear"
) -> np.ndarray:
    """A recording as if it had been sampled every `to_tr_s` seconds.

    Frame k of the result lies k * `to_tr_s` after the first frame; no frame lies after the last.

    Args:
        bold: [..., p, t]; a missing parcel is NaN and stays so.
        tr_s: Seconds between its frames.
        to_tr_s: Seconds between the frames of the result.
        method: "linear" between the two frames around; "nearest" takes the frame that is nearer,
            of two equally near ones the later.

    Returns:
        float32 [..., p, t'], t' of `resampled_length`; the same values when the TRs are equal.

    Raises:
        UserError: A TR that is not positive seconds, or an unknown method.
    """
    if method not in METHODS:
        raise UserError(f"resampling '{method}': expected one of {', '.join(METHODS)}.")
    n_trs = bold.shape[-1]
    bold = np.asarray(bold, dtype=np.float32)
    length = resampled_length(n_trs, tr_s=tr_s, to_tr_s=to_tr_s)
    if same_tr(tr_s, to_tr_s):
        return bold
    at = np.minimum(np.arange(length) * (to_tr_s / tr_s), n_trs - 1.0)
    if method == "nearest":
        return bold[..., np.floor(at + 0.5 + _WHOLE).astype(np.int64)]
    before = np.minimum(np.floor(at + _WHOLE).astype(np.int64), max(n_trs - 2, 0))
    after = np.minimum(before + 1, n_trs - 1)
    share = np.clip(at - before, 0.0, 1.0).astype(np.float32)
    first = bold[..., before]
    return first + share * (bold[..., after] - first)


def resampled_length(n_trs: int, *, tr_s: float, to_tr_s: float) -> int:
    """Frames that `resample` makes of `n_trs`.

    Raises:
        UserError: A TR that is not positive seconds.
    """
    for name, value in (("tr_s", tr_s), ("to_tr_s", to_tr_s)):
        if not (math.isfinite(value) and value > 0):
            raise UserError(f"{name}={value}: expected the seconds between frames, above zero.")
    if same_tr(tr_s, to_tr_s):
        return n_trs
    return math.floor((n_trs - 1) * (tr_s / to_tr_s) + _WHOLE) + 1


def sample_frames(n_trs: int, *, n_frames: int, span: int, start: float) -> np.ndarray:
    """Frames that Brain-JEPA's pretraining keeps of a clip (int64 [n_frames], ascending).

    `n_frames` evenly from `start` to `start + span - 1`, cut down to whole frames; published: 160
    frames over a span of 480, start uniform in 0..10 of 490. The stride is (span - 1) /
    (n_frames - 1), slightly over span / n_frames (Eric-LRL/Brain-JEPA at commit b1dfa93e).

    Args:
        n_trs: Frames of the recording; positions past the last become the last.
        n_frames: Frames to keep.
        span: Frames that the clip covers.
        start: Where the clip begins, not necessarily a whole frame.

    Raises:
        UserError: No frames, or a span shorter than the frames kept.
    """
    if n_trs < 1 or n_frames < 1 or span < n_frames or start < 0:
        raise UserError(
            f"cannot take {n_frames} frames over a span of {span} from frame {start} of {n_trs}: "
            "expected at least one frame, a span no shorter than the frames kept, and a start "
            "from 0."
        )
    at = np.linspace(start, start + span - 1, n_frames)
    return np.clip(at, 0, n_trs - 1).astype(np.int64)


def same_tr(tr_s: float, to_tr_s: float) -> bool:
    """Whether two TRs in seconds are one, up to the rounding of float32."""
    return math.isclose(tr_s, to_tr_s, rel_tol=_SAME_TR)
