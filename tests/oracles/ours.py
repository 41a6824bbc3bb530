"""Our modules as the oracles take them: the references' weights and settings, under their names."""

from typing import Any

from torch import Tensor

from brainfusion.encoders import to_upstream


def brainjepa_states(module: Any) -> dict[str, dict[str, Tensor]]:
    """The weights by part ("encoder", "predictor", "target_encoder"), then by name."""
    states: dict[str, dict[str, Tensor]] = {}
    for key, value in to_upstream(module).items():
        part, _, name = key.partition("/")
        states.setdefault(part, {})[name] = value.clone()
    return states


def brainjepa_trained(states: dict[str, dict[str, Tensor]]) -> list[Tensor]:
    """The weights that are trained, from now on with gradients."""
    return [
        value.requires_grad_()
        for part in ("encoder", "predictor")
        for key, value in states[part].items()
        if not key.endswith("emb_h")
    ]


def brainjepa_settings(config: Any) -> dict[str, Any]:
    """Of `brainjepa_reference`."""
    return {
        "crop_size": [config.n_parcels, config.n_trs],
        "patch_size": config.patch_trs,
        "depth": config.depth,
        "num_heads": config.n_heads,
        "pred_depth": config.predictor_depth,
        "add_w": config.positions,
    }


def brainlm_settings(config: Any) -> dict[str, Any]:
    """Of `brainlm_reference`."""
    return {
        "timepoint_patching_size": config.patch_trs,
        "loss_fn": config.loss_fn,
        **_autoencoder(config),
        "num_landmarks": 64,
        "segment_means_seq_len": 64,
        "conv_kernel_size": config.conv_kernel_size,
        "use_tanh_decoder": config.tanh_decoder,
    }


def brainlm_image_settings(config: Any) -> dict[str, Any]:
    """Of `brainlm_image_reference`."""
    return {
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "num_channels": config.n_channels,
        **_autoencoder(config),
    }


def _autoencoder(config: Any) -> dict[str, Any]:
    return {
        "mask_ratio": config.mask_ratio,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.n_heads,
        "decoder_num_hidden_layers": config.decoder_depth,
        "decoder_num_attention_heads": config.decoder_n_heads,
        "layer_norm_eps": config.layer_norm_eps,
    }
