"""The folder of a trained alignment: its files read and checked, and which model it is."""

from pathlib import Path
from typing import Any

import numpy as np

from brainfusion.runtime.errors import CheckpointError
from brainfusion.runtime.files import hash_file, hash_json, read_json

FORMAT = 2
"""Of the folder; 1 knew neither a head nor other kinds of models, and is still read."""
_ARRAYS = ("model.safetensors", "conditioners.safetensors", "head.safetensors")


def model_folder(path: Path) -> Path:
    """The model in the folder of a run, or the folder itself."""
    whole = not (path / "state.json").exists() and (path / "model").is_dir()
    return path / "model" if whole else path


def model_hash(path: Path | str) -> str:
    """Which model it is: a hash (16 hex digits) of all its arrays, and of nothing else.

    Args:
        path: The folder of a run, or the `model` folder in it.

    Raises:
        CheckpointError: There is no trained alignment.
    """
    folder = model_folder(Path(path))
    files = [folder / name for name in _ARRAYS if (folder / name).is_file()]
    if not files:
        raise CheckpointError(f"no trained alignment in {folder} (no {_ARRAYS[0]}): align again.")
    return hash_json({file.name: hash_file(file) for file in files})


def read_state(folder: Path) -> dict[str, Any]:
    """What `state.json` says.

    Raises:
        CheckpointError: It is not there, of something else, or of another format.
    """
    path = folder / "state.json"
    if not path.exists():
        raise CheckpointError(
            f"no trained alignment in {folder} (no state.json): expected the folder of an "
            "alignment run, or its 'model' folder. Make one with scripts/align.py."
        )
    state = read_json(path)
    if not isinstance(state, dict) or state.get("kind") != "alignment":
        raise CheckpointError(
            f"{folder} is a checkpoint of something else than an alignment: expected the folder "
            "of an alignment run. Make one with scripts/align.py."
        )
    if state.get("format") not in (1, FORMAT):
        raise CheckpointError(
            f"{folder} has format {state.get('format')}, this version reads 1 to {FORMAT}: "
            "align again, or use the version that wrote it."
        )
    return state


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a safetensors file.

    Raises:
        CheckpointError: It is missing or cut off.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        return load_file(path)
    except (SafetensorError, FileNotFoundError) as error:
        raise CheckpointError(
            f"{path} is missing or cut off ({error}): restore it, or align again."
        ) from error
