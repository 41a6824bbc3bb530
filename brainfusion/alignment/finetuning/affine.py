"""A fitted conditioner as torch operations, for features that are still in a graph.

Shape legend: n people, d columns, d' of them kept, c covariates, k components.
"""

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from brainfusion.alignment.conditioning import Conditioner


class Affine(nn.Module):
    """What `Conditioner.transform` does to features, with gradients; nothing in it is trained.

    In float64 inside, as there: the two agree to rounding of the float32 that comes out.
    """

    kept: Tensor
    mean: Tensor
    scale: Tensor
    rotation: Tensor | None

    def __init__(self, conditioner: Conditioner) -> None:
        super().__init__()
        self.conditioner = conditioner
        for name in ("kept", "mean", "scale", "rotation"):
            array = getattr(conditioner, name)
            tensor = None if array is None else torch.from_numpy(np.ascontiguousarray(array))
            self.register_buffer(name, tensor, persistent=False)

    def offset(self, covariates: np.ndarray | None, n: int) -> Float[Tensor, "n d'"]:
        """What covariates add to each person's standardised columns, float64 on the CPU.

        Args:
            covariates: [n, c] from `design_matrix`; none where it was fitted without.
            n: People.
        """
        own = self.conditioner
        if not own.covariates:
            return torch.zeros(n, 1, dtype=torch.float64)
        centred = np.asarray(covariates, dtype=np.float64) - own.covariate_mean
        return torch.from_numpy(centred @ own.coefficients)

    def forward(
        self, features: Float[Tensor, "n d"], offset: Float[Tensor, "n d'"] | None = None
    ) -> Float[Tensor, "n k"]:
        """Condition features; float32.

        Args:
            features: As the conditioner's `transform` takes them.
            offset: Rows of `offset()`, on the features' device.
        """
        x = (features.double()[:, self.kept] - self.mean) / self.scale
        if offset is not None:
            x = x - offset
        return (x if self.rotation is None else x @ self.rotation).float()
