"""From the tokens of a window to one vector a recording.

Shape legend: b recordings, n tokens (parcel-major), p parcels, w time patches, d width.
"""

from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from brainfusion.runtime.errors import UserError, nearest

Pooling = Literal["mean", "cls", "parcel-mean", "parcel-std"]


def check_pooling(pooling: str, offered: tuple[str, ...] = get_args(Pooling)) -> None:
    """Refuse a pooling that is unknown, or that an encoder does not offer.

    Raises:
        UserError: The nearest one is named.
    """
    if pooling not in get_args(Pooling):
        raise UserError(f"pooling '{pooling}' is unknown. {nearest(pooling, offered)}")
    if pooling not in offered:
        reason = "has no CLS token" if pooling == "cls" else "has no tokens of single parcels"
        raise UserError(
            f"pooling '{pooling}': this encoder {reason}; use one of {', '.join(offered)}."
        )


def pool(
    tokens: Float[Tensor, "b n d"],
    pooling: str,
    *,
    n_parcels: int,
    cls: Float[Tensor, "b d"] | None = None,
) -> Float[Tensor, "b f"]:
    """Pool the tokens of one window.

    "mean" is over all tokens (f = d) and "cls" the CLS token (f = d). "parcel-mean" and
    "parcel-std" are over the time patches of each parcel, joined parcel by parcel (f = p d): the
    standard deviation keeps what varies in time, amplitude above all, which a mean averages away.
    """
    if pooling == "cls":
        assert cls is not None
        return cls
    if pooling == "mean":
        return tokens.mean(1)
    grid = tokens.unflatten(1, (n_parcels, -1))  # (b, p, w, d)
    if pooling == "parcel-mean":
        return grid.mean(2).flatten(1)
    if grid.shape[2] < 2:
        raise UserError(
            "pooling 'parcel-std' needs at least 2 time patches of a window, and here there is 1: "
            "use 'parcel-mean', longer recordings, or an encoder with shorter patches."
        )
    return torch.std(grid, dim=2).flatten(1)
