"""Going on with a run: what a checkpoint says of it, and when it may be gone on with."""

from pathlib import Path
from typing import Any

from torch import nn

from brainfusion.data.cohort import Cohort
from brainfusion.encoders.checkpoints import describe_training_data, load_into
from brainfusion.encoders.pretrain_config import PretrainConfig
from brainfusion.encoders.pretrain_inputs import PretrainInputs
from brainfusion.runtime import checkpoint, config
from brainfusion.runtime.distributed import Ranks
from brainfusion.runtime.errors import CheckpointError
from brainfusion.runtime.files import hash_json
from brainfusion.runtime.logs import say

FREE = ("efficiency", "watch")
"""Groups of the config that change no result: they may change from one start to the next."""


def state_of(
    settings: PretrainConfig, inputs: PretrainInputs, cohort: Cohort, ranks: Ranks
) -> dict[str, Any]:
    """What a checkpoint keeps beside weights and optimiser; the same at every step."""
    return {
        "model": settings.model,
        "config": config.to_dict(settings),
        "config_class": type(settings.encoder).__name__,
        "world_size": ranks.world_size,
        "conditioning": inputs.conditioning.to_dict(),
        **describe_training_data(cohort, inputs.train_rows),
    }


def facts(settings: PretrainConfig, inputs: PretrainInputs, cohort: Cohort) -> dict[str, Any]:
    """What all processes must have in common, to be compared at the start."""
    compared = config.to_dict(settings)
    del compared["watch"]
    return {
        "a cohort of the hash": cohort.hash,
        "splits of the hash": cohort.splits().hash,
        "training recordings:": len(inputs.train_rows),
        "validation recordings:": len(inputs.validation_rows),
        "options of the hash": hash_json(compared),
    }


def resume(
    settings: PretrainConfig, run_dir: Path, cohort: Cohort, encoder: nn.Module, ranks: Ranks
) -> int:
    """Load the newest checkpoint's weights into `encoder`; returns its step, 0 without one.

    Raises:
        CheckpointError: It was made with another config, or on another state of the cohort; what
            differs is named.
    """
    if not checkpoint.steps(run_dir):
        return 0
    folder = checkpoint.newest(run_dir)
    state = checkpoint.load_state(folder)
    before, now = dict(state["config"]), config.to_dict(settings)
    for group in FREE:
        before.pop(group, None)
        del now[group]
    if changed := differences(before, now):
        raise CheckpointError(
            f"{run_dir} was trained with another config ({'; '.join(changed)}): give another "
            "--out, or --restart to train it anew."
        )
    for name, hash_now in (("cohort", cohort.hash), ("splits", cohort.splits().hash)):
        if (hash_before := state.get(f"{name}_hash", hash_now)) != hash_now:
            raise CheckpointError(
                f"{run_dir} was trained on another state of the cohort ({name} {hash_before}, now "
                f"{hash_now}): give another --out, or --restart to train it anew."
            )
    if (world_before := state.get("world_size", ranks.world_size)) != ranks.world_size:
        say(
            f"{run_dir} was trained on {world_before} process(es) and goes on with "
            f"{ranks.world_size}: batches and masks stay the same, but sums are taken in another "
            "order and dropout is drawn anew, so it is not the same run to the bit."
        )
    load_into(encoder, folder)
    return int(state["step"])


def differences(before: Any, now: Any, where: str = "") -> list[str]:
    """What differs between two configs as plain values, "path: before -> now" each."""
    if isinstance(before, dict) and isinstance(now, dict):
        names = sorted({*before, *now})
        return [
            text
            for name in names
            for text in differences(before.get(name), now.get(name), f"{where}.{name}".strip("."))
        ]
    return [] if before == now else [f"{where}: {before} -> {now}"]
