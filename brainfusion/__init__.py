"""brainfusion: relate brains to genomes, and say honestly what came out.

The parts load on first use, so that `import brainfusion` costs nothing:

    brainfusion.data        cohorts, recordings, splits, standardisation, simulation
    brainfusion.encoders    Brain-JEPA and BrainLM: pretrain, load, embed
    brainfusion.genetics    DNA embeddings of Evo 2, GENERator and Caduceus
    brainfusion.alignment   projectors, exact InfoNCE, training
    brainfusion.eval        retrieval, probes, baselines, statistics, report
"""

from importlib import import_module
from types import ModuleType

__version__ = "0.1.0"

_PARTS = ("runtime", "data", "encoders", "genetics", "alignment", "eval", "cli")


def __getattr__(name: str) -> ModuleType:
    if name in _PARTS:
        return import_module(f"brainfusion.{name}")
    raise AttributeError(f"module 'brainfusion' has no attribute '{name}'")


def __dir__() -> list[str]:
    return [*_PARTS, "__version__"]
