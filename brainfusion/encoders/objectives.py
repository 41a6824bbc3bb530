"""What each encoder is trained to do: a loss on a batch of windows, and its random draws.

Random draws are pure functions of (seed, step) over the *global* batch, of which every rank takes
its rows: two ranks see what one process would see, and a resumed run repeats nothing.

Shape legend: b windows, p parcels, t TRs, n tokens, k context tokens, q target tokens.
"""

from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from brainfusion.data.atlas import Atlas
from brainfusion.encoders.brainjepa import BrainJEPA
from brainfusion.encoders.brainlm import BrainLM
from brainfusion.encoders.brainlm_image import BrainLMImage
from brainfusion.encoders.masking import mask_rng, sample_masks
from brainfusion.runtime.errors import UserError


class Objective(nn.Module):
    """A loss around an encoder. `forward(bold, *draws)` is what a training step minimises."""

    window_trs: int

    def draw(self, batch_size: int, *, seed: int, step: int) -> list[Tensor]:
        """The random tensors of a global batch; rows belong to its windows."""
        raise NotImplementedError

    def diagnose(self, bold: Tensor, draws: list[Tensor]) -> dict[str, float]:
        """Named figures that tell learning from collapse, on one batch."""
        raise NotImplementedError

    def pooled(self, bold: Tensor) -> Tensor | None:
        """Features whose spread over windows is watched; nothing by default."""
        return None

    def after_step(self, step: int, n_steps: int) -> None:
        """What follows optimiser step `step` of `n_steps`; nothing by default."""


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

    def draw(self, batch_size: int, *, seed: int, step: int) -> list[Tensor]:
        """The masking noise of a global batch, [b, n]."""
        rng = np.random.default_rng([seed, step])
        noise = rng.random((batch_size, self.encoder.n_tokens), dtype=np.float32)
        return [torch.from_numpy(noise)]

    def forward(self, bold: Float[Tensor, "b p t"], noise: Float[Tensor, "b n"]) -> Tensor:
        """The masked reconstruction loss."""
        loss = self.encoder(bold, self.xyz, noise=noise).loss
        if loss is None:
            raise UserError("mask_ratio=0 hides nothing, so there is nothing to learn: use 0.2.")
        return loss

    @torch.no_grad()
    def diagnose(self, bold: Float[Tensor, "b p t"], draws: list[Tensor]) -> dict[str, float]:
        """Masked R2 against the mean of the hidden values: 0 is the mean predictor.

        Not for the image-shaped family, whose hidden patches span parcels and padding.
        """
        if isinstance(self.encoder, BrainLMImage):
            return {}
        out = self.encoder(bold, self.xyz, noise=draws[0])
        target = bold.reshape(out.logits.shape)
        hidden = out.mask.reshape(target.shape[:-1]).bool()
        error = (out.logits - target)[hidden].square().sum()
        spread = (target[hidden] - target[hidden].mean()).square().sum()
        return {"masked_r2": float(1.0 - error / spread)}


class BrainJEPAObjective(Objective):
    """Joint-embedding prediction: predict the target encoder's features of hidden blocks."""

    def __init__(
        self,
        encoder: BrainJEPA,
        *,
        momentum: tuple[float, float],
        masks: Literal["unbiased", "reference"] = "unbiased",
    ) -> None:
        super().__init__()
        self.encoder, self.window_trs = encoder, encoder.window_trs
        self.momentum, self.masks = momentum, masks

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
        """The loss of predicting the mean target: a loss no lower than that is collapse."""
        wanted = self.encoder.target(bold, draws[1:])
        mean = wanted.mean(dim=(0, 1), keepdim=True).expand_as(wanted)
        return {"loss_of_mean_target": float(F.smooth_l1_loss(mean, wanted))}

    @torch.no_grad()
    def pooled(self, bold: Float[Tensor, "b p t"]) -> Float[Tensor, "b d"]:
        """The target encoder's features: no spread over windows is collapse."""
        return self.encoder.target_encoder(bold).mean(1)

    def after_step(self, step: int, n_steps: int) -> None:
        """Move the target encoder; the momentum ramps linearly over the optimiser steps.

        Differs from upstream: their ramp is sized by batches and stepped by optimiser steps, so it
        ends at 0.9965 instead of 1.
        """
        start, end = self.momentum
        self.encoder.update_target(start + (end - start) * min(step / n_steps, 1.0))


def objective_for(module: nn.Module, atlas: Atlas, *, momentum: tuple[float, float]) -> Objective:
    """The pretraining objective of an encoder; `momentum` is Brain-JEPA's."""
    if isinstance(module, BrainJEPA):
        return BrainJEPAObjective(module, momentum=momentum)
    assert isinstance(module, (BrainLM, BrainLMImage))
    return BrainLMObjective(module, atlas)
