"""BrainLM's published checkpoints: keys, configs and files, good and bad."""

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from brainfusion.encoders.brainlm import BrainLM
from brainfusion.encoders.brainlm_upstream import (
    config_from_upstream,
    family_of,
    from_upstream_state,
    key_table,
    read_checkpoint,
    read_config,
    to_upstream_state,
)
from brainfusion.runtime.errors import CheckpointError, UserError
from tests.encoders.brainlm_goldens import golden


@pytest.mark.parametrize("name", ["brainlm_a", "brainlm_b", "brainlm_vitmae_a"])
def test_keys_survive_the_way_to_us_and_back(name: str) -> None:
    fixture = golden(name)
    state = fixture.part("state/")
    model = fixture.model()
    back = to_upstream_state(model)
    unused = {"decoder.decoder_pred.weight", "decoder.decoder_pred.bias"}
    assert state.keys() - back.keys() == (unused if isinstance(model, BrainLM) else set())
    for key, tensor in back.items():
        assert torch.equal(tensor, state[key]), key
    table = key_table(state, model.config, dict(model.named_parameters()))
    assert table.renamed.keys() | table.dropped.keys() == state.keys()
    assert not table.renamed.keys() & table.dropped.keys()
    assert set(table.renamed.values()) == set(dict(model.named_parameters()))
    assert (table.missing, table.unknown) == ((), ())
    assert all(table.dropped.values())


def test_dropped_keys_may_be_absent() -> None:
    fixture = golden("brainlm_a")
    state = fixture.part("state/")
    bare = {key: state[key] for key in state if ".pe" not in key and "_pred." not in key}
    assert len(bare) == len(state) - 4
    full, less = fixture.model(), from_upstream_state(bare, fixture.config())
    assert all(map(torch.equal, full.parameters(), less.parameters()))


def test_half_precision_checkpoints_are_loaded_in_full_precision() -> None:
    fixture = golden("brainlm_a")
    half = {key: tensor.bfloat16() for key, tensor in fixture.part("state/").items()}
    model = from_upstream_state(half, fixture.config())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_published_recording_config_with_image_keys_is_a_recording_model() -> None:
    # The repository's checkpoint has image_size and patch_size in its config.json, without effect.
    fixture = golden("brainlm_a")
    config = fixture.config(image_size=224, patch_size=16, num_channels=3, model_type="brainlm_mae")
    assert isinstance(from_upstream_state(fixture.part("state/"), config), BrainLM)
    assert family_of([], config) == "recording"
    assert family_of([], {"image_size": 432, "patch_size": 16}) == "image"


def test_equal_landmarks_and_segment_length_mean_full_attention() -> None:
    fixture = golden("brainlm_a")
    config = config_from_upstream(
        fixture.config(num_landmarks=8, segment_means_seq_len=8), "recording"
    )
    assert config.attention == "full"
    config = config_from_upstream(fixture.config(num_landmarks=8), "recording")
    assert (config.attention, config.n_landmarks) == ("nystrom", 8)
    assert (
        config_from_upstream(fixture.config(conv_kernel_size=None), "recording").conv_kernel_size
        is None
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"decoder_hidden_size": 16}, "decoder_hidden_size=16 differs from hidden_size=32"),
        ({"hidden_act": "relu"}, "hidden_act='relu' is not implemented"),
        ({"inv_coeff_init_option": True}, "inv_coeff_init_option=True is not implemented"),
        ({"loss_fn": "huber"}, "loss_fn='huber'"),
        ({"hidden_size": "32", "decoder_hidden_size": "32"}, "config.width='32': expected int"),
        ({"timepoint_patching_size": 11}, "n_trs=40 is not a multiple of patch_trs=11: the last 7"),
    ],
)
def test_unsupported_config_values_are_errors(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        golden("brainlm_a").model(**change)


def test_config_typos_and_gaps_are_errors() -> None:
    fixture = golden("brainlm_a")
    state, config = fixture.part("state/"), fixture.config()
    typo = {**config, "conv_kernel_sise": 65}
    del typo["conv_kernel_size"]
    with pytest.raises(UserError, match=r"'conv_kernel_sise'\. Did you mean 'conv_kernel_size'"):
        from_upstream_state(state, typo)
    del config["hidden_size"]
    with pytest.raises(UserError, match="'hidden_size' is missing"):
        from_upstream_state(state, config)


def test_wrong_checkpoints_are_errors_that_name_the_keys() -> None:
    fixture = golden("brainlm_a")
    state, config = fixture.part("state/"), fixture.config()
    with pytest.raises(CheckpointError, match=r"1 unknown \['module\.extra'\]"):
        from_upstream_state({**state, "module.extra": torch.zeros(1)}, config)
    less = {key: tensor for key, tensor in state.items() if key != "vit.layernorm.bias"}
    with pytest.raises(CheckpointError, match=r"1 keys missing \['vit\.layernorm\.bias'\]"):
        from_upstream_state(less, config)
    with pytest.raises(CheckpointError, match="17 keys missing"):
        from_upstream_state(state, {**config, "num_hidden_layers": 3})
    with pytest.raises(
        CheckpointError, match=r"has shape .* but the config makes it .* of another size"
    ):
        from_upstream_state(state, {**config, "intermediate_size": 65})
    with pytest.raises(CheckpointError, match=r"conv\.weight' has shape \[4, 1, 65, 1\]"):
        from_upstream_state(state, {**config, "num_attention_heads": 2})
    moved = {**state, "decoder.pos_embedding.pe": state["decoder.pos_embedding.pe"] + 0.1}
    with pytest.raises(CheckpointError, match="fixed table"):
        from_upstream_state(moved, config)
    with pytest.raises(CheckpointError, match="no BrainLM checkpoint"):
        from_upstream_state({"weight": torch.zeros(2)}, {})


def test_gradients_and_weights_of_other_modules_are_refused() -> None:
    with pytest.raises(UserError, match="got Linear"):
        to_upstream_state(nn.Linear(2, 2))


class Payload:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("never-written"),))


def test_checkpoint_files_are_read_without_running_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    state = {"a": torch.arange(3.0), "b": torch.ones(2, 2)}
    torch.save(state, tmp_path / "pytorch_model.bin")
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"hidden_size": 4}')
    for path in (tmp_path, tmp_path / "pytorch_model.bin", tmp_path / "model.safetensors"):
        loaded = read_checkpoint(path)
        assert loaded.keys() == state.keys()
        assert all(torch.equal(loaded[key], state[key]) for key in state)
        assert read_config(path) == {"hidden_size": 4}
    torch.save({"a": Payload()}, tmp_path / "evil.bin")
    (tmp_path / "plain.bin").write_bytes(pickle.dumps(Payload(), protocol=2))
    for name in ("evil.bin", "plain.bin"):
        with pytest.raises(CheckpointError, match="could run code"):
            read_checkpoint(tmp_path / name)
    assert not (tmp_path / "never-written").exists()


def test_broken_checkpoint_files_are_one_clear_line(tmp_path: Path) -> None:
    torch.save({"a": torch.randn(500)}, tmp_path / "whole.bin")
    cut = (tmp_path / "whole.bin").read_bytes()[:1500]
    (tmp_path / "cut.bin").write_bytes(cut)
    save_file({"a": torch.randn(500)}, tmp_path / "whole.safetensors")
    cut = (tmp_path / "whole.safetensors").read_bytes()[:1500]
    (tmp_path / "cut.safetensors").write_bytes(cut)
    (tmp_path / "empty.bin").write_bytes(b"")
    torch.save([1, 2], tmp_path / "list.bin")
    (tmp_path / "model.ckpt").write_bytes(b"x")
    for name in ("cut.bin", "cut.safetensors", "empty.bin", "list.bin", "model.ckpt", "absent.bin"):
        with pytest.raises(CheckpointError) as caught:
            read_checkpoint(tmp_path / name)
        assert name in str(caught.value)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"config.json does not exist"):
        read_config(tmp_path / "whole.bin")
