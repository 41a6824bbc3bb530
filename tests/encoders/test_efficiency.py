"""What encoders compute, how often, in which precision and memory; features whatever the batch."""

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close

from brainfusion.encoders import products
from brainfusion.encoders.brainjepa import BrainJEPA, BrainJEPAConfig
from brainfusion.encoders.brainlm import BrainLM, BrainLMConfig
from brainfusion.encoders.brainlm_image import BrainLMImage, BrainLMImageConfig
from brainfusion.encoders.layers import Block, by_chunks

SMALL = BrainJEPAConfig(
    n_parcels=6, n_trs=24, patch_trs=8, width=16, depth=2, n_heads=2, predictor_width=8,
    predictor_depth=1, gradient_dim=4,
)  # fmt: skip
SMALL_LM = BrainLMConfig(
    n_parcels=6, n_trs=20, patch_trs=5, width=16, depth=2, n_heads=2, dim_hidden=24,
    decoder_depth=2, decoder_n_heads=2, decoder_dim_hidden=20, conv_kernel_size=5, n_landmarks=5,
    position_dropout=0.1, xyz_unit_mm=50.0, init_std=0.1,
)  # fmt: skip
SMALL_IMAGE = BrainLMImageConfig(
    n_parcels=20, n_trs=6, image_size=24, patch_size=4, width=16, depth=2, n_heads=2,
    dim_hidden=24, decoder_width=12, decoder_depth=2, decoder_n_heads=1, decoder_dim_hidden=20,
)  # fmt: skip
FAMILIES = ("brainjepa", "full", "nystrom", "image")
POOLINGS = {
    "brainjepa": ("mean", "parcel-mean", "parcel-std"),
    "full": ("mean", "cls", "parcel-mean", "parcel-std"),
    "nystrom": ("mean", "cls", "parcel-mean", "parcel-std"),
    "image": ("mean", "cls"),
}


def model_of(family: str) -> Any:
    torch.manual_seed(1)
    if family == "brainjepa":
        return BrainJEPA(SMALL, torch.randn(6, 4))
    if family == "image":
        return BrainLMImage(SMALL_IMAGE)
    return BrainLM(dataclasses.replace(SMALL_LM, attention=family))  # type: ignore[arg-type]


def loss_of(family: str, model: Any, call: Any = None) -> Callable[[], Tensor]:
    """The training loss of a fixed batch, with the same dropout on each call."""
    call = model if call is None else call
    torch.manual_seed(2)
    signal = torch.randn(3, model.n_parcels, model.window_trs)
    if family == "brainjepa":
        tokens = torch.stack([torch.randperm(model.n_tokens) for _ in range(3)])
        return lambda: call(signal, [tokens[:, :5]], [tokens[:, 5:12]])
    xyz, noise = torch.randn(model.n_parcels, 3) * 40, torch.rand(3, model.n_tokens)

    def loss() -> Tensor:
        torch.manual_seed(3)
        return call(signal, xyz, noise=noise, mask_ratio=0.5).loss

    return loss


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def masks(*rows: list[int]) -> list[Tensor]:
    return [torch.tensor(rows)]


@pytest.fixture(scope="module")
def small() -> BrainJEPA:
    return model_of("brainjepa")


# -- what is computed, and how often ---------------------------------------------------------------


@torch.no_grad()
def test_features_of_wanted_tokens_are_those_of_all(small: BrainJEPA) -> None:
    fmri, every = torch.randn(2, 6, 24), small.encoder(torch.zeros(1, 6, 24)).shape[1]
    whole = small.encoder(fmri)
    for columns in ([0], [3, 3, 17, 5], list(range(every)), [*range(every), 4]):
        wanted = torch.tensor([columns, columns[::-1]])
        few = small.encoder(fmri, wanted=wanted)
        assert_close(few, torch.stack([whole[i, wanted[i]] for i in range(2)]))


def test_the_last_blocks_see_to_nothing_but_what_the_loss_reads() -> None:
    torch.manual_seed(4)
    j = BrainJEPA(SMALL, torch.randn(6, 4))
    rows: dict[str, list[int]] = {}
    for name in ("target_encoder", "predictor"):
        part = j.get_submodule(name)
        for index, block in enumerate(part.blocks):  # type: ignore[arg-type]
            block.mlp.register_forward_pre_hook(
                lambda _, args, key=f"{name}.{index}": rows.setdefault(key, []).append(
                    args[0].shape[:-1].numel()
                )
            )
    context, target = masks([0, 1, 2, 5], [1, 2, 3, 4]), masks([9, 12, 14], [10, 17, 16])
    j(torch.randn(2, 6, 24), context, target)
    assert rows == {"target_encoder.0": [36], "target_encoder.1": [6], "predictor.0": [6]}


def test_the_loss_is_the_mean_over_all_pairs_of_masks(small: BrainJEPA) -> None:
    fmri = torch.randn(2, 6, 24)
    context = [torch.tensor([[0, 1], [2, 3]]), torch.tensor([[4, 5], [6, 7]])]
    target = [torch.tensor([[8, 9, 10]] * 2), torch.tensor([[8, 12, 13]] * 2)]
    pairs = [small.loss(fmri, [c], [t]) for c in context for t in target]
    assert_close(small.loss(fmri, context, target), torch.stack(pairs).mean())
    wanted = small.target(fmri, target, n_context=2)
    assert wanted.shape == (8, 3, 16)
    assert torch.equal(wanted[2:4], wanted[:2])
    assert_close(wanted[4:6], small.target(fmri, target[1:]))


def fresh_position() -> nn.Module:
    return BrainJEPA(SMALL, torch.randn(6, 4)).encoder.position


def calls_of(module: nn.Module) -> list[int]:
    seen: list[int] = []
    module.register_forward_hook(lambda *_: seen.append(1))
    return seen


def test_positions_are_mapped_once_in_evaluation_and_once_a_training_step() -> None:
    torch.manual_seed(5)
    j = BrainJEPA(SMALL, torch.randn(6, 4))
    bold = torch.randn(2, 6, 70)
    seen = calls_of(j.target_encoder.position.mapping)
    j.eval()
    with torch.no_grad():
        for _ in range(3):
            j.encode(bold)
    assert len(seen) == 1
    j.train()
    for step in range(2):
        j(bold[:, :, :24], masks([0, 1], [2, 3]), masks([9, 12], [10, 17])).backward()
        assert len(seen) == 2 + step


@torch.no_grad()
@pytest.mark.parametrize(
    "change",
    [
        lambda j: j.encoder.position.mapping.weight.mul_(-0.5),
        lambda j: j.encoder.position.mapping.weight[0, :1].add_(1.0),
        lambda j: j.encoder.position.mapping.weight.data.mul_(-0.5),  # unseen by version counters
        lambda j: j.encoder.position.mapping.bias.numpy().fill(3.0),
        lambda j: setattr(j.encoder.position.mapping, "weight", nn.Parameter(torch.randn(8, 4))),
        lambda j: j.set_gradient(torch.randn(6, 4)),
        lambda j: j.load_state_dict(BrainJEPA(SMALL, torch.randn(6, 4)).state_dict()),
        lambda j: j.encoder.position.load_state_dict(fresh_position().state_dict()),
        lambda j: j.encoder.position.time_table.add_(1.0),
        lambda j: j.double(),
        lambda j: j.bfloat16(),
    ],
)
def test_kept_positions_are_never_stale(change) -> None:
    torch.manual_seed(6)
    j = BrainJEPA(SMALL, torch.randn(6, 4)).eval()
    position = j.encoder.position
    before = position()
    assert torch.equal(position(), before)
    change(j)
    after = position()
    assert not torch.equal(after, before) or after.dtype != before.dtype
    fresh = position.train()()
    assert torch.equal(after, fresh)
    assert after.dtype == fresh.dtype


def test_positions_follow_an_optimiser_step_and_the_average() -> None:
    torch.manual_seed(7)
    j = BrainJEPA(SMALL, torch.randn(6, 4)).eval()
    optimizer = torch.optim.AdamW(j.encoder.parameters(), lr=0.1)
    bold = torch.randn(2, 6, 24)
    for _ in range(2):
        with torch.no_grad():
            kept = [j.encode(bold, part=part) for part in ("context", "target")]
        j.loss(bold, masks([0, 1], [2, 3]), masks([9, 12], [10, 17])).backward()
        optimizer.step()
        j.update_target(0.5)
        with torch.no_grad():
            moved = [j.encode(bold, part=part) for part in ("context", "target")]
            fresh = copy.deepcopy(j).train()
            for old, new, part in zip(kept, moved, ("context", "target"), strict=True):
                assert not torch.allclose(old, new)
                assert torch.equal(new, fresh.encode(bold, part=part))


def test_positions_of_a_pass_with_gradients_carry_them(small: BrainJEPA) -> None:
    small.eval()
    bold = torch.randn(2, 6, 24)
    with torch.no_grad():
        small.encode(bold, part="context")
    small.zero_grad()
    small.encoder(bold)[0, 0, 0].backward()
    assert float(small.encoder.position.mapping.weight.grad.abs().sum()) > 0


def test_the_image_decoder_ends_with_the_patches_of_the_recording() -> None:
    model = model_of("image")
    # Columns 9 to 15 of 24 hold the recording: patches 2 and 3 of 6. Its rows touch all 6.
    assert model.real.tolist() == [6 * row + column for row in range(6) for column in (2, 3)]
    seen: list[int] = []
    model.decoder_head.register_forward_pre_hook(lambda *_: seen.append(1))
    for layer in model.decoder_layers:
        layer.mlp.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    loss_of("image", model)()
    assert seen == [37, 12]


def test_chunks_change_nothing_but_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    block = Block(16, 2, dim_hidden=64, eps=1e-6)
    x = torch.randn(2, 50, 16)
    expected = block(x)
    monkeypatch.setattr("brainfusion.encoders.layers.CHUNK", 64 * 7)
    rows: list[int] = []
    block.mlp.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    with torch.no_grad():
        assert_close(block(x), expected.detach())
        assert rows == [7] * 14 + [2]
        turned = by_chunks(torch.sin, x.transpose(0, 1), 64)  # neither contiguous nor in place
        assert torch.equal(turned, x.transpose(0, 1).sin())
    assert torch.equal(block(x), expected)  # with gradients, whole


# -- memory, precision, compilation ----------------------------------------------------------------


def kept_bytes(loss: Callable[[], Tensor]) -> int:
    """Bytes that a forward pass keeps for its backward pass, each storage once."""
    storages: dict[int, Tensor] = {}

    def pack(x: Tensor) -> Tensor:
        storages[x.untyped_storage().data_ptr()] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss()
    return sum(x.untyped_storage().nbytes() for x in storages.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_checkpointing_keeps_less_and_gives_the_same_gradients(family: str) -> None:
    model = model_of(family).train()
    loss = loss_of(family, model)
    weights = sum(p.nbytes for p in model.parameters())
    whole = kept_bytes(loss)
    plain = loss()
    plain.backward()
    expected = gradients(model)
    model.zero_grad()
    model.set_activation_checkpointing(True)
    assert kept_bytes(loss) < weights + 0.5 * (whole - weights)
    again = loss()
    again.backward()
    assert torch.equal(plain, again)
    assert gradients(model).keys() == expected.keys()
    for name, gradient in gradients(model).items():
        assert torch.equal(gradient, expected[name]), name
    # Evaluation keeps no activations to begin with, and is left alone.
    monitored: list[bool] = []
    block = (model.encoder.blocks if family == "brainjepa" else model.layers)[0]
    block.register_forward_pre_hook(lambda *_: monitored.append(torch.is_grad_enabled()))
    model.eval()
    loss().backward()
    assert monitored == [True]  # not a second time in the backward pass
    model.train()
    loss().backward()
    assert monitored == [True, True, True]
    model.set_activation_checkpointing(False)
    assert kept_bytes(loss) == whole


@pytest.mark.parametrize("family", FAMILIES)
def test_autocast_trains_and_stays_close_to_float32(family: str) -> None:
    model = model_of(family).train()
    loss = loss_of(family, model)
    exact = loss()
    exact.backward()
    expected = torch.cat([g.flatten() for g in gradients(model).values()])
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        rough = loss()
    rough.backward()
    assert rough.dtype == torch.float32
    assert_close(rough, exact, rtol=0.02, atol=0)  # bfloat16 has 8 bits: 0.4% a rounding
    found = gradients(model)
    assert {g.dtype for g in found.values()} == {torch.float32}
    flat = torch.cat([g.flatten() for g in found.values()])
    assert torch.cosine_similarity(flat, expected, dim=0) > 0.995
    assert all(float(g.abs().sum()) > 0 for name, g in found.items() if "qkv.bias" not in name)


@pytest.mark.parametrize("family", FAMILIES)
def test_norms_positions_and_coordinates_are_float32_under_autocast(family: str) -> None:
    model = model_of(family).train()
    into: set[torch.dtype] = set()
    for name, module in model.named_modules():
        if isinstance(module, nn.LayerNorm) or name.endswith(("mapping", "xyz_projection")):
            module.register_forward_hook(
                lambda _, args, out: into.update((args[0].dtype, out.dtype))
            )
    with torch.autocast("cpu", torch.bfloat16):
        loss_of(family, model)()
        assert into == {torch.float32}
        if family == "brainjepa":
            position = model.encoder.position()
            assert position.dtype == torch.float32
    if family == "brainjepa":
        assert torch.equal(position, model.encoder.position())


def check_compiled(family: str, backend: str, *, checkpointing: bool = False) -> None:
    model = model_of(family).train()
    model.set_activation_checkpointing(checkpointing)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # compiled code draws other numbers
    expected = loss_of(family, model)()
    expected.backward()
    plain = gradients(model)
    model.zero_grad()
    torch.compiler.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    found = loss_of(family, model, compiled)()
    found.backward()
    assert_close(found, expected, rtol=1e-5, atol=0)
    largest = max(float(g.abs().max()) for g in plain.values())
    for name, gradient in gradients(model).items():
        assert_close(gradient, plain[name], rtol=0, atol=1e-5 * largest)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "checkpointing"), [("brainjepa", True), ("full", False)])
def test_training_compiles_into_one_graph(family: str, checkpointing: bool) -> None:
    check_compiled(family, "aot_eager", checkpointing=checkpointing)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's own, on import
@pytest.mark.parametrize(
    ("family", "checkpointing"), [("brainjepa", True), *((family, False) for family in FAMILIES)]
)
def test_compiled_training_gives_the_same_loss_and_gradients(
    family: str, checkpointing: bool
) -> None:
    check_compiled(family, "inductor", checkpointing=checkpointing)


# -- features do not depend on how they are asked for ----------------------------------------------

MODELS = {family: model_of(family) for family in FAMILIES}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("onednn", [True, False])
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_features_do_not_depend_on_batch_order_or_call(
    family: str, onednn: bool, data: st.DataObject
) -> None:
    model = MODELS[family].eval()
    pooling = data.draw(st.sampled_from(POOLINGS[family]))
    lowest = 2 * SMALL.patch_trs if family == "brainjepa" else 5
    n_trs = data.draw(st.integers(lowest, 3 * model.window_trs))
    n_rows = data.draw(st.integers(1, 6))
    order = data.draw(st.permutations(range(n_rows)))
    cut = data.draw(st.integers(0, n_rows))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    bold = torch.randn(n_rows, model.n_parcels, n_trs, generator=generator)
    places = [] if family == "brainjepa" else [torch.linspace(-60, 60, 3 * model.n_parcels)]
    inputs = [x.view(-1, 3) for x in places]

    def encode(rows: Tensor) -> Tensor:
        return model.encode(rows, *inputs, pooling=pooling)

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(products, "onednn_is_faster", lambda: onednn)
        for name in ("MIN_LINEAR", "MIN_TRAINED", "MIN_ATTENTION", "MIN_QUERIES", "MIN_HEAD_WIDTH"):
            patch.setattr(products, name, 0)
        whole = encode(bold)
        assert torch.equal(encode(bold), whole)
        parts = [encode(bold[list(rows)]) for rows in (order[cut:], order[:cut]) if rows]
    restored = torch.cat(parts)[torch.tensor([*order[cut:], *order[:cut]]).argsort()]
    assert_close(restored, whole, rtol=0, atol=1e-5)  # float32 sums in another order
