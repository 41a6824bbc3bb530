"""Masked autoencoding and encoding: what BrainLM's two families share.

Shape legend: b recordings, p parcels, t TRs, n tokens (CLS not counted), v visible tokens,
s sequence (CLS and tokens), d width, f features.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from brainfusion.data.windows import window_starts
from brainfusion.encoders.layers import at_least_float32
from brainfusion.runtime.errors import UserError


class MaskedOutput(NamedTuple):
    """What one pass of masked autoencoding gives."""

    loss: Tensor | None
    """Mean error over the hidden values of the batch; None when nothing was hidden."""
    logits: Tensor
    """The reconstruction, hidden and visible tokens alike."""
    last_hidden_state: Tensor
    """[b, 1 + v, d]: CLS, then the visible tokens in the order of the noise."""
    mask: Tensor
    """[b, n] in natural token order: 1 hidden, 0 visible."""
    ids_restore: Tensor
    """[b, n]: where each token of the natural order stands in the shuffled one."""


class Masking(NamedTuple):
    """Which tokens the encoder sees."""

    visible: Tensor | None
    """[b, v], in the encoder's order; None: all, in natural order."""
    mask: Tensor
    restore: Tensor
    n_visible: int


def check_mask_ratio(mask_ratio: float) -> None:
    """Refuse a share that is none."""
    if not 0.0 <= mask_ratio < 1.0:
        raise UserError(
            f"mask_ratio={mask_ratio} is not a share of the tokens: expected 0 (none hidden) up "
            "to, but not including, 1. Published models use 0.2 and 0.75."
        )


def random_masking(like: Tensor, n_tokens: int, mask_ratio: float, noise: Tensor | None) -> Masking:
    """The tokens with the smallest noise stay visible, in the order of the noise.

    `int(n_tokens * (1 - mask_ratio))` of them, truncated as upstream does (85 tokens at 0.8 leave
    16).
    """
    check_mask_ratio(mask_ratio)
    shape = (len(like), n_tokens)
    n_visible = int(n_tokens * (1 - mask_ratio))
    if n_visible < 1:
        raise UserError(
            f"mask_ratio={mask_ratio} leaves none of {n_tokens} tokens visible: use at most "
            f"{1 - 1 / n_tokens:.3f}."
        )
    if noise is None and n_visible == n_tokens:
        natural = torch.arange(n_tokens, device=like.device).expand(shape)
        return Masking(None, like.new_zeros(shape), natural, n_visible)
    if noise is None:
        noise = torch.rand(shape, device=like.device)
    elif tuple(noise.shape) != shape:
        raise UserError(
            f"noise has shape {list(noise.shape)}, expected {list(shape)}: one number for each "
            "recording and token (CLS not counted)."
        )
    order = noise.argsort(dim=1, stable=True)
    restore = order.argsort(dim=1)
    return Masking(order[:, :n_visible], (restore >= n_visible).to(like.dtype), restore, n_visible)


def take(tokens: Float[Tensor, "b n d"], ids: Int[Tensor, "b v"]) -> Float[Tensor, "b v d"]:
    """Tokens of each recording by index."""
    return tokens.gather(1, ids.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))


def fill_hidden(
    tokens: Float[Tensor, "b v d"], mask_token: Float[Tensor, "1 1 d"], restore: Int[Tensor, "b n"]
) -> Float[Tensor, "b n d"]:
    """Natural order again, with the mask token wherever a token was hidden."""
    n_hidden = restore.shape[1] - tokens.shape[1]
    filler = mask_token.to(tokens.dtype).expand(len(tokens), n_hidden, -1)
    return take(torch.cat([tokens, filler], dim=1), restore)


def masked_loss(logits: Tensor, target: Tensor, weight: Tensor, loss_fn: str) -> Tensor:
    """One mean over all hidden values of the batch; `weight` (1 hidden) broadcasts to `target`."""
    error = at_least_float32(logits) - target
    error = error.square() if loss_fn == "mse" else error.abs()
    weight = weight.expand_as(error)
    return (error * weight).sum() / weight.sum()


def mean_over_windows(
    features: Callable[[Tensor], Tensor],
    bold: Float[Tensor, "b p t"],
    n_parcels: int,
    window_trs: int,
    patch_trs: int,
) -> Float[Tensor, "b f"]:
    """Average `features` over the windows that cover the recordings; short ones are filled up."""
    if bold.ndim != 3 or bold.shape[1] != n_parcels:
        raise UserError(
            f"bold has shape {list(bold.shape)} but this BrainLM expects [b, {n_parcels}, t] "
            "(recordings, parcels, TRs). Parcel order carries meaning, so parcels are not padded "
            "or cut: use the atlas that the weights were trained on."
        )
    n_trs = bold.shape[2]
    if n_trs < patch_trs:
        raise UserError(
            f"the recording has {n_trs} TRs, fewer than one patch ({patch_trs} TRs): leave it out, "
            "or use an encoder with shorter patches."
        )
    if not bool(torch.isfinite(bold).all()):
        raise UserError(
            "bold has values that are not finite: standardise it first (a missing parcel becomes "
            "0)."
        )
    if n_trs < window_trs:
        tail = bold.mean(2, keepdim=True).expand(-1, -1, window_trs - n_trs)
        return features(torch.cat([bold, tail], dim=2))
    starts = window_starts(n_trs, window_trs).tolist()
    total = features(bold[:, :, starts[0] : starts[0] + window_trs])
    for start in starts[1:]:
        total = total + features(bold[:, :, start : start + window_trs])
    return total / len(starts)


@contextmanager
def no_dropout(module: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the block; each submodule's own mode afterwards."""
    training = [child for child in module.modules() if child.training]
    for child in training:
        child.training = False
    try:
        yield
    finally:
        for child in training:
            child.training = True
