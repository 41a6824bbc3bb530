"""Training checkpoints: folders that are whole or absent, the newest found by name."""

import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from brainfusion.runtime.errors import CheckpointError
from brainfusion.runtime.files import atomic_folder, read_json, write_json

FORMAT = 1


def save(
    run_dir: Path,
    step: int,
    *,
    weights: dict[str, Tensor],
    optimizer: dict[str, Any],
    state: dict[str, Any],
    keep_last: int = 2,
) -> Path:
    """Write `run_dir/checkpoints/step-NNNNNNN`, then drop all but the newest `keep_last`."""
    target = run_dir / "checkpoints" / f"step-{step:07d}"
    with atomic_folder(target) as folder:
        save_weights(folder / "model.safetensors", weights)
        torch.save(optimizer, folder / "optimizer.pt")
        write_json(folder / "state.json", {"format": FORMAT, "step": step, **state})
    for old in steps(run_dir)[:-keep_last]:
        shutil.rmtree(old)
    return target


def save_weights(path: Path, weights: dict[str, Tensor]) -> None:
    """Write tensors as safetensors."""
    save_file({key: value.detach().cpu().contiguous() for key, value in weights.items()}, path)


def steps(run_dir: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    return sorted((run_dir / "checkpoints").glob("step-*"))


def newest(path: Path) -> Path:
    """The checkpoint at `path`: itself, or the newest of the run in it.

    Raises:
        CheckpointError: There is none.
    """
    if (path / "state.json").exists():
        return path
    found = steps(path)
    if not found:
        raise CheckpointError(
            f"{path} holds no checkpoint: expected a run folder or a checkpoint folder; "
            "'brainfusion pretrain' makes one."
        )
    return found[-1]


def load_weights(path: Path) -> dict[str, Tensor]:
    """Read `model.safetensors` of a checkpoint folder.

    Raises:
        CheckpointError: The file is absent or truncated.
    """
    file = path / "model.safetensors"
    try:
        return load_file(file)
    except (SafetensorError, FileNotFoundError) as error:
        raise CheckpointError(
            f"{file} is truncated or not a safetensors file ({error}): use another checkpoint of "
            "the run, or train again."
        ) from error


def load_state(path: Path) -> dict[str, Any]:
    """Read `state.json` of a checkpoint folder."""
    file = path / "state.json"
    if not file.exists():
        raise CheckpointError(f"{path} is not a checkpoint: it has no state.json.")
    state = read_json(file)
    if state.get("format") != FORMAT:
        raise CheckpointError(
            f"{file} has format {state.get('format')}, this version reads {FORMAT}: "
            "use the brainfusion version that wrote it."
        )
    return state


def load_optimizer(path: Path) -> dict[str, Any]:
    """Read the optimizer's state of a checkpoint folder."""
    return torch.load(path / "optimizer.pt", weights_only=True, map_location="cpu")
