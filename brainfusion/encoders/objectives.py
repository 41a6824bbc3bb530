"""What each encoder is trained to do: a loss on a batch of windows, and its random draws.

Random draws are pure functions of (seed, step) over the *global* batch, of which every rank takes
its rows: two ranks see what one process would see, and a resumed run repeats nothing.

Shape legend: b windows, p parcels, t TRs, n tokens.
"""

from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from brainfusion.data.atlas import Atlas
from brainfusion.encoders.brainjepa import BrainJEPA
from brainfusion.encoders.brainlm import BrainLM
from brainfusion.encoders.masking import mask_rng, sample_masks
from brainfusion.runtime.errors import UserError


class BrainLMObjective(nn.Module):
    """Masked autoencoding: rebuild the hidden patches of each parcel."""

    def __init__(self, encoder: BrainLM, atlas: Atlas) -> None:
        super().__init__()
        if atlas.xyz_mm is None:
            raise UserError(
                f"the atlas '{atlas.name}' has no coordinates, and BrainLM reads them: add "
                "'xyz_mm' (one [x, y, z] a parcel, in mm) to the cohort's atlas.json, or train "
                "brainjepa."
            )
        self.encoder = encoder
        xyz = torch.as_tensor(np.asarray(atlas.xyz_mm), dtype=torch.float32)
        self.register_buffer("xyz", xyz, persistent=False)

    def draw(self, batch_size: int, *, seed: int, step: int) -> list[Tensor]:
        """The masking noise of a global batch, [b, n]."""
        rng = np.random.default_rng([seed, step])
        noise = rng.random((batch_size, self.encoder.n_tokens), dtype=np.float32)
        return [torch.from_numpy(noise)]

    def forward(self, bold: Float[Tensor, "b p t"], noise: Tensor) -> Tensor:
        """The masked reconstruction loss."""
        xyz = self.xyz.expand(len(bold), -1, -1)
        loss = self.encoder(bold, xyz, noise=noise).loss
        assert loss is not None
        return loss

    @torch.no_grad()
    def diagnose(self, bold: Float[Tensor, "b p t"], noise: Tensor) -> dict[str, float]:
        """Masked R2 against the mean of the hidden values: 0 is the mean predictor."""
        out = self.encoder(bold, self.xyz.expand(len(bold), -1, -1), noise=noise)
        target = bold.reshape(out.logits.shape)
        hidden = out.mask.reshape(target.shape[:-1]).bool()
        error = (out.logits - target)[hidden].square().sum()
        spread = (target[hidden] - target[hidden].mean()).square().sum()
        return {"masked_r2": float(1.0 - error / spread)}

    def after_step(self, step: int, n_steps: int) -> None:
        """Nothing follows an optimiser step."""


class BrainJEPAObjective(nn.Module):
    """Joint-embedding prediction: predict the target encoder's features of hidden blocks."""

    def __init__(
        self, encoder: BrainJEPA, *, momentum: tuple[float, float], masks: str = "unbiased"
    ) -> None:
        super().__init__()
        self.encoder, self.momentum, self.masks = encoder, momentum, masks

    def draw(self, batch_size: int, *, seed: int, step: int) -> list[Tensor]:
        """Context and target token indices of a global batch, [b, k] each."""
        grid = (self.encoder.n_parcels, self.encoder.n_tokens // self.encoder.n_parcels)
        rng = mask_rng(seed, step, 0)
        masks_enc, masks_pred = sample_masks(grid, batch_size, rng, mode=self.masks)
        return [masks_enc[0], masks_pred[0]]

    def forward(self, bold: Float[Tensor, "b p t"], context: Tensor, target: Tensor) -> Tensor:
        """Smooth L1 between predicted and target features."""
        return self.encoder.loss(bold.unsqueeze(1), [context], [target])

    @torch.no_grad()
    def diagnose(
        self, bold: Float[Tensor, "b p t"], context: Tensor, target: Tensor
    ) -> dict[str, float]:
        """Spread of the targets over tokens and windows: near 0 means collapse."""
        features = self.encoder.target_encoder(bold.unsqueeze(1))
        wanted = self.encoder.target(bold.unsqueeze(1), [target], 1)
        mean = wanted.mean(dim=(0, 1), keepdim=True).expand_as(wanted)
        return {
            "feature_std": float(features.mean(1).std(0).mean()) if len(features) > 1 else 0.0,
            "loss_of_mean_target": float(F.smooth_l1_loss(mean, wanted)),
        }

    def after_step(self, step: int, n_steps: int) -> None:
        """Move the target encoder: momentum ramps linearly over the optimiser steps.

        Differs from upstream: their ramp is sized by batches and stepped by optimiser steps, so it
        ends at 0.9965 instead of 1.
        """
        start, end = self.momentum
        self.encoder.update_target(start + (end - start) * min(step / n_steps, 1.0))


def objective_for(module: nn.Module, atlas: Atlas, **options: Any) -> nn.Module:
    """The pretraining objective of an encoder."""
    if isinstance(module, BrainJEPA):
        return BrainJEPAObjective(module, **options)
    assert isinstance(module, BrainLM)
    return BrainLMObjective(module, atlas)
