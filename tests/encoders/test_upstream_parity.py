"""The fixed surface over random configurations: outputs and all gradients, as the reference gives.

What the reference would give comes from the transcriptions in `tests/oracles`, which the stored
fixtures hold to the references. In float64, where only a formula can differ, and once more in
float32 at the fixtures' tolerances.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from brainfusion.encoders import from_upstream, to_upstream
from brainfusion.encoders.brainjepa import BrainJEPA
from tests.encoders import random_upstream as draw
from tests.oracles import brainjepa_reference as jepa
from tests.oracles import brainlm_image_reference, brainlm_reference

SEEDS = range(16)


@pytest.fixture(autouse=True)
def without_onednn() -> Iterator[None]:
    """oneDNN's float32 gradient of a convolution along tokens is wrong, or crashes (one head)."""
    enabled = torch._C._get_mkldnn_enabled()  # the public context manager warns of Intel GPUs
    torch._C._set_mkldnn_enabled(False)
    yield
    torch._C._set_mkldnn_enabled(enabled)


FROZEN = (".pe", "position_embeddings", "decoder_pos_embed", ".emb_h", ".emb_w")
CONV = "attention.self.conv.weight"
FIELDS = ("loss", "logits", "last_hidden_state", "mask", "ids_restore")


def leaves(state: draw.State, dtype: torch.dtype) -> draw.State:
    return {k: v.to(dtype).clone().requires_grad_(not k.endswith(FROZEN)) for k, v in state.items()}


def close(actual: Tensor, expected: Tensor, atol: float, name: str) -> None:
    assert actual.dtype == expected.dtype, name
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol, msg=lambda m: f"{name}: {m}")


def check_output(ours: Any, reference: Any, atol: float) -> None:
    """Every field: present alike, of one shape, equal."""
    for field in FIELDS:
        actual, expected = getattr(ours, field), getattr(reference, field)
        assert (actual is None) == (expected is None), field
        if actual is not None:
            exact = field in ("mask", "ids_restore")
            close(actual, expected, 0 if exact else atol, field)


def check_gradients(
    module: nn.Module, state: draw.State, tolerance: float, *, but: str | None = None
) -> None:
    """All gradients and no other, to `tolerance` of the largest entry of all."""
    actual = to_upstream(module, grad=True)
    expected = {key: value.grad for key, value in state.items() if value.grad is not None}
    assert actual.keys() == expected.keys()
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    assert largest > 0
    for key, gradient in expected.items():
        if but is None or not key.endswith(but):
            close(actual[key], gradient, tolerance * largest, key)


# Outputs (absolute) and gradients (of the largest entry). In float32 those of the fixtures' README,
# in float64 rounding; Nystrom attention may keep its pseudo-inverse in float32.
RECORDING = {torch.float64: 1e-9, torch.float32: 1e-4}
OTHERS = {torch.float64: 1e-9, torch.float32: 1e-5}
NYSTROM = 1e-5
DTYPES = [torch.float64, torch.float32]


@pytest.mark.parametrize("dtype", DTYPES, ids=["float64", "float32"])
@pytest.mark.parametrize("seed", SEEDS)
def test_any_recording_model_equals_the_reference(seed: int, dtype: torch.dtype) -> None:
    config = draw.recording_config(seed)
    state = draw.recording_state(config, seed)
    m = from_upstream("brainlm", state, config=config).to(dtype)
    signal, xyz, noise = (x.to(dtype) for x in draw.recording_inputs(config, seed))
    reference = leaves(state, dtype)
    theirs = brainlm_reference.forward(reference, config, signal, xyz, noise)
    ours = m(signal, xyz, noise=noise)
    tolerance = RECORDING[dtype] if seed % 2 == 0 else max(RECORDING[dtype], NYSTROM)
    check_output(ours, theirs, tolerance)
    patches = signal.view(ours.logits.shape)
    for out in (ours, theirs):
        scalar = (out.logits - patches).square().mean() if out.loss is None else out.loss
        scalar.backward()
    check_gradients(m, reference, tolerance)


@pytest.mark.parametrize("seed", range(8))
def test_masked_nystrom_encoders_equal_the_reference(seed: int) -> None:
    # The reference's decoder sees another length than its encoder, and fails: the encoder alone.
    config = draw.recording_config(seed) | {"mask_ratio": 0.4}
    signal, xyz, noise = draw.recording_inputs(config, seed)
    length = int(noise.shape[1] * (1 - 0.4)) + 1
    config |= {"segment_means_seq_len": length, "num_landmarks": draw.divisors(length)[-2]}
    state = draw.recording_state(config, seed)
    reference = leaves(state, torch.float32)
    m = from_upstream("brainlm", state, config=config)
    theirs = brainlm_reference.forward(reference, config, signal, xyz, noise, decode=False)
    ours = m(signal, xyz, noise=noise)
    for out in (ours, theirs):
        x = out.last_hidden_state
        (x * torch.linspace(-1, 1, x.numel()).view(x.shape)).mean().backward()
    for field in ("last_hidden_state", "mask", "ids_restore"):
        close(getattr(ours, field), getattr(theirs, field), 1e-4, field)
    check_gradients(m, reference, 1e-4)
    assert not any(key.startswith("decoder.") for key in to_upstream(m, grad=True))


@pytest.mark.parametrize(
    ("seed", "dtype"),
    [(seed, torch.float32) for seed in range(6)]
    + [(seed, torch.float64) for seed in range(6, 18) if draw.IMAGES[seed % 6][1] > 16],
    ids=str,
)
def test_any_image_model_equals_the_reference(seed: int, dtype: torch.dtype) -> None:
    config = draw.image_config(seed)
    state = draw.image_state(config, seed)
    m = from_upstream("brainlm", state, config=config).to(dtype)
    signal, noise = (x.to(dtype) for x in draw.image_inputs(config, seed))
    reference = leaves(state, dtype)
    theirs = brainlm_image_reference.forward(reference, config, signal, noise)
    ours = m(signal, noise=noise)
    check_output(ours, theirs, OTHERS[dtype])
    assert ours.logits.shape == (len(signal), 424, 200)
    assert ours.mask.shape == noise.shape
    for out in (ours, theirs):
        scalar = (out.logits - signal).square().mean() if out.loss is None else out.loss
        scalar.backward()
    check_gradients(m, reference, OTHERS[dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=["float64", "float32"])
@pytest.mark.parametrize("seed", SEEDS)
def test_any_brainjepa_equals_the_reference(seed: int, dtype: torch.dtype) -> None:
    config = draw.jepa_config(seed)
    states = draw.jepa_states(config, seed)
    fmri, gradient, masks_enc, masks_pred = draw.jepa_inputs(config, seed)
    j = from_upstream("brainjepa", states, config=config, gradient=gradient)
    assert isinstance(j, BrainJEPA)
    with torch.no_grad():
        j.encoder(fmri)  # whatever this may keep must follow the module
    j = j.to(dtype)
    fmri = fmri.to(dtype)
    gradient = None if gradient is None else gradient.to(dtype)
    reference = {part: leaves(state, dtype) for part, state in states.items()}
    tolerance = OTHERS[dtype]
    n_context = len(masks_enc)
    online, predictor, target = reference.values()
    with torch.no_grad():
        z = jepa.encoder(online, config, gradient, fmri, masks_enc)
        pairs = {
            "encoder": (j.encoder(fmri), jepa.encoder(online, config, gradient, fmri)),
            "encoder, three axes": (j.encoder(fmri.squeeze(1)), j.encoder(fmri)),
            "context": (j.encoder(fmri, masks_enc), z),
            "predictor": (
                j.predictor(z, masks_enc, masks_pred),
                jepa.predictor(predictor, config, gradient, z, masks_enc, masks_pred),
            ),
            "target": (
                j.target(fmri, masks_pred, n_context),
                jepa.target(target, config, gradient, fmri, masks_pred, n_context),
            ),
            "attention": (
                j.encoder.attention_maps(fmri, block=0),
                first_attention(online, config, gradient, fmri),
            ),
            "encode": (
                j.encode(fmri.squeeze(1)),
                jepa.encoder(target, config, gradient, fmri).mean(1),
            ),
        }
    for name, (ours, theirs) in pairs.items():
        close(ours, theirs, tolerance, name)
    ours, theirs = (
        j.loss(fmri, masks_enc, masks_pred),
        jepa.loss(reference, config, gradient, fmri, masks_enc, masks_pred),
    )
    close(ours, theirs, tolerance, "loss")
    ours.backward()
    theirs.backward()
    flat = {f"{part}/{key}": v for part, state in reference.items() for key, v in state.items()}
    check_gradients(j, flat, tolerance)


def test_positions_follow_their_weights_and_their_table() -> None:
    config = draw.jepa_config(2)
    states = draw.jepa_states(config, 2)
    fmri, gradient, masks_enc, masks_pred = draw.jepa_inputs(config, 2)
    assert gradient is not None
    j = from_upstream("brainjepa", states, config=config, gradient=gradient)
    assert isinstance(j, BrainJEPA)

    @torch.no_grad()
    def loss() -> tuple[Tensor, Tensor]:
        theirs = jepa.loss(states, config, gradient, fmri, masks_enc, masks_pred)
        return j.loss(fmri, masks_enc, masks_pred), theirs

    before = loss()
    for part, stem in (("encoder", "pos_embed_proj"), ("predictor", "predictor_2dpe_proj")):
        key = f"{stem}.predictor_pos_embed_proj.weight"
        states[part][key] = states[part][key].flip(0)
        weight = dict(j.named_parameters())[f"{part}.position.mapping.weight"]
        with torch.no_grad():
            weight.copy_(states[part][key])
    after = loss()
    gradient = gradient.flip(1)
    j.set_gradient(gradient)
    for ours, theirs in (before, after, loss()):
        close(ours, theirs, 1e-5, "loss")
    assert not torch.allclose(before[0], after[0])


def first_attention(
    state: draw.State, config: dict[str, Any], gradient: Tensor | None, fmri: Tensor
) -> Tensor:
    weight, bias = state["patch_embed.proj.weight"], state["patch_embed.proj.bias"]
    x = nn.functional.conv2d(fmri, weight, bias, stride=(1, config["patch_size"]))
    x = x.flatten(2).transpose(1, 2) + jepa.positions(state, "pos_embed_proj.", config, gradient)
    x = jepa.norm(state, "blocks.0.norm1", x)
    return jepa.attention(state, "blocks.0.", x, config["num_heads"])[1]
