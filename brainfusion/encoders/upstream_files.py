"""Files of the encoders' authors, read without running what may be in them."""

import pickle
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from brainfusion.runtime.errors import CheckpointError

SUFFIXES = (".bin", ".safetensors", ".tar", ".pth", ".pt")

# What torch's restricted reader raises on damaged bytes, found by damaging whole files.
_DAMAGE = (
    SafetensorError,
    RuntimeError,
    EOFError,
    OSError,
    LookupError,
    ValueError,  # UnicodeDecodeError too
    AssertionError,
    AttributeError,
    TypeError,
    OverflowError,
    MemoryError,
    struct.error,
)


def read_tensors(path: Path, *, expected: str) -> dict[str, Any]:
    """What a checkpoint file holds, on the CPU: a dict of tensors, plain values and dicts of them.

    Pickles are read with `weights_only=True` alone: no code in them is run.

    Args:
        path: A `.safetensors` file, or one of `torch.save` (`.bin`, `.pth.tar`, `.pth`, `.pt`).
        expected: What should have been given, for the errors.

    Raises:
        CheckpointError: Absent, of another kind, truncated, damaged, or holding code.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist: expected {expected}.")
    if path.suffix not in SUFFIXES:
        raise CheckpointError(f"{path} ends in '{path.suffix}': expected {expected}.")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} holds more than tensors and plain values, or is no checkpoint: such a pickle "
            f"could run code and is never run. Expected {expected}."
        ) from error
    except _DAMAGE as error:
        reason = (str(error).strip() or type(error).__name__).split("\n")[0][:120]
        raise CheckpointError(
            f"{path} is truncated, damaged or no checkpoint ({reason}): download it again. "
            f"Expected {expected}."
        ) from error
    if not isinstance(state, dict):
        raise CheckpointError(
            f"{path} holds a {type(state).__name__}, not a dict: expected {expected}."
        )
    return state


def check_tensors(state: Mapping[Any, Any], *, where: str) -> None:
    """Refuse a state dict with anything but tensors by name.

    Raises:
        CheckpointError: The first entry that is something else is named.
    """
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise CheckpointError(
                f"{where} is not a flat dict of tensors: '{key}' is a {type(value).__name__}. Give "
                "the state dict itself."
            )


def unwrapped(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Keys without the `module.` that DistributedDataParallel puts in front of all of them."""
    if state and all(key.startswith("module.") for key in state):
        return {key.removeprefix("module."): value for key, value in state.items()}
    return dict(state)
