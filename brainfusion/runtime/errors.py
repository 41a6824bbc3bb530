"""Errors that a user can act on: what was wrong, what was expected, what to do."""

from collections.abc import Iterable
from difflib import get_close_matches


class UserError(ValueError):
    """Wrong input. The command line prints its message as one line and exits with 2."""


class CheckpointError(UserError):
    """A checkpoint that is truncated, of another model, or of another configuration."""


class NonFiniteError(UserError, FloatingPointError):
    """A loss or gradient that is NaN or infinite."""


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint that names the known word nearest to `name`, or lists them all.

    >>> nearest("brainlmm", ["brainjepa", "brainlm"])
    "Did you mean 'brainlm'? Known: brainjepa, brainlm."
    """
    words = list(known)
    close = get_close_matches(name, words, n=1, cutoff=0.5)
    hint = f"Did you mean '{close[0]}'? " if close else ""
    return f"{hint}Known: {', '.join(words)}."
