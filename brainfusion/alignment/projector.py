"""The projector: from features of one modality to the shared space.

Shape legend: n people, i input features, o output features.
"""

import torch.nn as nn
from jaxtyping import Float
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

    def forward(self, features: Float[Tensor, "*n i"]) -> Float[Tensor, "*n o"]:
        """Project features; rows are not of unit norm (`AlignmentModel.embed` sees to that)."""
        return self.layers(features)
