"""Random configurations and state dicts of the references, in their own keys, small and cheap.

`seed` decides everything: the architecture, the weights, the inputs.
"""

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from brainfusion.encoders import from_upstream
from brainfusion.runtime.errors import UserError
from tests.oracles.brainjepa_reference import sincos
from tests.oracles.brainlm_image_reference import position_table as image_table
from tests.oracles.brainlm_reference import position_table as patch_table

State = dict[str, Tensor]
NEVER_USED = ("decoder.decoder_pred.weight", "decoder.decoder_pred.bias")


class Drawer:
    """Weights by name: about orthonormal Linear layers, LayerNorms near identity."""

    def __init__(self, seed: int) -> None:
        self.state: State = {}
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)

    def linear(self, name: str, n_out: int, n_in: int, *, bias: bool = True) -> None:
        self.state[f"{name}.weight"] = self.normal(n_out, n_in) * n_in**-0.5
        if bias:
            self.state[f"{name}.bias"] = 0.1 * self.normal(n_out)

    def norm(self, name: str, width: int) -> None:
        self.state[f"{name}.weight"] = 1 + 0.2 * self.normal(width)
        self.state[f"{name}.bias"] = 0.2 * self.normal(width)


def divisors(n: int) -> list[int]:
    return [k for k in range(1, n + 1) if n % k == 0]


# -- BrainLM, recording model ----------------------------------------------------------------------


def recording_config(seed: int) -> dict[str, Any]:
    """Full attention for even seeds; Nystrom for odd ones (unmasked, as the reference needs)."""
    rng = random.Random(seed)
    width, patch, m, p = rng.choice([8, 12, 24, 32]), rng.randint(1, 7), rng.randint(1, 8), None
    p = rng.randint(2, 9)
    length = p * m + 1
    landmarks, segment = rng.choice([(64, 64), (8, 8)])
    if seed % 2:
        landmarks, segment = rng.choice(divisors(length)[:-1]), length
    return {
        "hidden_size": width,
        "decoder_hidden_size": width,
        "num_hidden_layers": rng.randint(1, 3),
        "decoder_num_hidden_layers": rng.randint(1, 3),
        "num_attention_heads": rng.choice(divisors(width)),
        "decoder_num_attention_heads": rng.choice(divisors(width)),
        "intermediate_size": rng.randint(5, 40),
        "decoder_intermediate_size": rng.randint(5, 40),
        "num_brain_voxels": p,
        "num_timepoints_per_voxel": patch * m,
        "timepoint_patching_size": patch,
        "mask_ratio": 0.0 if seed % 2 else rng.choice([0, 0.2, 0.33, 0.5, 0.75]),
        "loss_fn": rng.choice(["mse", "mae"]),
        "use_tanh_decoder": rng.random() < 0.4,
        "conv_kernel_size": rng.choice([None, 1, 3, 17, 65]),
        "num_landmarks": landmarks,
        "segment_means_seq_len": segment,
        "layer_norm_eps": rng.choice([1e-12, 1e-5]),
        "qkv_bias": rng.random() < 0.7,  # of no effect: the reference's layers always have biases
        "hidden_act": "gelu",
        "hidden_dropout_prob": rng.choice([0.0, 0.3]),
        "attention_probs_dropout_prob": 0.1,
        "initializer_range": 0.02,
        "inv_coeff_init_option": False,
        "norm_pix_loss": False,
    }


def recording_state(config: dict[str, Any], seed: int) -> State:
    d = Drawer(seed)
    width, patch = config["hidden_size"], config["timepoint_patching_size"]
    for stem in ("vit.embeddings.cls_token", "decoder.mask_token"):
        d.state[stem] = 0.5 * d.normal(1, 1, width)
    for stem in ("vit.embeddings.pos_embedding.pe", "decoder.pos_embedding.pe"):
        d.state[stem] = patch_table(width)
    d.linear("vit.embeddings.signal_embedding_projection", width, patch)
    d.linear("vit.embeddings.xyz_embedding_projection", width, 3)
    d.state["vit.embeddings.xyz_embedding_projection.weight"] *= 0.02  # raw millimetres
    d.linear("decoder.decoder_xyz_projection", width, 3)
    d.state["decoder.decoder_xyz_projection.weight"] *= 0.02
    d.norm("vit.layernorm", width)
    d.linear("decoder.decoder_embed", width, width)
    d.norm("decoder.decoder_norm", width)
    d.linear("decoder.decoder_pred", 768, width)
    d.linear("decoder.decoder_pred1", width // 2, width)
    d.linear("decoder.decoder_pred2", patch, width // 2)
    for stack, side in (("vit.encoder.layer", ""), ("decoder.decoder_layers", "decoder_")):
        heads, hidden = config[f"{side}num_attention_heads"], config[f"{side}intermediate_size"]
        for i in range(config[f"{side}num_hidden_layers"]):
            stem = f"{stack}.{i}."
            for name in ("query", "key", "value"):
                d.linear(f"{stem}attention.self.{name}", width, width)
            if taps := config["conv_kernel_size"]:
                d.state[f"{stem}attention.self.conv.weight"] = (
                    d.normal(heads, 1, taps, 1) * taps**-0.5
                )
            d.linear(f"{stem}attention.output.dense", width, width)
            d.norm(f"{stem}attention.output.LayerNorm", width)
            d.linear(f"{stem}intermediate.dense", hidden, width)
            d.linear(f"{stem}output.dense", width, hidden)
            d.norm(f"{stem}output.LayerNorm", width)
    return d.state


def recording_inputs(config: dict[str, Any], seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """signal, xyz in millimetres, noise."""
    d, b = Drawer(seed + 1), 1 + seed % 3
    p, t = config["num_brain_voxels"], config["num_timepoints_per_voxel"]
    xyz = 40 * d.normal(b, p, 3)
    noise = torch.rand(b, p * t // config["timepoint_patching_size"], generator=d.generator)
    return d.normal(b, p, t), xyz, noise


# -- BrainLM, image model --------------------------------------------------------------------------

IMAGES = [(432, 16), (434, 14), (448, 32), (432, 24), (448, 64), (440, 44)]


def image_config(seed: int) -> dict[str, Any]:
    rng = random.Random(seed)
    size, patch = IMAGES[seed % len(IMAGES)]
    width, decoder_width = rng.choice([8, 16, 24]), rng.choice([8, 12, 32])
    return {
        "hidden_size": width,
        "decoder_hidden_size": decoder_width,
        "num_hidden_layers": rng.randint(1, 2),
        "decoder_num_hidden_layers": rng.randint(1, 2),
        "num_attention_heads": rng.choice(divisors(width)),
        "decoder_num_attention_heads": rng.choice(divisors(decoder_width)),
        "intermediate_size": rng.randint(5, 40),
        "decoder_intermediate_size": rng.randint(5, 40),
        "image_size": rng.choice([size, [size, size]]),
        "patch_size": patch,
        "num_channels": rng.choice([1, 3, 3, 4]),
        "mask_ratio": rng.choice([0, 0.5, 0.75, 0.9]),
        "layer_norm_eps": rng.choice([1e-12, 1e-6]),
        "qkv_bias": rng.random() < 0.7,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "norm_pix_loss": False,
    }


def image_state(config: dict[str, Any], seed: int) -> State:
    d = Drawer(seed)
    width, decoder_width = config["hidden_size"], config["decoder_hidden_size"]
    patch, channels, size = config["patch_size"], config["num_channels"], config["image_size"]
    grid = (size if isinstance(size, int) else size[0]) // patch
    d.state["vit.embeddings.cls_token"] = 0.5 * d.normal(1, 1, width)
    d.state["vit.embeddings.position_embeddings"] = image_table(grid, width)
    stem = "vit.embeddings.patch_embeddings.projection"
    d.state[f"{stem}.weight"] = d.normal(width, channels, patch, patch) / patch
    d.state[f"{stem}.bias"] = d.normal(width)
    d.norm("vit.layernorm", width)
    d.state["decoder.mask_token"] = 0.5 * d.normal(1, 1, decoder_width)
    d.state["decoder.decoder_pos_embed"] = image_table(grid, decoder_width)
    d.linear("decoder.decoder_embed", decoder_width, width)
    d.norm("decoder.decoder_norm", decoder_width)
    d.linear("decoder.decoder_pred", patch**2 * channels, decoder_width)
    for stack, side in (("vit.encoder.layer", ""), ("decoder.decoder_layers", "decoder_")):
        w, hidden = config[f"{side}hidden_size"], config[f"{side}intermediate_size"]
        for i in range(config[f"{side}num_hidden_layers"]):
            stem = f"{stack}.{i}."
            for name in ("query", "key", "value"):
                d.linear(f"{stem}attention.attention.{name}", w, w, bias=config["qkv_bias"])
            d.linear(f"{stem}attention.output.dense", w, w)
            d.linear(f"{stem}intermediate.dense", hidden, w)
            d.linear(f"{stem}output.dense", w, hidden)
            d.norm(f"{stem}layernorm_before", w)
            d.norm(f"{stem}layernorm_after", w)
    return d.state


def image_inputs(config: dict[str, Any], seed: int) -> tuple[Tensor, Tensor]:
    """signal, noise."""
    d, b, size = Drawer(seed + 1), 1 + seed % 2, config["image_size"]
    grid = (size if isinstance(size, int) else size[0]) // config["patch_size"]
    return d.normal(b, 424, 200), torch.rand(b, grid**2, generator=d.generator)


# -- Brain-JEPA ------------------------------------------------------------------------------------


def jepa_config(seed: int) -> dict[str, Any]:
    rng = random.Random(seed)
    heads, patch = rng.choice([1, 2, 3, 5]), rng.randint(2, 9)
    return {
        "add_w": ("mapping", "origin")[seed % 2],
        "crop_size": [rng.randint(3, 12), patch * rng.choice([1, 3, 5, 8, 10])],
        "patch_size": patch,
        "embed_dim": 4 * heads * rng.randint(1, 3),
        "depth": rng.randint(1, 3),
        "num_heads": heads,
        "pred_emb_dim": 4 * heads * rng.randint(1, 3),
        "pred_depth": rng.randint(1, 3),
        "gradient_dim": rng.choice([1, 3, 30]),
    }


def jepa_states(config: dict[str, Any], seed: int) -> dict[str, State]:
    return {
        "encoder": jepa_part(config, seed, "encoder"),
        "predictor": jepa_part(config, seed + 1, "predictor"),
        "target_encoder": jepa_part(config, seed + 2, "encoder"),
    }


def jepa_part(config: dict[str, Any], seed: int, part: str) -> State:
    d, width = Drawer(seed), config["embed_dim"]
    if part == "encoder":
        d.state["patch_embed.proj.weight"] = d.normal(width, 1, 1, config["patch_size"])
        d.state["patch_embed.proj.bias"] = d.normal(width)
        blocks, position, norm, depth, w = "blocks", "pos_embed_proj", "norm", "depth", width
    else:
        w = config["pred_emb_dim"]
        d.state["mask_token"] = d.normal(1, 1, w)
        d.linear("predictor_embed", w, width)
        d.linear("predictor_proj", width, w)
        blocks, position, norm, depth = (
            "predictor_blocks", "predictor_2dpe_proj", "predictor_norm", "pred_depth",
        )  # fmt: skip
    d.norm(norm, w)
    n_patches = config["crop_size"][1] // config["patch_size"]
    token = torch.arange(config["crop_size"][0] * n_patches)
    d.state[f"{position}.emb_h"] = sincos(token % n_patches, w // 2)
    if config["add_w"] == "origin":
        d.state[f"{position}.emb_w"] = sincos(token // n_patches, w // 2)
    else:
        d.linear(f"{position}.predictor_pos_embed_proj", w // 2, config["gradient_dim"])
    for i in range(config[depth]):
        d.norm(f"{blocks}.{i}.norm1", w)
        d.linear(f"{blocks}.{i}.attn.qkv", 3 * w, w)
        d.linear(f"{blocks}.{i}.attn.proj", w, w)
        d.norm(f"{blocks}.{i}.norm2", w)
        d.linear(f"{blocks}.{i}.mlp.fc1", 4 * w, w)
        d.linear(f"{blocks}.{i}.mlp.fc2", w, 4 * w)
    return d.state


def jepa_inputs(
    config: dict[str, Any], seed: int
) -> tuple[Tensor, Tensor | None, list[Tensor], list[Tensor]]:
    """fmri, gradient, context masks, target masks; the masks' dtype alternates with the seed."""
    d, rng = Drawer(seed + 3), random.Random(seed + 3)
    b, (rois, trs) = rng.randint(1, 3), config["crop_size"]
    n = rois * trs // config["patch_size"]
    dtype = (torch.int64, torch.int32)[seed // 2 % 2]

    def masks(n_masks: int, size: int) -> list[Tensor]:
        rows = [
            torch.stack([torch.randperm(n, generator=d.generator)[:size] for _ in range(b)])
            for _ in range(n_masks)
        ]
        return [row.to(dtype) for row in rows]

    gradient = d.normal(1, rois, config["gradient_dim"])
    fmri = d.normal(b, 1, rois, trs)
    n_context, n_target = rng.choice([(1, 1), (2, 3), (2, 2), (3, 1), (1, 4)])
    masks_enc = masks(n_context, rng.randint(1, n))
    masks_pred = masks(n_target, rng.randint(1, n))
    return fmri, gradient if config["add_w"] == "mapping" else None, masks_enc, masks_pred


# -- any family, through the public surface ------------------------------------------------------

FAMILIES = ("recording", "image", "brainjepa")


def config_of(family: str, seed: int = 4) -> dict[str, Any]:
    """The reference's config; by default one of a masked recording model with full attention."""
    make = {"recording": recording_config, "image": image_config, "brainjepa": jepa_config}
    return make[family](seed)


def state_of(family: str, config: dict[str, Any], seed: int = 1) -> State:
    """The reference's state dict; Brain-JEPA's flat, as `to_upstream` gives it."""
    if family == "recording":
        return recording_state(config, seed)
    if family == "image":
        return image_state(config, seed)
    parts = jepa_states(config, seed)
    return {f"{part}/{key}": v for part, state in parts.items() for key, v in state.items()}


def load(family: str, state: Any, config: Any, **options: Any) -> Any:
    """`from_upstream`, with a gradient table where none is given and one is needed."""
    if family != "brainjepa":
        return from_upstream("brainlm", state, config=config, **options)
    if isinstance(config, dict) and config["add_w"] == "mapping" and not options:
        options = {"gradient": Drawer(0).normal(config["crop_size"][0], config["gradient_dim"])}
    return from_upstream("brainjepa", state, config=config, **options)


def one_line(call: Callable[[], Any], *parts: str, kind: type[UserError] = UserError) -> None:
    """The call fails with one clear line that holds `parts`."""
    with pytest.raises(kind) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text
    assert len(text) < 600
    for part in parts:
        assert part in text, text
