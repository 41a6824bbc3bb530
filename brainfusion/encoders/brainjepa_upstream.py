"""Brain-JEPA checkpoints of the authors' repository (commit b1dfa93e), read and written.

A file is a dict with `encoder`, `predictor` and `target_encoder` (keys with `module.` in front) and
the state of the optimiser. What becomes of each key:

    upstream                                     ours
    patch_embed.proj.weight [d, 1, 1, s]         patch.weight [d, s]: a Linear on patches
    patch_embed.proj.bias                        patch.bias
    pos_embed_proj.emb_h                         position.time_table (theirs says h, it is time)
    pos_embed_proj.emb_w                         position.parcel_table ('origin' only)
    pos_embed_proj.predictor_pos_embed_proj.*    position.mapping.* ('mapping' only)
    predictor_embed.*, predictor_blocks.*        embed.*, blocks.*
    predictor_norm.*, predictor_proj.*           norm.*, project.*
    predictor_2dpe_proj.*                        position.*, as pos_embed_proj.*
    mask_token, blocks.*, norm.*                 unchanged
    opt, scaler, epoch, loss, batch_size, ...    dropped: state of their training
    (in no file)                                 position.gradient: must be given
"""

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from brainfusion.encoders.brainjepa import PRESETS, BrainJEPA, BrainJEPAConfig
from brainfusion.runtime import config as configs
from brainfusion.runtime.errors import CheckpointError, UserError, nearest

PARTS = ("encoder", "predictor", "target_encoder")
DROPPED = ("opt", "scaler", "epoch", "loss", "batch_size", "world_size", "lr")
CONFIG_KEYS = {
    "embed_dim": "width",
    "depth": "depth",
    "num_heads": "n_heads",
    "patch_size": "patch_trs",
    "pred_emb_dim": "predictor_width",
    "pred_depth": "predictor_depth",
    "add_w": "positions",
    "gradient_dim": "gradient_dim",
}
"""Upstream's config keys and ours; `crop_size` is [n_parcels, n_trs]."""

_POSITION = (
    ("emb_h", "time_table"),
    ("emb_w", "parcel_table"),
    ("predictor_pos_embed_proj.", "mapping."),
)
_ENCODER = (
    ("patch_embed.proj.", "patch."),
    *((f"pos_embed_proj.{theirs}", f"position.{ours}") for theirs, ours in _POSITION),
    ("blocks.", "blocks."),
    ("norm.", "norm."),
)
_PREDICTOR = (
    ("mask_token", "mask_token"),
    ("predictor_embed.", "embed."),
    *((f"predictor_2dpe_proj.{theirs}", f"position.{ours}") for theirs, ours in _POSITION),
    ("predictor_blocks.", "blocks."),
    ("predictor_norm.", "norm."),
    ("predictor_proj.", "project."),
)
_RENAMED = {"encoder": _ENCODER, "predictor": _PREDICTOR, "target_encoder": _ENCODER}


def from_upstream_state(
    state: Mapping[str, Any],
    config: Mapping[str, Any] | BrainJEPAConfig | None = None,
    gradient: np.ndarray | Tensor | str | Path | None = None,
) -> BrainJEPA:
    """Build the module from upstream's state dicts, strictly.

    Args:
        state: `{"encoder": ..., "predictor": ..., "target_encoder": ...}`, or flat with
            `encoder/` and so on in front of each key, as `to_upstream_state` gives it.
        config: Upstream's config keys, or ours; None: the published size of that width.
        gradient: The gradient table, an array [p, g] or a .csv or .npy file; needed by 'mapping'.

    Raises:
        CheckpointError: A part or key is missing, not known, or of another shape.
        UserError: The config or the gradient table does not fit.
    """
    parts = _parts(state)
    if config is None:
        config = _published(parts["encoder"])
    elif not isinstance(config, BrainJEPAConfig):
        config = config_from_upstream(config)
    if config.positions == "mapping" and gradient is None:
        raise UserError(
            "Brain-JEPA's checkpoints do not hold the gradient table that its positions are "
            f"mapped from: pass gradient=, a {config.n_parcels} x {config.gradient_dim} array or "
            ".csv file (gradient_mapping_450.csv in its repository)."
        )
    module = BrainJEPA(config, read_gradient(gradient) if gradient is not None else None)
    for name, part in parts.items():
        _load(module.get_submodule(name), name, part)
    return module


def to_upstream_state(module: BrainJEPA, grad: bool = False) -> dict[str, Tensor]:
    """Upstream's keys, flat, with `encoder/`, `predictor/` or `target_encoder/` in front.

    With `grad`, the gradients of the parameters that have one, instead of their values. The
    gradient table of the positions is left out: upstream keeps it outside.
    """
    flat = {}
    for name in PARTS:
        for ours, parameter in module.get_submodule(name).named_parameters():
            value = parameter.grad if grad else parameter.detach()
            if value is None:
                continue
            if ours == "patch.weight":
                value = value[:, None, None, :]
            flat[f"{name}/{_renamed(ours, name, back=True)}"] = value.clone()
    return flat


def config_from_upstream(values: Mapping[str, Any]) -> BrainJEPAConfig:
    """Our config from upstream's keys: crop_size, patch_size, embed_dim, depth and so on."""
    known = ("crop_size", *CONFIG_KEYS)
    for key in values:
        if key not in known:
            raise UserError(f"Brain-JEPA's config has no key '{key}'. {nearest(key, known)}")
    missing = [key for key in known if key not in values and key != "gradient_dim"]
    if missing:
        raise UserError(f"Brain-JEPA's config lacks {', '.join(missing)}: give the whole config.")
    crop = values["crop_size"]
    if not isinstance(crop, (list, tuple)) or len(crop) != 2:
        raise UserError(f"crop_size={crop!r}: expected [parcels, TRs], for example [450, 160].")
    ours = {CONFIG_KEYS[key]: value for key, value in values.items() if key != "crop_size"}
    ours |= {"n_parcels": crop[0], "n_trs": crop[1]}
    return configs.from_dict(BrainJEPAConfig, ours, where="Brain-JEPA's config")


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint file of the authors' code (.pth.tar) without running code in it."""
    if not path.is_file():
        raise CheckpointError(
            f"{path} does not exist: expected a Brain-JEPA checkpoint (.pth.tar)."
        )
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        reason = str(error).strip().split("\n")[0][:120]
        raise CheckpointError(
            f"{path} is truncated, not a torch file, or holds more than tensors and plain values, "
            f"which is never run ({reason}): download it again."
        ) from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} holds a {type(state).__name__}, expected a dict of tensors.")
    return state


def read_gradient(gradient: np.ndarray | Tensor | str | Path) -> Tensor:
    """The gradient table from an array, a .npy file, or a .csv file with or without a header."""
    if not isinstance(gradient, (str, Path)):
        return torch.as_tensor(gradient, dtype=torch.float32)
    path = Path(gradient)
    if not path.is_file():
        raise UserError(f"the gradient table {path} does not exist: expected a .csv or .npy file.")
    try:
        if path.suffix == ".npy":
            table = np.load(path, allow_pickle=False)
        else:
            with path.open(encoding="utf-8") as lines:
                first = lines.readline()
            table = np.loadtxt(path, delimiter=",", skiprows=int(not _is_numeric(first)), ndmin=2)
    except (ValueError, UnicodeDecodeError) as error:
        raise UserError(
            f"the gradient table {path} is not a table of numbers ({error}): expected one row a "
            "parcel, separated by commas, or a .npy array."
        ) from error
    return torch.as_tensor(table, dtype=torch.float32)


def _is_numeric(line: str) -> bool:
    try:
        [float(value) for value in line.split(",")]
    except ValueError:
        return False
    return True


def _parts(state: Mapping[str, Any]) -> dict[str, dict[str, Tensor]]:
    """The three state dicts, without `module.` in front of their keys."""
    nested: dict[str, dict[str, Tensor]] = {}
    for key, value in state.items():
        part, slash, rest = key.partition("/")
        if slash and part in PARTS:
            nested.setdefault(part, {})[rest] = value
        elif key in PARTS and isinstance(value, Mapping):
            nested[key] = {name.removeprefix("module."): v for name, v in value.items()}
        elif key not in DROPPED:
            raise CheckpointError(
                f"a Brain-JEPA checkpoint has no entry '{key}': expected encoder, predictor and "
                "target_encoder, each a state dict (give the file as the authors' code saved it)."
            )
    if missing := [part for part in PARTS if part not in nested]:
        raise CheckpointError(
            f"the Brain-JEPA checkpoint lacks {', '.join(missing)}: give the pretraining "
            "checkpoint, not that of a downstream task."
        )
    return {part: nested[part] for part in PARTS}


def _load(module: torch.nn.Module, part: str, theirs: dict[str, Tensor]) -> None:
    """Copy one part's tensors, refusing any difference in keys or shapes."""
    own = dict(module.named_parameters())
    values, unknown = {}, []
    for key, value in theirs.items():
        ours = _renamed(key, part)
        if ours not in own:
            unknown.append(key)
        else:
            values[ours] = value.flatten(1) if ours == "patch.weight" else value
    missing = [_renamed(key, part, back=True) for key in own if key not in values]
    if unknown or missing:
        hint = ""
        if any("emb_w" in key or "pos_embed_proj" in key for key in unknown + missing):
            hint = " (is add_w right? 'origin' has emb_w, 'mapping' predictor_pos_embed_proj)"
        raise CheckpointError(
            f"the {part} of the checkpoint does not fit the config: {len(missing)} keys are "
            f"missing {missing[:3]}, {len(unknown)} are not known {unknown[:3]}{hint}: give the "
            "config that it was trained with."
        )
    for key, value in values.items():
        if value.shape != own[key].shape:
            raise CheckpointError(
                f"the {part} of the checkpoint is of another size than the config: "
                f"{_renamed(key, part, back=True)} is {tuple(value.shape)}, expected "
                f"{tuple(own[key].shape)}: give the config that it was trained with."
            )
    with torch.no_grad():
        for key, value in values.items():
            own[key].copy_(value)


def _renamed(key: str, part: str, *, back: bool = False) -> str | None:
    """Our name of upstream's key, or with `back` the other way round; None if there is none."""
    for theirs, ours in _RENAMED[part]:
        old, new = (ours, theirs) if back else (theirs, ours)
        if key == old or (old.endswith(".") and key.startswith(old)):
            return new + key.removeprefix(old)
    return None


def _published(encoder: dict[str, Tensor]) -> BrainJEPAConfig:
    weight = encoder.get("patch_embed.proj.weight")
    width = None if weight is None else len(weight)
    for name in ("small", "base", "large"):
        if PRESETS[name].width == width:
            return PRESETS[name]
    raise UserError(
        f"the checkpoint has width {width}, which is no published size (384, 768, 1024): pass "
        "config=, the config that it was trained with."
    )
