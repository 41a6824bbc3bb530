"""Scores of retrieval and of linear probes, with chance levels, intervals and honest nulls.

Everything loads on first use; nothing here imports torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from brainfusion.eval.index import RetrievalIndex
    from brainfusion.eval.probes import probe
    from brainfusion.eval.retrieval import retrieval_metrics

__all__ = ["RetrievalIndex", "probe", "retrieval_metrics"]

_HOME = {
    "RetrievalIndex": "brainfusion.eval.index",
    "probe": "brainfusion.eval.probes",
    "retrieval_metrics": "brainfusion.eval.retrieval",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'brainfusion.eval' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
