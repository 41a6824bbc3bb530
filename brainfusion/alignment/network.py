"""Projectors of all modalities with one logit scale.

Shape legend: n people, i input features of a modality, h hidden units, o width of the shared space.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from brainfusion.alignment.genes.conditioning import GeneArrays
from brainfusion.alignment.genes.tower import GeneBatch, GenePool, GeneTower
from brainfusion.alignment.projector import Projector
from brainfusion.runtime.errors import UserError, nearest

Inputs = Tensor | GeneBatch
"""Conditioned features [n, i], or genes that the model pools."""


class GeneSettings(TypedDict):
    """How a modality's genes are pooled before its projector."""

    n_components: Sequence[int]
    pool: GenePool


class AlignmentModel(nn.Module):
    """One projector a modality, and the learnt scale of the cosines between them.

    A modality that comes as genes has a tower of its own before the projector, which pools them.
    """

    log_scale: Tensor
    logit_bias: Tensor | None

    def __init__(
        self,
        dims_in: Mapping[str, int],
        *,
        dim_out: int = 512,
        dim_hidden: int = 1024,
        dropout: float = 0.1,
        init_scale: float = 1 / 0.07,
        min_scale: float = 1.0,
        max_scale: float = 100.0,
        init_bias: float | None = None,
        genes: Mapping[str, GeneSettings] | None = None,
    ) -> None:
        """Make the projectors.

        Args:
            dims_in: Input features of each modality's projector, by the modality's name.
            dim_out: Width of the shared space.
            dim_hidden: Width of the projectors' hidden layer.
            dropout: Share of hidden units dropped in training.
            init_scale: Logit scale to start from.
            min_scale: Least logit scale that `clamp_scale_` leaves.
            max_scale: Greatest logit scale that `clamp_scale_` leaves.
            init_bias: Start of a learnt logit bias, which SigLIP's loss wants; none if omitted.
            genes: How modalities that come as genes are pooled, by name.
        """
        super().__init__()
        self.settings: dict[str, Any] = {
            "dims_in": dict(dims_in),
            "dim_out": dim_out,
            "dim_hidden": dim_hidden,
            "dropout": dropout,
            "init_scale": init_scale,
            "min_scale": min_scale,
            "max_scale": max_scale,
            "init_bias": init_bias,
            "genes": {name: dict(settings) for name, settings in (genes or {}).items()},
        }
        self.projectors = nn.ModuleDict(
            {name: Projector(dim, dim_out, dim_hidden, dropout) for name, dim in dims_in.items()}
        )
        self.towers = nn.ModuleDict(
            {
                name: GeneTower(how["n_components"], width=dims_in[name], pool=how["pool"])
                for name, how in (genes or {}).items()
            }
        )
        self.log_scale = nn.Parameter(torch.tensor(math.log(init_scale)))
        bias = None if init_bias is None else nn.Parameter(torch.tensor(float(init_bias)))
        self.register_parameter("logit_bias", bias)

    @property
    def logit_scale(self) -> Float[Tensor, ""]:
        """The multiplier of the cosines."""
        return self.log_scale.exp()

    @torch.no_grad()
    def clamp_scale_(self) -> None:
        """Put the logit scale back between its bounds; call it after each optimizer step."""
        low, high = (math.log(self.settings[key]) for key in ("min_scale", "max_scale"))
        self.log_scale.clamp_(low, high)

    def embed(
        self, name: str, inputs: Inputs, *, keep: Bool[Tensor, "n h"] | None = None
    ) -> Float[Tensor, "n o"]:
        """Conditioned features of the modality `name` to unit rows of the shared space.

        Args:
            name: The modality.
            inputs: Of some people.
            keep: The hidden units to keep (`Projector.forward`); drawn in training if omitted.
        """
        if name not in self.projectors:
            raise UserError(f"no modality '{name}' in this model. {nearest(name, self.projectors)}")
        features = self.towers[name](*inputs) if isinstance(inputs, GeneBatch) else inputs
        return F.normalize(self.projectors[name](features, keep), dim=-1)


def as_inputs(conditioned: np.ndarray | GeneArrays) -> Inputs:
    """What a conditioner gave, as tensors; no copy."""
    if isinstance(conditioned, GeneArrays):
        return GeneBatch(*map(torch.from_numpy, conditioned))
    return torch.from_numpy(conditioned)


def take(inputs: Inputs, rows: Any) -> Inputs:
    """Some people's inputs."""
    return inputs.take(rows) if isinstance(inputs, GeneBatch) else inputs[rows]


def n_people(inputs: Inputs) -> int:
    """How many people's inputs these are."""
    return len(inputs.x if isinstance(inputs, GeneBatch) else inputs)
