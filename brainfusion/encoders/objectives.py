"""What each encoder is trained to do: a loss on a batch of windows, and its random draws.

Random draws are pure functions of (seed, step) over the *global* batch, of which every rank takes
its rows: two ranks see what one process would see, and a resumed run repeats nothing.

Shape legend: b windows, p parcels, t TRs, n tokens, k context tokens, q target tokens, m patches of
a parcel, s TRs of a patch, h hidden patches.
"""

from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from brainfusion.data.atlas import Atlas
from brainfusion.encoders.brainjepa import BrainJEPA
from brainfusion.encoders.brainlm import BrainLM
from brainfusion.encoders.brainlm_image import BrainLMImage
from brainfusion.encoders.mae import MaskedOutput, random_masking
from brainfusion.encoders.masking import mask_rng, sample_masks
from brainfusion.runtime.errors import UserError

N_NEIGHBOURS = 8
"""Visible parcels that the interpolation in space averages."""
_LEAST_MM = 1.0  # parcels that lie closer count as so far apart


class Objective(nn.Module):
    """A loss around an encoder. `forward(bold, *draws)` is what a training step minimises."""

    window_trs: int

    def draw(self, batch_size: int, *, seed: int, step: int) -> list[Tensor]:
        """The random tensors of a global batch; rows belong to its windows."""
        raise NotImplementedError

    def diagnose(self, bold: Tensor, draws: list[Tensor]) -> dict[str, float]:
        """The validation loss and named figures that tell learning from collapse, on one batch."""
        raise NotImplementedError

    def pooled(self, bold: Tensor, pooling: str = "mean") -> Tensor:
        """Features [b, f] whose spread over windows is watched, and which are probed."""
        raise NotImplementedError

    def after_step(self, momentum: float) -> None:
        """What follows an optimiser step; nothing by default."""


class BrainLMObjective(Objective):
    """Masked autoencoding: rebuild the hidden patches of the recording."""

    xyz: Tensor

    def __init__(self, encoder: BrainLM | BrainLMImage, atlas: Atlas) -> None:
        super().__init__()
        if atlas.xyz_mm is None:
            raise UserError(
                f"the atlas '{atlas.name}' has no coordinates, which BrainLM reads: add 'xyz_mm' "
                "(one [x, y, z] a parcel, in mm) to the cohort's atlas.json, or train brainjepa."
            )
        self.encoder, self.window_trs = encoder, encoder.window_trs
        xyz = torch.as_tensor(np.asarray(atlas.xyz_mm), dtype=torch.float32)
        self.register_buffer("xyz", xyz, persistent=False)
        image = isinstance(encoder, BrainLMImage)
        self._values_hidden = _values_of_patches(encoder) if image else None

    def draw(self, batch_size: int, *, seed: int, step: int) -> list[Tensor]:
        """The masking noise of a global batch, [b, n]; for images also what each window weighs.

        An image's patches reach over its edges, so that windows differ in how many of their values
        are hidden. The loss is one mean over all hidden values of the global batch: a window
        weighs as many as it has, as a share of the batch's mean.
        """
        rng = np.random.default_rng([seed, step])
        noise = torch.from_numpy(rng.random((batch_size, self.encoder.n_tokens), dtype=np.float32))
        if self._values_hidden is None:
            return [noise]
        ratio = self.encoder.config.mask_ratio
        hidden = random_masking(noise, self.encoder.n_tokens, ratio, noise).mask.double()
        counts = hidden @ self._values_hidden
        return [noise, counts / counts.mean().clamp_min(1.0)]

    def forward(
        self,
        bold: Float[Tensor, "b p t"],
        noise: Float[Tensor, "b n"],
        weight: Float[Tensor, " b"] | None = None,
    ) -> Tensor:
        """The masked reconstruction loss of these windows, as their part of the global batch's."""
        loss = _loss_of(self.encoder(bold, self.xyz, noise=noise))
        return loss if weight is None else loss * weight.mean().to(loss.dtype)

    @torch.no_grad()
    def diagnose(self, bold: Float[Tensor, "b p t"], draws: list[Tensor]) -> dict[str, float]:
        """Masked R2, and what two interpolations of visible values reach of it.

        `masked_r2` is against the mean of the hidden values: 0 is the mean predictor.
        `interpolation_r2` is that of linear interpolation in time, `neighbours_r2` that of the
        nearest visible parcels at the same time. `r2_over_interpolation` is 1 - error / error of
        the interpolation in time: above 0, the encoder knows more than a patch's neighbours in time
        say. The image-shaped family has its loss alone: its hidden patches span parcels and
        padding.
        """
        out = self.encoder(bold, self.xyz, noise=draws[0])
        values = {"validation_loss": float(_loss_of(out))}
        if isinstance(self.encoder, BrainLMImage):
            return values
        target = bold.reshape(out.logits.shape)
        hidden = out.mask.reshape(target.shape[:-1]).bool()
        error = (out.logits - target)[hidden].square().sum()
        spread = (target[hidden] - target[hidden].mean()).square().sum()
        frames = hidden.repeat_interleave(target.shape[-1], dim=-1)  # (b, p, t)
        guess = interpolated(bold, frames)
        of_guess = (guess - bold)[frames].square().sum()
        of_near = (from_neighbours(target, hidden, self.xyz) - target[hidden]).square().sum()
        return values | {
            "masked_r2": float(1.0 - error / spread),
            "interpolation_r2": float(1.0 - of_guess / spread),
            "neighbours_r2": float(1.0 - of_near / spread),
            "r2_over_interpolation": float(1.0 - error / of_guess),
            "target_std": float(target[hidden].std(correction=0)),
        }

    @torch.no_grad()
    def reconstruct(
        self, bold: Float[Tensor, "b p t"], draws: list[Tensor]
    ) -> tuple[Tensor, Tensor] | None:
        """The reconstruction [b, p, t] and which of its values were hidden; None for images."""
        if isinstance(self.encoder, BrainLMImage):
            return None
        out = self.encoder(bold, self.xyz, noise=draws[0])
        hidden = out.mask.reshape(out.logits.shape[:-1]).bool()
        patch_trs = out.logits.shape[-1]
        return out.logits.flatten(2), hidden.repeat_interleave(patch_trs, dim=-1)

    @torch.no_grad()
    def pooled(self, bold: Float[Tensor, "b p t"], pooling: str = "mean") -> Float[Tensor, "b f"]:
        """The encoder's features with nothing hidden."""
        return self.encoder.encode(bold, self.xyz, pooling=pooling)  # type: ignore[arg-type]


class BrainJEPAObjective(Objective):
    """Joint-embedding prediction: predict the target encoder's features of hidden blocks."""

    def __init__(
        self,
        encoder: BrainJEPA,
        *,
        masks: Literal["unbiased", "reference"] = "unbiased",
    ) -> None:
        super().__init__()
        self.encoder, self.window_trs, self.masks = encoder, encoder.window_trs, masks

    def draw(self, batch_size: int, *, seed: int, step: int) -> list[Tensor]:
        """Context and target token indices of a global batch, [b, k] and [b, q]."""
        grid = (self.encoder.n_parcels, self.encoder.n_tokens // self.encoder.n_parcels)
        context, target = sample_masks(grid, batch_size, mask_rng(seed, step), mode=self.masks)
        return [context[0], target[0]]

    def forward(
        self,
        bold: Float[Tensor, "b p t"],
        context: Int[Tensor, "b k"],
        target: Int[Tensor, "b q"],
    ) -> Tensor:
        """Smooth L1 between predicted and target features."""
        return self.encoder.loss(bold, [context], [target])

    @torch.no_grad()
    def diagnose(self, bold: Float[Tensor, "b p t"], draws: list[Tensor]) -> dict[str, float]:
        """The loss of predicting the mean target: a loss no lower than that is collapse.

        `target_std` is the spread of target features over tokens and windows.
        """
        wanted = self.encoder.target(bold, draws[1:])
        mean = wanted.mean(dim=(0, 1), keepdim=True).expand_as(wanted)
        return {
            "validation_loss": float(self(bold, *draws)),
            "loss_of_mean_target": float(F.smooth_l1_loss(mean, wanted)),
            "target_std": float(wanted.flatten(0, 1).std(0, correction=0).mean()),
        }

    @torch.no_grad()
    def pooled(self, bold: Float[Tensor, "b p t"], pooling: str = "mean") -> Float[Tensor, "b f"]:
        """The target encoder's features: no spread over windows is collapse."""
        return self.encoder.encode(bold, pooling=pooling)

    def after_step(self, momentum: float) -> None:
        """Move the target encoder."""
        self.encoder.update_target(momentum)


def _values_of_patches(encoder: BrainLMImage) -> Float[Tensor, " n"]:
    """How many of a recording's values lie in each patch of its image, on the CPU."""
    n_pixels = encoder.config.patch_size**2
    numbers = encoder.real.cpu().float()[None, :, None].expand(1, -1, n_pixels)
    place = encoder._from_patches(numbers).flatten().long()  # the patch of each value
    return torch.bincount(place, minlength=encoder.n_tokens).double()


def _loss_of(out: MaskedOutput) -> Tensor:
    if out.loss is None:
        raise UserError("mask_ratio=0 hides nothing, so there is nothing to learn: use 0.2.")
    return out.loss


def objective_for(
    module: nn.Module, atlas: Atlas, *, masks: Literal["unbiased", "reference"] = "unbiased"
) -> Objective:
    """The pretraining objective of an encoder; `masks` are Brain-JEPA's."""
    if isinstance(module, BrainJEPA):
        return BrainJEPAObjective(module, masks=masks)
    assert isinstance(module, (BrainLM, BrainLMImage))
    return BrainLMObjective(module, atlas)


def interpolated(
    bold: Float[Tensor, "b p t"], hidden: Bool[Tensor, "b p t"]
) -> Float[Tensor, "b p t"]:
    """The signal with its hidden frames filled by linear interpolation in time.

    Between the nearest visible frames of the same parcel; before the first and after the last
    that frame itself; a parcel with no visible frame takes the mean of the recording's visible
    values.
    """
    n_trs = bold.shape[-1]
    frame = torch.arange(n_trs, device=bold.device).expand_as(hidden)
    before = frame.masked_fill(hidden, -1).cummax(-1).values
    after = frame.masked_fill(hidden, n_trs).flip(-1).cummin(-1).values.flip(-1)
    left = torch.where(before < 0, after, before).clamp_max(n_trs - 1)
    right = torch.where(after == n_trs, before, after).clamp_min(0)
    share = (frame - left).to(bold.dtype) / (right - left).clamp_min(1)
    filled = torch.lerp(bold.gather(-1, left), bold.gather(-1, right), share)
    seen = ~hidden
    level = (bold * seen).sum((1, 2)) / seen.sum((1, 2)).clamp_min(1)
    nowhere = hidden.all(-1, keepdim=True)
    return torch.where(nowhere, level[:, None, None], filled)


def from_neighbours(
    patches: Float[Tensor, "b p m s"], hidden: Bool[Tensor, "b p m"], xyz_mm: Float[Tensor, "p 3"]
) -> Float[Tensor, "h s"]:
    """Hidden patches from the nearest parcels that are visible at the same time.

    The mean of the `N_NEIGHBOURS` nearest, weighted by one over the squared distance between
    centroids; of fewer where fewer are visible; where none is, the mean of the window's visible
    values.

    Returns:
        In the order of `hidden.nonzero()`.
    """
    n_near = min(N_NEIGHBOURS, len(xyz_mm) - 1)
    distance = torch.cdist(xyz_mm, xyz_mm).clamp_min(_LEAST_MM).fill_diagonal_(torch.inf)
    order = distance.argsort(1)[:, :-1]
    window, parcel, place = hidden.nonzero().unbind(1)
    near = order[parcel]  # (h, p - 1), the nearest first
    seen = ~hidden[window[:, None], near, place[:, None]]
    rank = seen.int().cumsum(1, dtype=torch.int32)
    weight = (seen & (rank <= n_near)) / distance[parcel[:, None], near].square()
    weight, chosen = weight.topk(n_near, dim=1)
    near = near.gather(1, chosen)
    values = patches[window[:, None], near, place[:, None]]  # (h, neighbours, s)
    total = weight.sum(1, keepdim=True)
    mixed = (weight.unsqueeze(-1) * values).sum(1) / total.clamp_min(torch.finfo(total.dtype).tiny)
    there = ~hidden
    level = (patches.sum(-1) * there).sum((1, 2)) / there.sum((1, 2)).clamp_min(1)
    level = (level / patches.shape[-1])[window, None]
    return torch.where(total > 0, mixed, level)
