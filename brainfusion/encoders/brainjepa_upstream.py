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

A target encoder alone, which is what downstream tasks load, gives a model that encodes; its other
parts are then said to be untrained.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from brainfusion.encoders.brainjepa import (
    LAYER_NORM_EPS,
    MLP_RATIO,
    PRESETS,
    TARGET_NORM_EPS,
    BrainJEPA,
    BrainJEPAConfig,
)
from brainfusion.encoders.upstream_files import check_tensors, read_tensors
from brainfusion.runtime import config as configs
from brainfusion.runtime.errors import CheckpointError, UserError, nearest
from brainfusion.runtime.logs import say

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
SIZES = {"vit_small": "small", "vit_base": "base", "vit_large": "large"}
"""Upstream's `model_name`, in place of embed_dim, depth and num_heads, and our preset."""

# Numbers that upstream's code fixes: a config may state them, with these values alone.
_FIXED = {
    "act": "gelu (erf)",
    "drop_path": 0,
    "fc_norm_eps": 1e-6,
    "in_chans": 1,
    "layer_norm_eps": LAYER_NORM_EPS,
    "mlp_ratio": MLP_RATIO,
    "qkv_bias": True,
    "target_layer_norm_eps": TARGET_NORM_EPS,
}
_SECTIONS = ("data", "logging", "mask", "meta", "optimization")
# Keys of upstream's YAML that say how it trained, not what the model is.
_UNREAD = (
    *("batch_size", "num_workers", "pin_mem", "gradient_csv_path", "folder", "write_tag"),
    *("allow_overlap", "min_keep", "enc_mask_scale", "pred_mask_R_scale", "pred_mask_T_roi_scale"),
    *("pred_mask_R_roi_scale", "pred_mask_T_scale", "load_checkpoint", "read_checkpoint"),
    *("use_bfloat16", "accumulation_steps", "attn_mode", "downsample", "mask_mode"),
    *("use_standatdization", "ema", "epochs", "final_lr", "final_weight_decay", "ipe_scale", "lr"),
    *("start_lr", "warmup", "weight_decay"),
)

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
    """Build the module from upstream's state dicts, strictly, in evaluation mode.

    Args:
        state: `{"encoder": ..., "predictor": ..., "target_encoder": ...}`, or flat with
            `encoder/` and so on in front of each key, as `to_upstream_state` gives it; or the
            target encoder's state dict alone. Keys may have `module.` in front.
        config: Upstream's config keys, flat or in the sections of its YAML, or ours; None: the
            published size of that width.
        gradient: The gradient table, an array [p, g] or [1, p, g], or a .csv or .npy file; needed
            by 'mapping'.

    Raises:
        CheckpointError: A part or key is missing, not known, or of another shape.
        UserError: The config or the gradient table does not fit.
    """
    parts = _parts(state)
    table = None if gradient is None else read_gradient(gradient)
    if config is None:
        settings = _published(parts["target_encoder"])
    elif isinstance(config, BrainJEPAConfig):
        settings = config
    else:
        settings = config_from_upstream(config)
        if table is not None and table.ndim > 1 and "gradient_dim" not in _flat(config):
            settings = replace(settings, gradient_dim=table.shape[-1])
    if settings.positions == "mapping" and table is None:
        raise UserError(
            "Brain-JEPA's checkpoints do not hold the gradient table that its positions are "
            f"mapped from: pass gradient=, a {settings.n_parcels} x {settings.gradient_dim} array "
            "or .csv file (gradient_mapping_450.csv in its repository)."
        )
    module = BrainJEPA(settings, table)
    for name, part in parts.items():
        _load(module.get_submodule(name), name, part)
    if "encoder" not in parts:
        module.encoder.load_state_dict(module.target_encoder.state_dict())
        say(
            "the checkpoint holds Brain-JEPA's target encoder alone: encode() is whole; the "
            "context encoder is a copy of it, and the predictor is untrained."
        )
    return module.eval()


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
            flat[f"{name}/{_renamed(ours, name, back=True)}"] = _theirs(ours, value).clone()
    return flat


def config_from_upstream(values: Mapping[str, Any]) -> BrainJEPAConfig:
    """Our config from upstream's keys: crop_size, patch_size, embed_dim, depth and so on.

    `model_name` may stand for embed_dim, depth and num_heads, as in upstream's YAML, whose keys
    about training are left unread. `gradient_dim` is 30 if not given.

    Raises:
        UserError: A key is missing or unknown, or has a value that upstream's code has not.
    """
    values = _flat(values)
    known = ("crop_size", *CONFIG_KEYS)
    accepted = (*known, "model_name", *_FIXED, *_UNREAD)
    for key, value in values.items():
        if key not in accepted:
            raise UserError(f"Brain-JEPA's config has no key '{key}'. {nearest(str(key), known)}")
        if key in _FIXED and value != _FIXED[key]:
            raise UserError(
                f"Brain-JEPA's config: {key}={value!r} is not implemented: its code fixes "
                f"{_FIXED[key]!r}."
            )
    ours = {CONFIG_KEYS[key]: values[key] for key in CONFIG_KEYS if key in values}
    if "model_name" in values:
        ours = _named_size(values["model_name"]) | ours
    needed = [key for key, name in CONFIG_KEYS.items() if name not in ours]
    missing = [key for key in ("crop_size",) if key not in values]
    missing += [key for key in needed if key != "gradient_dim"]
    if missing:
        raise UserError(f"Brain-JEPA's config lacks {', '.join(missing)}: give the whole config.")
    crop = values["crop_size"]
    if not isinstance(crop, (list, tuple)) or len(crop) != 2:
        raise UserError(f"crop_size={crop!r}: expected [parcels, TRs], for example [450, 160].")
    ours |= {"n_parcels": crop[0], "n_trs": crop[1]}
    return configs.from_dict(BrainJEPAConfig, ours, where="Brain-JEPA's config")


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of upstream's YAML without its sections."""
    if not isinstance(values, Mapping):
        raise UserError(
            f"Brain-JEPA's config is a {type(values).__name__}, expected a dict of its keys "
            "(crop_size, patch_size, embed_dim, ...) or None for a published size."
        )
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= value if key in _SECTIONS and isinstance(value, Mapping) else {key: value}
    return flat


def _named_size(name: Any) -> dict[str, Any]:
    if name not in SIZES:
        raise UserError(f"Brain-JEPA's config: model_name={name!r}. {nearest(str(name), SIZES)}")
    preset = PRESETS[SIZES[name]]
    return {key: getattr(preset, key) for key in ("width", "depth", "n_heads")}


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint file of the authors' code without running code in it.

    Raises:
        CheckpointError: Absent, truncated, damaged, of another kind, or holding code.
    """
    return read_tensors(path, expected="a Brain-JEPA checkpoint (.pth.tar or .safetensors)")


def read_gradient(gradient: np.ndarray | Tensor | str | Path) -> Tensor:
    """The gradient table from an array, a .npy file, or a .csv file with or without a header.

    Raises:
        UserError: The file is absent, or it or the array is not a table of numbers.
    """
    named = isinstance(gradient, (str, Path))
    where = f"the gradient table {gradient}" if named else "the gradient table"
    if named and not Path(gradient).is_file():
        raise UserError(f"{where} does not exist: expected a .csv or .npy file.")
    try:
        if isinstance(gradient, Tensor):
            return gradient.detach().to(torch.float32)
        table = _read_table(Path(gradient)) if named else gradient
        return torch.tensor(np.array(table, dtype=np.float32))
    except (ValueError, TypeError, EOFError) as error:
        reason = str(error).split("\n")[0]
        raise UserError(
            f"{where} is not a table of numbers ({reason}): expected one row a parcel, separated "
            "by commas, or a .npy array."
        ) from error


def _read_table(path: Path) -> np.ndarray:
    if path.suffix == ".npy":
        return np.load(path, allow_pickle=False)
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if lines and not _is_numeric(lines[0]):
        lines = lines[1:]
    if not lines:
        raise ValueError("it has no rows")
    return np.loadtxt(lines, delimiter=",", ndmin=2)


def _is_numeric(line: str) -> bool:
    try:
        [float(value) for value in line.split(",")]
    except ValueError:
        return False
    return True


def _parts(state: Mapping[str, Any]) -> dict[str, dict[str, Tensor]]:
    """The three state dicts, or the target encoder's alone, without `module.` in their keys."""
    if any(str(key).removeprefix("module.").startswith("patch_embed.") for key in state):
        state = {"target_encoder": state}
    nested: dict[str, dict[str, Tensor]] = {}
    for key, value in state.items():
        part, slash, rest = str(key).partition("/")
        if slash and part in PARTS:
            nested.setdefault(part, {})[rest] = value
        elif key in PARTS and isinstance(value, Mapping):
            nested[key] = dict(value)
        elif key not in DROPPED:
            raise CheckpointError(
                f"a Brain-JEPA checkpoint has no entry '{key}': expected encoder, predictor and "
                "target_encoder, each a state dict (give the file as the authors' code saved it)."
            )
    missing = [part for part in PARTS if part not in nested]
    if missing and nested.keys() != {"target_encoder"}:
        raise CheckpointError(
            f"the Brain-JEPA checkpoint lacks {', '.join(missing)}: give the pretraining "
            "checkpoint, not that of a downstream task, or its target_encoder alone."
        )
    for part, tensors in nested.items():
        check_tensors(tensors, where=f"the {part} of the Brain-JEPA checkpoint")
    return {
        part: {name.removeprefix("module."): value for name, value in nested[part].items()}
        for part in PARTS
        if part in nested
    }


def _load(module: torch.nn.Module, part: str, theirs: dict[str, Tensor]) -> None:
    """Copy one part's tensors, refusing any difference in keys or shapes."""
    own = dict(module.named_parameters())
    named = {key: _renamed(key, part) for key in theirs}
    unknown = [key for key, ours in named.items() if ours not in own]
    missing = [_renamed(key, part, back=True) for key in own if key not in named.values()]
    if unknown or missing:
        hint = ""
        if any("emb_w" in str(key) or "pos_embed_proj" in str(key) for key in unknown + missing):
            hint = " (is add_w right? 'origin' has emb_w, 'mapping' predictor_pos_embed_proj)"
        raise CheckpointError(
            f"the {part} of the checkpoint does not fit the config: {len(missing)} keys are "
            f"missing {missing[:3]}, {len(unknown)} are not known {unknown[:3]}{hint}: give the "
            "config that it was trained with."
        )
    for key, ours in named.items():
        assert ours is not None
        value, parameter = theirs[key], own[ours]
        expected = _theirs(ours, parameter).shape
        if value.shape != expected:
            raise CheckpointError(
                f"the {part} of the checkpoint is of another size than the config: {key} is "
                f"{tuple(value.shape)}, expected {tuple(expected)}: give the config that it was "
                "trained with."
            )
        with torch.no_grad():
            parameter.copy_(value.reshape(parameter.shape))


def _theirs(ours: str, value: Tensor) -> Tensor:
    """Our tensor in upstream's shape: its patch embedding is a convolution."""
    return value[:, None, None, :] if ours == "patch.weight" else value


def _renamed(key: str, part: str, *, back: bool = False) -> str | None:
    """Our name of upstream's key, or with `back` the other way round; None if there is none."""
    for theirs, ours in _RENAMED[part]:
        old, new = (ours, theirs) if back else (theirs, ours)
        if key == old or (old.endswith(".") and key.startswith(old)):
            return new + key.removeprefix(old)
    return None


def _published(encoder: dict[str, Tensor]) -> BrainJEPAConfig:
    """The published size of the encoder's width, with the kind of positions of its keys."""
    weight = encoder.get("patch_embed.proj.weight")
    width = None if weight is None else len(weight)
    positions = "origin" if "pos_embed_proj.emb_w" in encoder else "mapping"
    for name in ("small", "base", "large"):
        if PRESETS[name].width == width:
            return replace(PRESETS[name], positions=positions)
    raise UserError(
        f"the checkpoint has width {width}, which is no published size (384, 768, 1024): pass "
        "config=, the config that it was trained with."
    )
