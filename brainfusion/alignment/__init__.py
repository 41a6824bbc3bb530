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
    from brainfusion.alignment.genes.conditioning import GeneConditioner
    from brainfusion.alignment.genes.tower import GeneTower
    from brainfusion.alignment.genes.vectors import GeneArray, GeneVectors
    from brainfusion.alignment.losses.info_nce import contrastive_loss, info_nce, open_clip_losses
    from brainfusion.alignment.losses.pair_ids import PairIds
    from brainfusion.alignment.model import Alignment, AlignmentModel, GeneWeights, load
    from brainfusion.alignment.projector import Projector
    from brainfusion.alignment.train import TrainResult, train

_HOMES = {
    "AlignConfig": "config",
    "Alignment": "model",
    "AlignmentModel": "model",
    "Conditioner": "conditioning",
    "GeneArray": "genes.vectors",
    "GeneConditioner": "genes.conditioning",
    "GeneTower": "genes.tower",
    "GeneVectors": "genes.vectors",
    "GeneWeights": "model",
    "PairIds": "losses.pair_ids",
    "Projector": "projector",
    "TrainResult": "train",
    "contrastive_loss": "losses.info_nce",
    "design_matrix": "conditioning",
    "info_nce": "losses.info_nce",
    "load": "model",
    "open_clip_losses": "losses.info_nce",
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
