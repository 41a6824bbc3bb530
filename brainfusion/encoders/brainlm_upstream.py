"""BrainLM's published checkpoints: their keys and configs to ours and back, strictly.

Upstream is BrainLM at commit b591d88d (recording models) and transformers' ViTMAE with padding
(image models). Every key of a checkpoint is renamed, or dropped for a stated reason; any other is
an error.

| upstream | ours | |
| --- | --- | --- |
| `...attention.self.{query,key,value}` | `...attention.qkv` | joined, in this order |
| `*.pos_embedding.pe`, `*position_embeddings`, `*decoder_pos_embed` | | fixed tables, made again |
| `decoder.decoder_pred` of a recording model | | never used by upstream |
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from brainfusion.encoders.brainlm import MAX_PATCHES, BrainLM, BrainLMConfig, position_table
from brainfusion.encoders.brainlm_image import BrainLMImage, BrainLMImageConfig
from brainfusion.encoders.upstream_files import check_tensors, read_tensors, unwrapped
from brainfusion.runtime.config import from_dict
from brainfusion.runtime.errors import CheckpointError, UserError, nearest
from brainfusion.runtime.files import read_json
from brainfusion.runtime.logs import say

Family = Literal["recording", "image"]

TABLE_TOLERANCE = 5e-3
"""How far a stored position table may be from ours: bfloat16 rounding of numbers up to 1."""

_SHARED = {
    "hidden_size": "width",
    "num_hidden_layers": "depth",
    "num_attention_heads": "n_heads",
    "intermediate_size": "dim_hidden",
    "decoder_num_hidden_layers": "decoder_depth",
    "decoder_num_attention_heads": "decoder_n_heads",
    "decoder_intermediate_size": "decoder_dim_hidden",
}
_REQUIRED: dict[Family, dict[str, str]] = {
    "recording": _SHARED
    | {
        "num_brain_voxels": "n_parcels",
        "num_timepoints_per_voxel": "n_trs",
        "timepoint_patching_size": "patch_trs",
    },
    "image": _SHARED
    | {
        "decoder_hidden_size": "decoder_width",
        "image_size": "image_size",
        "patch_size": "patch_size",
    },
}
_OPTIONAL: dict[Family, dict[str, str]] = {
    # Left out, they take the defaults of upstream's config classes (`_DEFAULTS`, or ours if equal).
    "recording": {
        "mask_ratio": "mask_ratio",
        "loss_fn": "loss_fn",
        "use_tanh_decoder": "tanh_decoder",
        "conv_kernel_size": "conv_kernel_size",
        "hidden_dropout_prob": "dropout",
        "layer_norm_eps": "layer_norm_eps",
        "initializer_range": "init_std",
    },
    "image": {
        "mask_ratio": "mask_ratio",
        "num_channels": "n_channels",
        "qkv_bias": "qkv_bias",
        "layer_norm_eps": "layer_norm_eps",
        "initializer_range": "init_std",
    },
}
_FIXED: dict[Family, dict[str, Any]] = {
    "recording": {"hidden_act": "gelu", "inv_coeff_init_option": False},
    "image": {"hidden_act": "gelu", "norm_pix_loss": False, "train_mode": "auto_encode"},
}
_DEFAULTS: dict[Family, dict[str, Any]] = {"recording": {"mask_ratio": 0.5}, "image": {}}
_ALSO_READ = ("num_landmarks", "segment_means_seq_len", "decoder_hidden_size", "qkv_bias")
# Not applied here: said aloud when they are set. Upstream's recording models never read the first;
# its image models apply the others in training.
_UNUSED: dict[Family, tuple[str, ...]] = {
    "recording": ("norm_pix_loss",),
    "image": ("hidden_dropout_prob", "attention_probs_dropout_prob"),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class KeyTable:
    """What becomes of each key of a checkpoint."""

    renamed: dict[str, str]
    """Upstream's key to ours; three upstream keys may share one of ours."""
    dropped: dict[str, str]
    """Upstream's key to the reason."""
    missing: tuple[str, ...]
    """Upstream keys that our module needs and the checkpoint lacks."""
    unknown: tuple[str, ...]
    """Keys of the checkpoint that no BrainLM has."""


def from_upstream_state(
    state: Mapping[str, Tensor], config: Mapping[str, Any]
) -> BrainLM | BrainLMImage:
    """Our module with upstream's weights, in evaluation mode.

    Args:
        state: Upstream's own state dict, with or without `module.` in front of all its keys.
        config: Upstream's own config (its config.json as a dict).

    Raises:
        CheckpointError: A key is missing or unknown, a shape does not fit the config, or a stored
            position table is not the fixed one.
        UserError: The config lacks a key or asks for what no published checkpoint has.
    """
    check_tensors(state, where="BrainLM's checkpoint")
    state = unwrapped(state)
    settings = config_from_upstream(config, family_of(state, config))
    if isinstance(settings, BrainLMConfig):
        settings = replace(settings, qkv_bias=_has_qkv_bias(state, settings.qkv_bias))
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in _module(settings).named_parameters()}
    table = key_table(state, settings, shapes)
    if table.missing or table.unknown:
        raise CheckpointError(
            f"this is not the checkpoint that its config describes: {len(table.missing)} keys "
            f"missing {list(table.missing[:3])}, {len(table.unknown)} unknown "
            f"{list(table.unknown[:3])}. Give BrainLM's own state dict with the config.json that "
            "belongs to it."
        )
    weights = {}
    for name, sources in _sources(settings, shapes).items():
        _check_shapes(state, name, sources, shapes[name])
        weights[name] = torch.cat([state[key] for key in sources]).to(torch.float32)
    module = _module(settings)
    for key, fixed in _fixed_tables(module).items():
        if key in state:
            _check_table(key, state[key], fixed)
    module.load_state_dict(weights)
    for key, buffer in _position_buffers(module).items():
        if key in state and state[key].dtype == torch.float32:  # not tables rounded to half
            buffer.copy_(state[key].reshape(-1, buffer.shape[1])[: len(buffer)])
    return module.eval()


def _has_qkv_bias(state: Mapping[str, Tensor], configured: bool) -> bool:
    """Whether queries, keys and values have biases in a recording model.

    Upstream's layers have them whatever its config says, so the weights tell; without them in the
    weights, the config must say so.
    """
    has_bias = any(key.endswith(".attention.self.query.bias") for key in state)
    if has_bias and not configured:
        say("config: qkv_bias=false has no effect on upstream's recording models: biases loaded.")
    return has_bias or configured


def to_upstream_state(module: nn.Module, grad: bool = False) -> dict[str, Tensor]:
    """Upstream's state dict of our module: copies of its parameters, or of their gradients.

    The fixed position tables are written out with the parameters. `decoder.decoder_pred`, which
    upstream's recording models hold and never use, is not: load with `strict=False` there.

    Args:
        module: A `BrainLM` or `BrainLMImage`.
        grad: Gradients in place of parameters; those without one have no entry.

    Raises:
        UserError: Another module.
    """
    if not isinstance(module, BrainLM | BrainLMImage):
        raise UserError(
            f"to_upstream knows BrainLM and BrainLMImage, got {type(module).__name__}: give the "
            "encoder itself, without a wrapper."
        )
    parameters = dict(module.named_parameters())
    shapes = {name: tensor.shape for name, tensor in parameters.items()}
    state: dict[str, Tensor] = {}
    for name, sources in _sources(module.config, shapes).items():
        tensor = parameters[name].grad if grad else parameters[name]
        if tensor is not None:
            parts = tensor.detach().chunk(len(sources))
            state |= {key: part.clone() for key, part in zip(sources, parts, strict=True)}
    if not grad:
        state |= {key: table.clone() for key, table in _fixed_tables(module).items()}
    return state


def family_of(state: Iterable[str], config: Mapping[str, Any]) -> Family:
    """Whether a checkpoint is a recording model or an image-shaped one.

    The weights say it. The config alone says it only where there are no weights of either kind:
    the recording models' own config.json holds `image_size` and `patch_size` too, without effect.
    """
    keys = set(state)
    if "vit.embeddings.signal_embedding_projection.weight" in keys:
        return "recording"
    if "vit.embeddings.patch_embeddings.projection.weight" in keys:
        return "image"
    if "timepoint_patching_size" in config:
        return "recording"
    if "image_size" in config and "patch_size" in config:
        return "image"
    raise CheckpointError(
        "this is no BrainLM checkpoint: its keys have neither a signal nor a patch embedding, and "
        "its config neither 'timepoint_patching_size' nor 'image_size' and 'patch_size'. Give "
        "BrainLM's pytorch_model.bin and its config.json."
    )


def config_from_upstream(
    config: Mapping[str, Any], family: Family
) -> BrainLMConfig | BrainLMImageConfig:
    """Our config from upstream's.

    Keys that do not shape the model (`architectures`, `torch_dtype`, ...) are left unread; a key
    that is nearly one of those read is taken for a typo.

    Raises:
        UserError: A key is missing, misspelt, or has a value that is not implemented.
    """
    required, optional, fixed = _REQUIRED[family], _OPTIONAL[family], _FIXED[family]
    known = [*required, *optional, *fixed, *_ALSO_READ]
    for key in config:
        close = get_close_matches(key, known, n=1, cutoff=0.9)
        if key not in known and close and close[0] not in config:
            raise UserError(f"config: unknown key '{key}'. Did you mean '{close[0]}'?")
    for key in required:
        if key not in config:
            raise UserError(
                f"config: '{key}' is missing; a BrainLM {family} model needs it. "
                f"{nearest(key, map(str, config)) if config else 'The config is empty.'}"
            )
    for key, value in fixed.items():
        if config.get(key, value) != value:
            raise UserError(
                f"config: {key}={config[key]!r} is not implemented: every published BrainLM has "
                f"{value!r}."
            )
    for key in _UNUSED[family]:
        if config.get(key):
            say(f"config: {key}={config[key]} is not applied: it matters to training only.")
    given = _DEFAULTS[family] | dict(config)
    values = {ours: given[key] for key, ours in (required | optional).items() if key in given}
    if family == "image":
        values["image_size"] = _side(config, "image_size")
        values["patch_size"] = _side(config, "patch_size")
        return from_dict(BrainLMImageConfig, values, where="config")
    if config.get("decoder_hidden_size", config["hidden_size"]) != config["hidden_size"]:
        raise UserError(
            f"config: decoder_hidden_size={config['decoder_hidden_size']} differs from "
            f"hidden_size={config['hidden_size']}: BrainLM's recording models need them equal."
        )
    landmarks = config.get("num_landmarks", 64)
    # Upstream's switch: equal numbers mean full attention, as in every published config.
    nystrom = landmarks != config.get("segment_means_seq_len", 64)
    heads = (config["num_attention_heads"], config["decoder_num_attention_heads"])
    values |= {
        "n_landmarks": landmarks,
        "attention": "nystrom" if nystrom else "full",
        "qkv_bias": config.get("qkv_bias", True),
        # Gradients then equal those that upstream computes on the same machine. Not with a single
        # head: oneDNN's gradient of a one-channel filter reads outside its memory where 65 taps
        # meet 10 to 33 tokens (a crash, or numbers like 1e21; float32, AVX-512, torch 2.13).
        "convolution": "blocks" if 1 in heads else "grouped",
    }
    return from_dict(BrainLMConfig, values, where="config")


def key_table(
    keys: Iterable[str],
    settings: BrainLMConfig | BrainLMImageConfig,
    names: Iterable[str],
) -> KeyTable:
    """What becomes of each of a checkpoint's keys in a module with the parameters `names`."""
    keys = set(keys)
    renamed = {key: name for name, sources in _sources(settings, names).items() for key in sources}
    if isinstance(settings, BrainLMConfig):
        table = "a fixed table of patch positions, made again"
        unused = "a layer of upstream's base class that it never uses"
        reasons = {
            "vit.embeddings.pos_embedding.pe": table,
            "decoder.pos_embedding.pe": table,
            "decoder.decoder_pred.weight": unused,
            "decoder.decoder_pred.bias": unused,
        }
    else:
        table = "a fixed table of image positions, made again"
        reasons = {
            "vit.embeddings.position_embeddings": table,
            "decoder.decoder_pos_embed": table,
        }
    return KeyTable(
        renamed={key: name for key, name in renamed.items() if key in keys},
        dropped={key: reason for key, reason in reasons.items() if key in keys},
        missing=tuple(sorted(renamed.keys() - keys)),
        unknown=tuple(sorted(keys - renamed.keys() - reasons.keys())),
    )


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """Tensors of a `.bin` (weights only: no code is run) or `.safetensors` file, on the CPU.

    Args:
        path: The file, or the folder that holds `model.safetensors` or `pytorch_model.bin`.

    Raises:
        CheckpointError: Absent, truncated, of another format, or holding more than tensors.
    """
    path = Path(path)
    if path.is_dir():
        names = ("model.safetensors", "pytorch_model.bin")
        path = next((path / name for name in names if (path / name).exists()), path / names[1])
    state = read_tensors(path, expected="BrainLM's pytorch_model.bin or model.safetensors")
    check_tensors(state, where=str(path))
    return state


def read_config(path: Path) -> dict[str, Any]:
    """The `config.json` of a checkpoint: `path` is it, its folder, or the weights beside it.

    Raises:
        UserError: Absent or not a JSON object.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "config.json"
    elif path.suffix != ".json":
        path = path.parent / "config.json"
    if not path.is_file():
        raise UserError(
            f"{path} does not exist: BrainLM's config.json tells the sizes of its checkpoint; put "
            "it beside the weights or pass config=."
        )
    config = read_json(path)
    if not isinstance(config, dict):
        raise UserError(f"{path} is not a JSON object: expected BrainLM's config.json.")
    return config


def _module(settings: BrainLMConfig | BrainLMImageConfig) -> BrainLM | BrainLMImage:
    return BrainLM(settings) if isinstance(settings, BrainLMConfig) else BrainLMImage(settings)


def _side(config: Mapping[str, Any], key: str) -> Any:
    value = config[key]
    if isinstance(value, (list, tuple)):
        if len(set(value)) != 1:
            raise UserError(f"config: {key}={list(value)} is not square: BrainLM's images are.")
        return value[0]
    return value


def _sources(
    settings: BrainLMConfig | BrainLMImageConfig, names: Iterable[str]
) -> dict[str, tuple[str, ...]]:
    """For each of our parameters, the upstream keys that make it up, joined along axis 0."""
    recording = isinstance(settings, BrainLMConfig)
    outer = _OUTER_RECORDING if recording else _OUTER_IMAGE
    inner = _INNER_RECORDING if recording else _INNER_IMAGE
    sources = {}
    for name in names:
        stem, _, leaf = name.rpartition(".")
        stack, index, part = _split_layer(stem if leaf in ("weight", "bias") else name)
        if index is None:
            upstream = (outer[part],)
        else:
            upstream = tuple(f"{stack}.{index}.{target}" for target in inner[part])
        tail = f".{leaf}" if leaf in ("weight", "bias") else ""
        sources[name] = tuple(f"{key}{tail}" for key in upstream)
    return sources


def _split_layer(name: str) -> tuple[str, str | None, str]:
    """`decoder.layers.3.norm1` to upstream's stack, the index, and the part."""
    for ours, upstream in (
        ("decoder.layers.", "decoder.decoder_layers"),
        ("decoder_layers.", "decoder.decoder_layers"),
        ("layers.", "vit.encoder.layer"),
    ):
        if name.startswith(ours):
            index, _, part = name.removeprefix(ours).partition(".")
            return upstream, index, part
    return "", None, name


_OUTER_RECORDING = {
    "cls_token": "vit.embeddings.cls_token",
    "signal_projection": "vit.embeddings.signal_embedding_projection",
    "xyz_projection": "vit.embeddings.xyz_embedding_projection",
    "norm": "vit.layernorm",
    "decoder.embed": "decoder.decoder_embed",
    "decoder.mask_token": "decoder.mask_token",
    "decoder.xyz_projection": "decoder.decoder_xyz_projection",
    "decoder.norm": "decoder.decoder_norm",
    "decoder.head1": "decoder.decoder_pred1",
    "decoder.head2": "decoder.decoder_pred2",
}
_INNER_RECORDING = {
    "attention.qkv": tuple(f"attention.self.{part}" for part in ("query", "key", "value")),
    "attention.conv_weight": ("attention.self.conv.weight",),
    "attention.proj": ("attention.output.dense",),
    "norm1": ("attention.output.LayerNorm",),
    "mlp.fc1": ("intermediate.dense",),
    "mlp.fc2": ("output.dense",),
    "norm2": ("output.LayerNorm",),
}
_OUTER_IMAGE = {
    "cls_token": "vit.embeddings.cls_token",
    "patch_projection": "vit.embeddings.patch_embeddings.projection",
    "norm": "vit.layernorm",
    "decoder_embed": "decoder.decoder_embed",
    "mask_token": "decoder.mask_token",
    "decoder_norm": "decoder.decoder_norm",
    "decoder_head": "decoder.decoder_pred",
}
_INNER_IMAGE = {
    "norm1": ("layernorm_before",),
    "attn.qkv": tuple(f"attention.attention.{part}" for part in ("query", "key", "value")),
    "attn.proj": ("attention.output.dense",),
    "norm2": ("layernorm_after",),
    "mlp.fc1": ("intermediate.dense",),
    "mlp.fc2": ("output.dense",),
}


def _check_shapes(
    state: dict[str, Tensor], name: str, sources: tuple[str, ...], shape: torch.Size
) -> None:
    expected = torch.Size([shape[0] // len(sources), *shape[1:]])
    for key in sources:
        if state[key].shape != expected:
            raise CheckpointError(
                f"'{key}' has shape {list(state[key].shape)} but the config makes it "
                f"{list(expected)}: the checkpoint is of another size. Give the config.json that "
                "belongs to it."
            )


def _position_buffers(module: BrainLM | BrainLMImage) -> dict[str, Tensor]:
    """Our position tables by upstream's key; those of recording models are its first rows."""
    if isinstance(module, BrainLM):
        return {
            "vit.embeddings.pos_embedding.pe": module.position,
            "decoder.pos_embedding.pe": module.decoder.position,
        }
    return {
        "vit.embeddings.position_embeddings": module.position,
        "decoder.decoder_pos_embed": module.decoder_position,
    }


def _fixed_tables(module: BrainLM | BrainLMImage) -> dict[str, Tensor]:
    """The position tables as upstream stores them."""
    tables = _position_buffers(module)
    if isinstance(module, BrainLMImage):
        return {key: table.unsqueeze(0) for key, table in tables.items()}
    whole = position_table(MAX_PATCHES, module.config.width).to(module.position)
    return {key: torch.cat([table, whole[len(table) :]]) for key, table in tables.items()}


def _check_table(key: str, stored: Tensor, fixed: Tensor) -> None:
    if stored.shape != fixed.shape or (stored.float() - fixed).abs().max() > TABLE_TOLERANCE:
        raise CheckpointError(
            f"'{key}' is not BrainLM's fixed table of positions: the checkpoint is of another "
            "model, or its positions were trained. It cannot be loaded."
        )
