"""The projector: from features of one modality to the shared space.

Shape legend: n people, i input features, h hidden units, o output features.
"""

import torch.nn as nn
from jaxtyping import Bool, Float
from torch import Tensor


class Projector(nn.Module):
    """Linear, GELU, Dropout, Linear, LayerNorm.

    State dict keys: `layers.0.*` and `layers.3.*` (Linear), `layers.4.*` (LayerNorm).
    """

    def __init__(
        self, dim_in: int, dim_out: int = 512, dim_hidden: int = 1024, dropout: float = 0.1
    ) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(dim_in, dim_hidden),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(dim_hidden, dim_out),
            nn.LayerNorm(dim_out),
        )

    def forward(
        self, features: Float[Tensor, "*n i"], keep: Bool[Tensor, "*n h"] | None = None
    ) -> Float[Tensor, "*n o"]:
        """Project features; rows are not of unit norm (`AlignmentModel.embed` sees to that).

        Args:
            features: Conditioned.
            keep: Which hidden units to keep in place of what `Dropout` would draw, so that a draw
                can be of the person instead of the process; `Dropout` draws if omitted.
        """
        if keep is None:
            return self.layers(features)
        linear, activation, dropout, *rest = self.layers
        assert isinstance(dropout, nn.Dropout)
        x = (activation(linear(features)) * keep).mul_(1.0 / (1.0 - dropout.p))
        for layer in rest:
            x = layer(x)
        return x
