"""Embeddings that were found in some container, before they are read.

Shape legend: n people, c chunks, w stored width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from brainfusion.runtime.errors import UserError, nearest


@dataclass(frozen=True, kw_only=True)
class Source:
    """Embeddings that are found, and read one gene at a time."""

    subjects: tuple[str, ...]
    genes: tuple[str, ...]
    layer: str | None
    load: Callable[[int], tuple[np.ndarray, str]]
    """(column of a gene) -> (float32 [n, w] or [n, c, w], nan where absent; type as stored)."""


def choose_layer(available: Sequence[str], wanted: str | None, *, where: Path) -> str | None:
    """The layer to read: the only one, or the one that is asked for.

    Raises:
        UserError: Several, and none named; or the one named is not there.
    """
    if not available:
        return wanted
    if wanted is None:
        if len(available) == 1:
            return available[0]
        raise UserError(
            f"{where}: {len(available)} layers ({', '.join(available)}): say which to read "
            "(layer=...)."
        )
    if wanted not in available:
        raise UserError(f"{where}: no layer '{wanted}'. {nearest(wanted, available)}")
    return wanted
