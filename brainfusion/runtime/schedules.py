"""Schedules are pure functions of the step: a resumed run has nothing to restore."""

import math


def linear(step: float, start: float, end: float, n_steps: float) -> float:
    """From `start` at step 0 to `end` at `n_steps`, then constant."""
    share = min(max(step / n_steps, 0.0), 1.0) if n_steps > 0 else 1.0
    return start + (end - start) * share


def cosine(step: float, start: float, end: float, n_steps: float) -> float:
    """Half a cosine from `start` at step 0 to `end` at `n_steps`, then constant."""
    share = min(max(step / n_steps, 0.0), 1.0) if n_steps > 0 else 1.0
    return end + (start - end) * 0.5 * (1.0 + math.cos(math.pi * share))


def warmup_cosine(
    step: float, *, start: float, peak: float, end: float, n_warmup: float, n_steps: float
) -> float:
    """A linear warm-up from `start` to `peak`, then half a cosine to `end` at `n_steps`."""
    if step < n_warmup:
        return linear(step, start, peak, n_warmup)
    return cosine(step - n_warmup, peak, end, max(n_steps - n_warmup, 1.0))
