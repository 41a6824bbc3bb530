"""The fixed surface for the authors' checkpoints: every key, every config value."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from brainfusion.encoders import brainjepa, from_upstream, to_upstream
from brainfusion.encoders.brainjepa_upstream import config_from_upstream
from brainfusion.runtime.errors import CheckpointError
from tests.encoders import random_upstream as draw
from tests.encoders.random_upstream import FAMILIES, config_of, load, one_line, state_of
from tests.oracles import brainlm_reference

# -- keys ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("family", FAMILIES)
def test_every_key_survives_there_and_back_bit_for_bit(family: str, seed: int) -> None:
    config = config_of(family, seed)
    state = state_of(family, config, seed)
    module = load(family, state, config)
    back = to_upstream(module)
    dropped = draw.NEVER_USED if family == "recording" else ()
    assert back.keys() == state.keys() - set(dropped)
    for key, value in back.items():
        assert value.dtype == torch.float32
        assert torch.equal(value, state[key]), key
    assert to_upstream(module, grad=True) == {}
    assert not module.training


@pytest.mark.parametrize("family", FAMILIES)
def test_every_key_is_needed_and_no_other_is_taken(family: str) -> None:
    shallow = {"num_hidden_layers": 1, "decoder_num_hidden_layers": 1}
    shallow = {"depth": 1, "pred_depth": 1} if family == "brainjepa" else shallow
    config = config_of(family) | shallow
    state = state_of(family, config)
    prefixes = {
        "recording": (*draw.NEVER_USED, "vit.embeddings.pos_embedding.pe", "decoder.pos_embedding"),
        "image": ("vit.embeddings.position_embeddings", "decoder.decoder_pos_embed"),
        "brainjepa": (),
    }[family]
    for key in state:
        less = {k: v for k, v in state.items() if k != key}
        if key.startswith(prefixes or ("-",)):
            load(family, less, config)
            continue
        name = key.partition("/")[2] or key
        one_line(lambda s=less: load(family, s, config), name, kind=CheckpointError)
        renamed = less | {key.replace("weight", "wieght") + "_": state[key]}
        one_line(lambda s=renamed: load(family, s, config), name, kind=CheckpointError)
        longer = state | {key: torch.cat([state[key], state[key][:1]])}
        one_line(lambda s=longer: load(family, s, config), name, "size", kind=CheckpointError)
        flat = state | {key: state[key].reshape(-1)[None]}
        one_line(lambda s=flat: load(family, s, config), name, "size", kind=CheckpointError)
    key = next(reversed(state))
    name = key.partition("/")[2] or key
    extra = state | {f"{key}.extra": state[key]}
    one_line(lambda: load(family, extra, config), "extra", kind=CheckpointError)
    for value in (None, 3, [1.0], np.ones(3)):
        wrong = state | {key: value}
        one_line(lambda s=wrong: load(family, s, config), name, "tensors", kind=CheckpointError)


@pytest.mark.parametrize("family", FAMILIES)
def test_layer_norms_have_the_epsilon_of_the_config(family: str) -> None:
    for seed in range(4):
        config = config_of(family, seed)
        module = load(family, state_of(family, config), config)
        norms = [m for m in module.modules() if isinstance(m, nn.LayerNorm)]
        expected = config.get("layer_norm_eps", 1e-6)  # Brain-JEPA's code fixes it
        assert {norm.eps for norm in norms} == {expected}
        sides = ("num_hidden_layers", "decoder_num_hidden_layers")
        if family == "brainjepa":
            sides, n_norms = ("depth", "depth", "pred_depth"), 3
        else:
            n_norms = 2
        assert len(norms) == n_norms + 2 * sum(config[side] for side in sides)


# -- configs ---------------------------------------------------------------------------------------

# The keys that transformers 4.28 writes into every config.json, and the values it may give them.
BOILERPLATE = {
    "return_dict": True, "output_hidden_states": False, "output_attentions": False,
    "torchscript": False, "torch_dtype": "float32", "use_bfloat16": False,
    "tf_legacy_loss": False, "pruned_heads": {}, "tie_word_embeddings": True,
    "is_encoder_decoder": False, "is_decoder": False, "cross_attention_hidden_size": None,
    "add_cross_attention": False, "tie_encoder_decoder": False, "max_length": 20, "min_length": 0,
    "do_sample": False, "early_stopping": False, "num_beams": 1, "num_beam_groups": 1,
    "diversity_penalty": 0.0, "temperature": 1.0, "top_k": 50, "top_p": 1.0, "typical_p": 1.0,
    "repetition_penalty": 1.0, "length_penalty": 1.0, "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0, "bad_words_ids": None, "num_return_sequences": 1,
    "chunk_size_feed_forward": 0, "output_scores": False, "return_dict_in_generate": False,
    "forced_bos_token_id": None, "forced_eos_token_id": None, "remove_invalid_values": False,
    "exponential_decay_length_penalty": None, "suppress_tokens": None,
    "begin_suppress_tokens": None, "architectures": ["BrainLMForPretraining"],
    "finetuning_task": None, "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0},
    "tokenizer_class": None, "prefix": None, "bos_token_id": None, "pad_token_id": None,
    "eos_token_id": None, "sep_token_id": None, "decoder_start_token_id": None,
    "task_specific_params": None, "problem_type": None, "_name_or_path": "",
    "transformers_version": "4.28.0", "model_type": "brainlm_mae", "_commit_hash": None,
}  # fmt: skip


@pytest.mark.parametrize("family", ["recording", "image"])
def test_what_transformers_writes_into_every_config_is_left_unread(family: str) -> None:
    config = config_of(family)
    state = state_of(family, config)
    plain = load(family, state, config)
    full = load(family, state, BOILERPLATE | config)
    assert plain.config == full.config
    if family == "recording":  # the recording models' config class has these, without effect
        unused = {"image_size": 224, "patch_size": 16, "num_channels": 3}
        assert load(family, state, BOILERPLATE | config | unused).config == plain.config


def test_keys_left_out_take_the_defaults_of_the_references_config_class() -> None:
    config = config_of("recording", 8) | {"conv_kernel_size": 65}
    state = state_of("recording", config)
    optional = (
        "mask_ratio", "loss_fn", "use_tanh_decoder", "conv_kernel_size", "num_landmarks",
        "segment_means_seq_len", "layer_norm_eps", "initializer_range", "qkv_bias", "hidden_act",
        "hidden_dropout_prob", "inv_coeff_init_option", "norm_pix_loss", "decoder_hidden_size",
        "attention_probs_dropout_prob",
    )  # fmt: skip
    settings = load(
        "recording", state, {k: v for k, v in config.items() if k not in optional}
    ).config
    assert (settings.mask_ratio, settings.loss_fn, settings.tanh_decoder) == (0.5, "mse", False)
    assert (settings.attention, settings.layer_norm_eps) == ("full", 1e-12)
    image = config_of("image", 2) | {"num_channels": 3, "qkv_bias": True}
    state = state_of("image", image)
    for key in ("mask_ratio", "num_channels", "qkv_bias", "layer_norm_eps"):
        del image[key]
    settings = load("image", state, image).config
    assert (settings.mask_ratio, settings.n_channels, settings.layer_norm_eps) == (0.75, 3, 1e-12)


@pytest.mark.parametrize("family", ["recording", "image"])
def test_every_size_of_a_config_is_needed(family: str) -> None:
    config = config_of(family)
    state = state_of(family, config)
    sizes = [key for key in config if "size" in key or "num_" in key or "voxel" in key]
    skipped = ("conv_kernel_size", "num_landmarks", "num_channels")
    for key in sizes:
        if key in skipped or (family == "recording" and key == "decoder_hidden_size"):
            continue
        less = {k: v for k, v in config.items() if k != key}
        one_line(lambda c=less: load(family, state, c), f"'{key}' is missing")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_config_of_another_size_is_one_line(family: str) -> None:
    config = config_of(family)
    state = state_of(family, config)
    free = ("mask_ratio", "num_landmarks", "segment_means_seq_len", "num_brain_voxels")
    for key, value in config.items():
        if type(value) is int and key not in free:
            other = config | {key: 3 * value + 1}
            if key == "num_timepoints_per_voxel":  # more patches of the same weights
                other[key] = value + 1
            one_line(lambda c=other: load(family, state, c))


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        ("image", {"image_size": [432, 434]}, "is not square"),
        ("image", {"image_size": []}, "is not square"),
        ("image", {"image_size": 433}, "not a multiple of patch_size"),
        ("image", {"image_size": 416, "patch_size": 16}, "does not fit into an image"),
        ("image", {"hidden_act": "relu"}, "hidden_act='relu' is not implemented"),
        ("image", {"train_mode": "predict_last"}, "train_mode='predict_last' is not implemented"),
        ("recording", {"hidden_act": "gelu_new"}, "hidden_act='gelu_new' is not implemented"),
        ("recording", {"mask_ratio": 1.0}, "mask_ratio=1.0"),
        ("recording", {"conv_kernel_size": 64}, "conv_kernel_size=64 is even"),
        ("recording", {"num_attention_heads": 7}, "heads"),
        ("brainjepa", {"add_w": "both"}, "'both'"),
        ("brainjepa", {"crop_size": [4]}, "crop_size=[4]"),
        ("brainjepa", {"layer_norm_eps": 1e-5}, "layer_norm_eps=1e-05 is not implemented"),
        ("brainjepa", {"embed_dims": 8}, "Did you mean 'embed_dim'"),
        ("brainjepa", {"model_name": "vit_huge"}, "vit_large"),
    ],
)
def test_contradictory_configs_are_one_line(
    family: str, change: dict[str, Any], message: str
) -> None:
    config = config_of(family)
    one_line(lambda: load(family, state_of(family, config), config | change), message)


def test_a_config_that_is_no_dict_is_one_line(tmp_path: Path) -> None:
    for family in FAMILIES:
        state = state_of(family, config_of(family))
        one_line(lambda f=family, s=state: load(f, s, 3), "int", "dict")
    one_line(lambda: load("recording", 3, {}), "int", "state dict")
    (tmp_path / "config.json").write_text("[1]")
    state = state_of("recording", config_of("recording"))
    one_line(lambda: load("recording", state, tmp_path / "config.json"), "not a JSON object")
    (tmp_path / "config.json").write_text("{")
    one_line(lambda: load("recording", state, tmp_path / "config.json"), "config.json")


def test_numbers_that_brainjepas_code_fixes_may_stand_in_its_config() -> None:
    config = config_of("brainjepa")
    fixed = {
        "act": "gelu (erf)", "drop_path": 0, "fc_norm_eps": 1e-6, "in_chans": 1,
        "layer_norm_eps": 1e-6, "mlp_ratio": 4, "qkv_bias": True, "target_layer_norm_eps": 1e-5,
    }  # fmt: skip
    assert config_from_upstream(config | fixed) == config_from_upstream(config)


def test_the_yaml_of_brainjepas_authors_is_understood() -> None:
    yaml = {
        "data": {"batch_size": 16, "crop_size": [450, 160], "gradient_csv_path": "x.csv"},
        "logging": {"folder": "logs", "write_tag": "jepa"},
        "mask": {"patch_size": 16, "min_keep": 4, "enc_mask_scale": [0.84, 1]},
        "meta": {
            "model_name": "vit_base", "pred_depth": 6, "pred_emb_dim": 384, "add_w": "mapping",
            "attn_mode": "flash_attn", "use_bfloat16": True,
        },
        "optimization": {"ema": [0.996, 1.0], "lr": 0.001},
    }  # fmt: skip
    assert config_from_upstream(yaml) == brainjepa.PRESETS["base"]
    yaml["meta"] |= {"model_name": "vit_large", "add_w": "origin"}
    assert config_from_upstream(yaml) == replace(brainjepa.PRESETS["large"], positions="origin")
    yaml["meta"]["pred_dept"] = 6
    one_line(lambda: config_from_upstream(yaml), "'pred_dept'", "Did you mean 'pred_depth'")


def test_biases_of_recording_models_are_told_by_the_weights(
    capsys: pytest.CaptureFixture[str],
) -> None:
    # The reference's layers have them whatever its config says.
    config = config_of("recording") | {"qkv_bias": False}
    state = state_of("recording", config)
    assert to_upstream(load("recording", state, config)).keys() == state.keys() - set(
        draw.NEVER_USED
    )
    assert "qkv_bias=false has no effect" in capsys.readouterr().err
    bare = {k: v for k, v in state.items() if not k.endswith(("query.bias", "key.bias"))}
    bare = {k: v for k, v in bare.items() if not k.endswith("value.bias")}
    assert to_upstream(load("recording", bare, config)).keys() == bare.keys() - set(draw.NEVER_USED)
    one_line(lambda: load("recording", bare, config | {"qkv_bias": True}), "keys missing")


# -- the convolution along the tokens --------------------------------------------------------------


def float32_filters(heads: tuple[int, int], n_parcels: int) -> tuple[nn.Module, draw.State]:
    """A backward pass of ours and of the transcription with 65 taps, in float32."""
    config = draw.recording_config(0) | {
        "hidden_size": 16, "decoder_hidden_size": 16, "num_attention_heads": heads[0],
        "decoder_num_attention_heads": heads[1], "num_brain_voxels": n_parcels,
        "num_timepoints_per_voxel": 20, "timepoint_patching_size": 5, "conv_kernel_size": 65,
        "mask_ratio": 0.2, "loss_fn": "mse", "num_landmarks": 64, "segment_means_seq_len": 64,
    }  # fmt: skip
    state = draw.recording_state(config, 0)
    signal, xyz, noise = draw.recording_inputs(config, 1)
    m = from_upstream("brainlm", state, config=config)
    m(signal, xyz, noise=noise).loss.backward()
    leaves = {k: v.clone().requires_grad_() for k, v in state.items()}
    if min(heads) > 1:
        loss = brainlm_reference.forward(leaves, config, signal, xyz, noise).loss
        assert loss is not None
        loss.backward()
    return m, leaves


def test_filter_gradients_are_those_that_the_reference_computes_on_this_machine() -> None:
    # With oneDNN, wrong ones on some CPUs: what the stored gradients of a reference hold too.
    m, reference = float32_filters((4, 2), 24)
    filters = {k: v for k, v in to_upstream(m, grad=True).items() if k.endswith("conv.weight")}
    assert filters
    largest = max(float(v.grad.abs().max()) for v in reference.values() if v.grad is not None)
    for key, gradient in filters.items():
        expected = reference[key].grad
        assert expected is not None
        torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-4 * largest)


def test_one_head_never_meets_the_kernel_that_crashes(monkeypatch: pytest.MonkeyPatch) -> None:
    # oneDNN's float32 filter gradient of one channel reads outside its memory where 65 taps meet
    # 10 to 33 tokens: a segmentation fault, or numbers like 1e21 (torch 2.13, AVX-512).
    real = F.conv2d

    def careful(x: Tensor, *args: Any, groups: int = 1, **options: Any) -> Tensor:
        assert groups > 1, "a convolution of one channel"
        return real(x, *args, groups=groups, **options)

    monkeypatch.setattr(F, "conv2d", careful)
    for heads in ((1, 1), (1, 4), (4, 1)):
        m, _ = float32_filters(heads, 4)
        gradients = to_upstream(m, grad=True)
        assert all(bool(g.isfinite().all()) for g in gradients.values())
