"""Scores of retrieval and of linear probes, with chance levels, intervals and honest nulls.

Everything loads on first use; nothing here imports torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from brainfusion.eval.cca_permutation import cca_test
    from brainfusion.eval.probing.estimators import LogisticProbe, RidgeProbe
    from brainfusion.eval.probing.probes import Extras, probe
    from brainfusion.eval.retrieval.index import RetrievalIndex
    from brainfusion.eval.retrieval.metrics import retrieval_metrics

__all__ = [
    "Extras",
    "LogisticProbe",
    "RetrievalIndex",
    "RidgeProbe",
    "cca_test",
    "probe",
    "retrieval_metrics",
]

_HOME = {
    "Extras": "brainfusion.eval.probing.probes",
    "LogisticProbe": "brainfusion.eval.probing.estimators",
    "RidgeProbe": "brainfusion.eval.probing.estimators",
    "cca_test": "brainfusion.eval.cca_permutation",
    "RetrievalIndex": "brainfusion.eval.retrieval.index",
    "probe": "brainfusion.eval.probing.probes",
    "retrieval_metrics": "brainfusion.eval.retrieval.metrics",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'brainfusion.eval' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
