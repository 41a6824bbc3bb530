"""Peak memory of this process and of its device."""

import resource
import sys
from typing import Any


def peak_mib() -> float:
    """The largest resident set of this process so far, in MiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (2**20 if sys.platform == "darwin" else 2**10), 1)


def device_peak_mib(device: Any) -> dict[str, float]:
    """The largest memory that tensors took on a CUDA device so far, as `gpu_peak_mib`."""
    if device.type != "cuda":
        return {}
    import torch

    return {"gpu_peak_mib": round(torch.cuda.max_memory_allocated(device) / 2**20, 1)}
