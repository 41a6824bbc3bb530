"""Our checkpoints of encoders: built for a cohort, saved complete, loaded strictly."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from brainfusion import __version__, encoders
from brainfusion.data.atlas import Atlas
from brainfusion.data.cohort import Cohort
from brainfusion.data.conditioning import InputConditioning
from brainfusion.encoders import ENCODERS
from brainfusion.encoders.brainjepa import BrainJEPAConfig
from brainfusion.encoders.gradients import connectivity_of, gradient_table
from brainfusion.runtime import checkpoint, config
from brainfusion.runtime.errors import CheckpointError, UserError, nearest
from brainfusion.runtime.files import hash_file
from brainfusion.runtime.logs import say


@dataclass(frozen=True, kw_only=True, eq=False)
class Pretrained:
    """A trained encoder with what becomes of its inputs."""

    model: str
    module: nn.Module
    conditioning: InputConditioning
    atlas: Atlas
    state: dict[str, Any]
    path: Path
    hash: str


def build(model: str, settings: Any, cohort: Cohort, rows: Sequence[int]) -> nn.Module:
    """A fresh encoder that fits the cohort.

    Raises:
        UserError: The architecture expects another number of parcels.
    """
    n_parcels = cohort.atlas.n_parcels
    if settings.n_parcels != n_parcels:
        raise UserError(
            f"the cohort '{cohort.name}' has {n_parcels} parcels but the encoder '{model}' expects "
            f"{settings.n_parcels}. Parcel order carries meaning, so it is not padded or cut: "
            "re-parcellate, or use --preset tiny, which takes the cohort's."
        )
    gradient = _gradient(settings, cohort, rows) if model == "brainjepa" else None
    return encoders.build(model, settings, gradient=gradient)


def encoder_weights(module: nn.Module) -> dict[str, Tensor]:
    """The encoder's tensors, complete: buffers that it needs are among them."""
    return dict(module.state_dict())


def load_into(module: nn.Module, folder: Path) -> None:
    """Load a checkpoint's weights, strictly.

    Raises:
        CheckpointError: Keys or shapes differ.
    """
    weights = checkpoint.load_weights(folder)
    own = module.state_dict()
    missing, unknown = sorted(own.keys() - weights), sorted(weights.keys() - own.keys())
    wrong = [key for key in own.keys() & weights if own[key].shape != weights[key].shape]
    if missing or unknown or wrong:
        raise CheckpointError(
            f"{folder} does not fit the architecture in its state.json: {len(missing)} keys "
            f"missing {missing[:2]}, {len(unknown)} unknown {unknown[:2]}, {len(wrong)} of "
            f"another shape {wrong[:2]}. The folder was changed after it was written: use "
            "another checkpoint."
        )
    module.load_state_dict(weights)


def load_pretrained(path: Path, model: str | None = None, *, untrained: bool = False) -> Pretrained:
    """Load the checkpoint at `path` (a run folder or a checkpoint folder) for embedding.

    Args:
        path: The folder.
        model: The encoder that is expected.
        untrained: Take the weights that the run started from, drawn again from its seed: the
            baseline that its training has to beat. Recordings that the recipe enlarges for the
            sake of training are fed as they are: with the pooling of small sizes, `parcel-std`, an
            untrained encoder does much better so (docs/performance.md).

    Raises:
        CheckpointError: It is absent, truncated, or of another model than `model`.
    """
    if not path.exists():
        raise CheckpointError(
            f"{path} does not exist: expected a run of 'brainfusion pretrain' or one of its "
            "checkpoint folders."
        )
    folder = checkpoint.newest(path)
    state = checkpoint.load_state(folder)
    if absent := sorted({"model", "config", "config_class", "conditioning", "atlas"} - set(state)):
        raise CheckpointError(
            f"{folder} is no checkpoint of an encoder (its state.json lacks {', '.join(absent)}): "
            "expected a run of 'brainfusion pretrain'."
        )
    if state["model"] not in ENCODERS:
        raise CheckpointError(
            f"{folder} holds a '{state['model']}' encoder, which this version does not know: use "
            "the brainfusion version that wrote it."
        )
    if model is not None and state["model"] != model:
        raise CheckpointError(
            f"{folder} holds a {state['model']} encoder, expected {model}: give that model's "
            f"checkpoint, or pass --model {state['model']}."
        )
    settings = config.from_dict(_config_class(state), state["config"]["encoder"], where=str(folder))
    # Brain-JEPA's gradient table is among the weights.
    module = encoders.build(state["model"], settings)
    load_into(module, folder)
    conditioning = InputConditioning.from_dict(state["conditioning"])
    if untrained:
        conditioning = _not_enlarged(conditioning)
        gradient = dict(module.named_buffers()).get("encoder.position.gradient")
        torch.manual_seed(state["config"]["run"]["seed"])
        module = encoders.build(state["model"], settings, gradient=gradient)
    return Pretrained(
        model=state["model"],
        module=module.eval(),
        conditioning=conditioning,
        atlas=Atlas.from_dict(state["atlas"]),
        state=state,
        path=folder,
        hash="untrained" if untrained else hash_file(folder / "model.safetensors"),
    )


def _not_enlarged(conditioning: InputConditioning) -> InputConditioning:
    """The same with `divide_by` at least 1."""
    factor, statistics = conditioning.standardiser.divide_by, conditioning.statistics
    if factor >= 1.0:
        return conditioning
    say(
        f"the untrained encoder is fed recordings divided by 1, not by {factor:g} as in training: "
        "a harder baseline with parcel-std pooling, which training has to beat."
    )
    if statistics is not None:
        mean = statistics.mean | {"log_sd": statistics.mean["log_sd"] + math.log(factor)}
        statistics = dataclasses.replace(statistics, mean=mean)
    standardiser = dataclasses.replace(conditioning.standardiser, divide_by=1.0)
    return dataclasses.replace(conditioning, standardiser=standardiser, statistics=statistics)


def _config_class(state: dict[str, Any]) -> type[Any]:
    """The config class that a checkpoint was written with: a model may have several families."""
    presets = ENCODERS[state["model"]].presets.values()
    families = {type(preset).__name__: type(preset) for preset in presets}
    if state["config_class"] not in families:
        raise CheckpointError(
            f"the checkpoint was written for {state['config_class']}, this version knows "
            f"{', '.join(families)}: use the brainfusion version that wrote it."
        )
    return families[state["config_class"]]


def describe_training_data(cohort: Cohort, rows: Sequence[int]) -> dict[str, Any]:
    """What a checkpoint says of the cohort that it was trained on."""
    index = cohort.recordings.index[list(rows)]
    return {
        "package_version": __version__,
        "cohort": cohort.name,
        "cohort_hash": cohort.hash,
        "splits_hash": cohort.splits().hash,
        "n_people": index["subject"].n_unique(),
        "n_recordings": len(index),
        "tr_s": _tr_s(cohort),
        "atlas": cohort.atlas.to_dict(),
    }


def known_model(model: str) -> str:
    """`model`, if there is such an encoder."""
    if model not in ENCODERS:
        raise UserError(f"unknown model '{model}'. {nearest(model, ENCODERS)}")
    return model


def _tr_s(cohort: Cohort) -> float | None:
    values = cohort.recordings.index["tr_s"].drop_nulls()
    return float(values.median()) if len(values) else None  # type: ignore[arg-type]


def _gradient(settings: BrainJEPAConfig, cohort: Cohort, rows: Sequence[int]) -> np.ndarray | None:
    """Gradient coordinates: the atlas's, or made from training people's connectivity."""
    if settings.positions == "origin":
        return None
    if cohort.atlas.gradient is not None:
        return np.asarray(cohort.atlas.gradient, dtype=np.float32)
    say(
        f"the atlas '{cohort.atlas.name}' has no gradient coordinates: they are made from the "
        f"connectivity of {len(rows)} training recordings."
    )
    connectivity = connectivity_of(cohort.recordings, rows)
    return gradient_table(connectivity, settings.gradient_dim).astype(np.float32)
