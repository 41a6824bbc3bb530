"""Low-rank updates of real encoders: nothing changes at the start, merged is what was trained."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn as nn

from brainfusion import encoders
from brainfusion.alignment.finetuning.lora import (
    LowRank,
    add_lora,
    choose_trained,
    merge_lora,
    merged_state,
)
from brainfusion.encoders.layers import Attention
from brainfusion.encoders.trainable import tower_of
from brainfusion.runtime.errors import UserError
from tests.encoders.tiny_cohort import ENCODERS, IMAGE, N_PARCELS, N_TRS, XYZ_MM

CONFIGS = {**ENCODERS, "brainlm-image": IMAGE}


def build(name: str) -> Any:
    """An encoder with random weights, in evaluation mode."""
    torch.manual_seed(2)
    gradient = np.random.default_rng(0).normal(size=(N_PARCELS, 4)) if name == "brainjepa" else None
    return encoders.build(name.split("-")[0], CONFIGS[name], gradient=gradient).eval()


def encode(module: Any, bold: torch.Tensor | None = None) -> torch.Tensor:
    if bold is None:
        bold = torch.randn(3, N_PARCELS, N_TRS, generator=torch.Generator().manual_seed(1))
    where = () if hasattr(module, "target_encoder") else (torch.from_numpy(XYZ_MM),)
    return module.encode(bold, *where, pooling="mean")


def choose(module: Any, how: str, **options: Any):
    tower, blocks, after, fixed = tower_of(module)
    return tower, choose_trained(tower, how, blocks=blocks, after=after, fixed=fixed, **options)


def stir(tower: nn.Module) -> None:
    """Move whatever is trained."""
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in tower.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize("name", CONFIGS)
def test_updates_leave_outputs_as_they_are_at_the_start(name):
    module = build(name)
    before = encode(module)
    choose(module, "lora", rank=4)
    torch.testing.assert_close(encode(module), before, rtol=0, atol=0)


@pytest.mark.parametrize("name", CONFIGS)
def test_merged_weights_load_into_the_ordinary_class_and_give_the_same_outputs(name):
    module = build(name)
    before, keys = encode(module), set(module.state_dict())
    tower, _ = choose(module, "lora", rank=4)
    stir(tower)
    trained = encode(module)
    assert not torch.allclose(trained, before, atol=1e-3)
    foreseen = merged_state(module)
    assert merge_lora(tower) == 2 * len(tower.get_submodule(tower_of(module)[1]))
    torch.testing.assert_close(encode(module), trained, rtol=0, atol=0)
    assert set(module.state_dict()) == set(foreseen) == keys
    fresh = build(name)
    for state in (module.state_dict(), foreseen):
        fresh.load_state_dict(state)
        torch.testing.assert_close(encode(fresh), trained, rtol=0, atol=0)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("how", ["lora", "last-1", "all", "none"])
def test_only_what_was_chosen_has_a_gradient_and_it_is_not_zero(name, how):
    module = build(name)
    tower, trained = choose(module, how, rank=4)
    features = encode(module)
    if how == "none":
        assert trained.names == ()
        assert not features.requires_grad
        return
    (
        features * torch.randn(features.shape, generator=torch.Generator().manual_seed(0))
    ).sum().backward()
    found = {key for key, p in module.named_parameters() if p.grad is not None}
    own = {key for key, p in tower.named_parameters() if p.grad is not None}
    assert own == set(trained.names)
    assert len(found) == len(own)  # and nothing outside the tower
    # A is behind a B of zeros; keys have no gradient where a softmax does not see their bias.
    for key in trained.names:
        if key.endswith(".b"):
            assert tower.get_parameter(key).grad.abs().max() > 0, key
    assert not [key for key in found if "position" in key or "decoder" in key or "predictor" in key]
    assert trained.n_trained == sum(p.numel() for p in tower.parameters() if p.requires_grad)


@pytest.mark.parametrize("how", ["lora", "last-1", "all"])
def test_what_is_not_trained_does_not_move(how):
    module = build("brainjepa")
    tower, trained = choose(module, how, rank=2)
    before = {key: value.clone() for key, value in module.state_dict().items()}
    optimizer = torch.optim.AdamW(
        [p for p in module.parameters() if p.requires_grad], lr=0.1, weight_decay=0.5
    )
    for _ in range(2):
        optimizer.zero_grad()
        encode(module).square().sum().backward()
        optimizer.step()
    moved = {
        key for key, value in module.state_dict().items() if not torch.equal(value, before[key])
    }
    assert moved == {f"target_encoder.{key}" for key in trained.names}
    if how == "lora":
        assert all("parametrizations.weight.0" in key for key in moved)
    merge_lora(tower)
    for key, value in module.state_dict().items():
        if key.startswith(("encoder.", "predictor.", "target_encoder.position.")):
            assert torch.equal(value, before[key]), key


def test_last_blocks_and_counts_are_those_named():
    module = build("brainjepa")
    tower, last = choose(module, "last-1")
    assert {key.split(".")[0] for key in last.names} == {"blocks", "norm"}
    assert last.n_trained == sum(
        p.numel() for p in [*tower.blocks.parameters(), *tower.norm.parameters()]
    )
    tower, lora = choose(build("brainjepa"), "lora", rank=3)
    # qkv is [48, 16] and proj [16, 16], in one block.
    assert lora.n_trained == 3 * (48 + 16) + 3 * (16 + 16)
    assert f"{lora.n_trained:,} of {lora.n_all:,} parameters" in str(lora)


def test_the_gradient_of_an_update_is_that_of_the_whole_weight_through_its_factors():
    """Both ways through an attention: all queries, and some of them by slices of the weight."""
    torch.manual_seed(0)
    whole = Attention(16, 2).double()
    small = copy.deepcopy(whole).requires_grad_(False)
    add_lora(small, ["qkv", "proj"], rank=3, alpha=6.0, seed=1)
    stir(small)
    with torch.no_grad():
        for name in ("qkv", "proj"):
            whole.get_submodule(name).weight.copy_(small.get_submodule(name).weight)
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    for queries in (None, x[:, :2]):
        for module in (whole, small):
            module.zero_grad()
            module(x, queries).square().sum().backward()
        for name in ("qkv", "proj"):
            update = small.get_submodule(name).parametrizations.weight[0]
            assert isinstance(update, LowRank)
            gradient = whole.get_submodule(name).weight.grad
            torch.testing.assert_close(update.b.grad, 2.0 * gradient @ update.a.T)
            torch.testing.assert_close(update.a.grad, 2.0 * update.b.T @ gradient)


def test_products_large_enough_for_another_library_see_the_update():
    """2^21 multiplications: on some CPUs the product is oneDNN's, which is handed the weight."""
    torch.manual_seed(0)
    layer = encoders.layers.Linear(256, 256)
    x = torch.randn(64, 256)
    add_lora(nn.ModuleDict({"qkv": layer}), ["qkv"], rank=4)
    stir(layer)
    update = layer.parametrizations.weight[0]
    weight = layer.parametrizations.weight.original + 4.0 * update.b @ update.a
    expected = x.double() @ weight.double().T + layer.bias.double()
    torch.testing.assert_close(layer(x), expected.float(), rtol=1e-4, atol=1e-4)
    layer(x).sum().backward()
    assert update.a.grad.abs().max() > 0


def test_the_same_seed_gives_the_same_updates():
    first, second, other = (choose(build("brainlm"), "lora", seed=s)[0] for s in (1, 1, 2))
    states = [tower.state_dict() for tower in (first, second, other)]
    drawn = [key for key in states[0] if key.endswith("weight.0.a")]
    assert drawn
    for key in drawn:
        assert torch.equal(states[0][key], states[1][key])
        assert not torch.equal(states[0][key], states[2][key])


@pytest.mark.parametrize(
    ("how", "options", "says"),
    [
        ("lor", {}, "how='lor' is unknown. Did you mean 'lora'?"),
        ("last", {}, "expected last-K with a number of blocks, such as last-2"),
        ("last-0", {}, "expected last-K with a number of blocks, such as last-2"),
        ("last-9", {}, "the encoder has 1 blocks; use last-1 or fewer, or all"),
        ("lora", {"rank": 99}, "rank=99: expected 1 to 16"),
        (
            "lora",
            {"patterns": ["*.nothing"]},
            "no Linear layer is called *.nothing: expected names",
        ),
    ],
)
def test_bad_choices_are_one_line_that_says_what_to_do(how, options, says):
    with pytest.raises(UserError) as error:
        choose(build("brainjepa"), how, **options)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_a_second_update_is_refused_until_the_first_is_merged():
    module = build("brainlm")
    add_lora(module, ["*qkv"])
    with pytest.raises(UserError, match="has an update already: merge it first"):
        add_lora(module, ["*qkv"])
    merge_lora(module)
    add_lora(module, ["*qkv"])
