"""Alignment: features of the same people, contrasted into one shared space.

Parts load on first use: importing this package loads no torch.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from brainfusion.alignment.conditioning import Conditioner, design_matrix
    from brainfusion.alignment.config import AlignConfig
    from brainfusion.alignment.gene_conditioning import GeneConditioner
    from brainfusion.alignment.gene_vectors import GeneArray, GeneVectors
    from brainfusion.alignment.genes import GeneTower
    from brainfusion.alignment.losses import contrastive_loss, info_nce, open_clip_losses
    from brainfusion.alignment.model import Alignment, AlignmentModel, GeneWeights, load
    from brainfusion.alignment.pair_ids import PairIds
    from brainfusion.alignment.projector import Projector
    from brainfusion.alignment.train import TrainResult, train

_HOMES = {
    "AlignConfig": "config",
    "Alignment": "model",
    "AlignmentModel": "model",
    "Conditioner": "conditioning",
    "GeneArray": "gene_vectors",
    "GeneConditioner": "gene_conditioning",
    "GeneTower": "genes",
    "GeneVectors": "gene_vectors",
    "GeneWeights": "model",
    "PairIds": "pair_ids",
    "Projector": "projector",
    "TrainResult": "train",
    "contrastive_loss": "losses",
    "design_matrix": "conditioning",
    "info_nce": "losses",
    "load": "model",
    "open_clip_losses": "losses",
    "train": "train",
}

__all__ = [
    "AlignConfig",
    "Alignment",
    "AlignmentModel",
    "Conditioner",
    "GeneArray",
    "GeneConditioner",
    "GeneTower",
    "GeneVectors",
    "GeneWeights",
    "PairIds",
    "Projector",
    "TrainResult",
    "contrastive_loss",
    "design_matrix",
    "info_nce",
    "load",
    "open_clip_losses",
    "train",
]


class _Package(ModuleType):
    """This package, in which `train` stays the function although a module has its name.

    On importing `train.py`, Python would set the attribute to the module.
    """

    def __getattr__(self, name: str) -> Any:
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
        setattr(self, name, value)
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *_HOMES})


sys.modules[__name__].__class__ = _Package
