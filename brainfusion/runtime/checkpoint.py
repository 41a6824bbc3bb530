"""Training checkpoints: folders that are whole or absent, the newest found by name."""

import os
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from brainfusion.runtime.errors import CheckpointError, UserError
from brainfusion.runtime.files import atomic_folder, read_json, set_default_mode, write_json

FORMAT = 1


def save(
    run_dir: Path,
    step: int,
    *,
    weights: dict[str, Tensor],
    optimizer: dict[str, Any] | Callable[[Path], None],
    state: dict[str, Any],
    keep_last: int = 2,
    keep_every: int = 0,
) -> Path:
    """Write `run_dir/checkpoints/step-NNNNNNN`, then drop older ones.

    What an earlier process left of a checkpoint when it was killed is cleared away.

    Args:
        run_dir: Of the run.
        step: Optimiser steps that were taken.
        weights: The model.
        optimizer: Its state, or what writes that into a folder (shards of several processes).
        state: All else, as JSON.
        keep_last: The newest so many are kept.
        keep_every: Those at multiples of this step are kept, too; 0: no others.

    Raises:
        UserError: The disk is full or not writable; the checkpoints before it are untouched.
    """
    assert keep_last >= 1
    for remains in (run_dir / "checkpoints").glob(".step-*"):
        shutil.rmtree(remains, ignore_errors=True)
    target = run_dir / "checkpoints" / f"step-{step:07d}"
    try:
        with atomic_folder(target) as folder:
            save_weights(folder / "model.safetensors", weights)
            if callable(optimizer):
                optimizer(folder / "optimizer")
            else:
                _save_optimizer(folder / "optimizer.pt", optimizer)
            write_json(folder / "state.json", {"format": FORMAT, "step": step, **state})
            _to_disk(folder)
    except OSError as error:
        raise _unwritten(target, error.strerror) from error
    for old in steps(run_dir)[:-keep_last]:
        if not keep_every or int(old.name.removeprefix("step-")) % keep_every:
            shutil.rmtree(old)
    return target


def _to_disk(folder: Path) -> None:
    """Wait until all of it is on the disk: a name that survives a power cut holds its content."""
    for path in (*folder.rglob("*"), folder):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def save_weights(path: Path, weights: dict[str, Tensor]) -> None:
    """Write tensors as safetensors.

    Raises:
        UserError: The disk is full or not writable.
    """
    whole = {key: value.detach().cpu().contiguous() for key, value in weights.items()}
    try:
        save_file(whole, path)
    except SafetensorError as error:
        raise _unwritten(path, error) from error
    set_default_mode(path)


def steps(run_dir: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    found = (run_dir / "checkpoints").glob("step-*")
    named = [path for path in found if re.fullmatch(r"step-\d+", path.name)]
    return sorted(named, key=lambda path: int(path.name.removeprefix("step-")))


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
    try:
        state = read_json(file)
    except UserError as error:
        raise CheckpointError(str(error)) from error
    found = state.get("format") if isinstance(state, dict) else None
    if found != FORMAT:
        raise CheckpointError(
            f"{file} has format {found}, this version reads {FORMAT}: use the brainfusion version "
            "that wrote it."
        )
    return state


def load_optimizer(path: Path) -> dict[str, Any]:
    """Read the optimizer's state of a checkpoint folder.

    Raises:
        CheckpointError: The file is absent or truncated.
    """
    file = path / "optimizer.pt"
    try:
        return torch.load(file, weights_only=True, map_location="cpu")
    except (RuntimeError, EOFError, KeyError, pickle.UnpicklingError, OSError) as error:
        raise CheckpointError(
            f"{file} is absent, truncated or not an optimiser's state: remove {path} to resume "
            "from the checkpoint before it, or pass --restart."
        ) from error


def _save_optimizer(path: Path, optimizer: dict[str, Any]) -> None:
    try:
        torch.save(optimizer, path)
    except RuntimeError as error:  # what torch makes of a failed write
        raise _unwritten(path, error) from error


def _unwritten(path: Path, reason: object) -> UserError:
    text = " ".join(str(reason).split())
    return UserError(
        f"cannot write {path} ({text}): free space and check the folder's permissions; a run goes "
        "on from its last checkpoint when it is started again."
    )
