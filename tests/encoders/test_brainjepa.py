"""Brain-JEPA against outputs and gradients of the reference, and what a user relies on."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F
from torch.testing import assert_close

from brainfusion.encoders import create, from_upstream, to_upstream
from brainfusion.encoders.brainjepa import PRESETS, BrainJEPA, BrainJEPAConfig
from brainfusion.encoders.brainjepa_upstream import read_checkpoint
from brainfusion.encoders.gradients import connectivity_of, gradient_table
from brainfusion.runtime.errors import CheckpointError, UserError

GOLDENS = Path(__file__).parents[1] / "goldens"
TOLERANCE = 1e-5  # of the fixtures' README: outputs absolute, gradients of the largest entry
SMALL = BrainJEPAConfig(
    n_parcels=6, n_trs=24, patch_trs=8, width=16, depth=2, n_heads=2, predictor_width=8,
    predictor_depth=1, gradient_dim=4,
)  # fmt: skip


class Golden:
    def __init__(self, name: str) -> None:
        tensors = load_file(GOLDENS / f"{name}.safetensors")
        self.config = json.loads((GOLDENS / f"{name}.json").read_text())["spec"]["config"]
        self.out = {key[4:]: v for key, v in tensors.items() if key.startswith("out/")}
        self.grad = {key[10:]: v for key, v in tensors.items() if key.startswith("grad/jepa/")}
        state = {key[6:]: v for key, v in tensors.items() if key.startswith("state/")}
        self.state: dict[str, dict[str, torch.Tensor]] = {}
        for key, value in state.items():
            part, rest = key.split("/", 1)
            self.state.setdefault(part, {})[rest] = value
        self.downstream = self.state.pop("downstream")
        self.fmri, self.gradient = tensors["in/fmri"], tensors["in/gradient"]
        self.masks_enc, self.masks_pred = (
            [tensors[key] for key in sorted(tensors) if key.startswith(f"in/{kind}.")]
            for kind in ("masks_enc", "masks_pred")
        )

    def load(self, state: object = None, gradient: object = None) -> BrainJEPA:
        state = self.state if state is None else state
        gradient = self.gradient if gradient is None else gradient
        module = from_upstream("brainjepa", state, config=self.config, gradient=gradient)  # type: ignore[arg-type]
        assert isinstance(module, BrainJEPA)
        return module


@pytest.fixture(scope="module", params=["brainjepa_a", "brainjepa_b"])
def golden(request: pytest.FixtureRequest) -> Golden:
    return Golden(request.param)


@pytest.fixture(scope="module")
def small() -> BrainJEPA:
    torch.manual_seed(0)
    return BrainJEPA(SMALL, np.random.default_rng(0).normal(size=(6, 4)))


def close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = TOLERANCE) -> None:
    assert_close(actual, expected, rtol=0.0, atol=tolerance)


def make(preset: str = "tiny", **overrides: object) -> BrainJEPA:
    module = create("brainjepa", preset, **overrides)  # type: ignore[arg-type]
    assert isinstance(module, BrainJEPA)
    return module


def masks(*rows: list[int]) -> list[torch.Tensor]:
    return [torch.tensor(rows)]


# -- against the reference -------------------------------------------------------------------------


@torch.no_grad()
def test_every_output_matches_the_reference(golden: Golden) -> None:
    j, out, fmri = golden.load(), golden.out, golden.fmri
    context = j.encoder(fmri, golden.masks_enc)
    seen = {
        "full/pos_embed": j.encoder.position()[None],
        "full/predictor_pos_embed": j.predictor.position()[None],
        "full/encoder": j.encoder(fmri),
        "full/attention.0": j.encoder.attention_maps(fmri, block=0)[:1],
        "jepa/context": context,
        "jepa/prediction": j.predictor(context, golden.masks_enc, golden.masks_pred),
        "jepa/target": j.target(fmri, golden.masks_pred, len(golden.masks_enc)),
        "jepa/target_full": F.layer_norm(j.target_encoder(fmri), (j.config.width,), eps=1e-5),
        "jepa/loss": j.loss(fmri, golden.masks_enc, golden.masks_pred),
        "downstream/logits": logits(golden, j.encode(fmri.squeeze(1))),
    }
    assert seen.keys() == out.keys()
    for name, value in seen.items():
        assert value.shape == out[name].shape, name
        close(value, out[name])


def logits(golden: Golden, pooled: torch.Tensor) -> torch.Tensor:
    head = golden.downstream
    normed = F.layer_norm(
        pooled, pooled.shape[-1:], head["fc_norm.weight"], head["fc_norm.bias"], eps=1e-6
    )
    return F.linear(normed, head["head.weight"], head["head.bias"])


def test_every_gradient_of_a_training_step_matches_the_reference(golden: Golden) -> None:
    j = golden.load()
    j.loss(golden.fmri, golden.masks_enc, golden.masks_pred).backward()
    grads = to_upstream(j, grad=True)
    assert grads.keys() == golden.grad.keys()
    scale = max(float(value.abs().max()) for value in golden.grad.values())
    for key, value in golden.grad.items():
        close(grads[key], value, TOLERANCE * scale)


def test_weights_go_from_the_reference_to_ours_and_back_unchanged(golden: Golden) -> None:
    back = to_upstream(golden.load())
    expected = {f"{part}/{key}": v for part, s in golden.state.items() for key, v in s.items()}
    assert back.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(back[key], value), key
    again = golden.load(back)
    assert torch.equal(again.encode(golden.fmri[:, 0]), golden.load().encode(golden.fmri[:, 0]))


def test_fresh_position_tables_equal_the_references_to_rounding(golden: Golden) -> None:
    j = golden.load()
    fresh = dict(BrainJEPA(j.config, golden.gradient).named_parameters())
    tables = {key: value for key, value in j.named_parameters() if key.endswith("_table")}
    assert len(tables) in (3, 6)
    for key, value in tables.items():
        assert_close(fresh[key], value, rtol=0.0, atol=1e-7)


def test_layer_norms_have_the_published_epsilon(small: BrainJEPA) -> None:
    norms = [m for m in small.modules() if isinstance(m, torch.nn.LayerNorm)]
    assert len(norms) == 2 * (2 * 2 + 1) + (2 * 1 + 1)
    assert {norm.eps for norm in norms} == {1e-6}


@pytest.mark.parametrize(
    ("preset", "encoder", "predictor"),
    [
        ("small", (22_170_816, 21_306_816), (11_813_568, 10_949_568)),
        ("base", (86_808_960, 85_080_960), (12_108_864, 11_244_864)),
        ("large", (304_648_704, 302_344_704), (12_305_728, 11_441_728)),
    ],
)
def test_published_sizes_have_the_published_parameter_counts(
    preset: str, encoder: tuple[int, int], predictor: tuple[int, int]
) -> None:
    with torch.device("meta"):
        j = make(preset)
    for part, expected in ((j.encoder, encoder), (j.predictor, predictor)):
        parameters = list(part.parameters())
        trained = sum(p.numel() for p in parameters if p.requires_grad)
        assert (sum(p.numel() for p in parameters), trained) == expected
    assert sum(p.numel() for p in j.target_encoder.parameters() if p.requires_grad) == 0


# -- checkpoints of the authors --------------------------------------------------------------------


def test_a_checkpoint_file_with_module_in_front_of_its_keys_loads(tmp_path: Path) -> None:
    golden = Golden("brainjepa_a")
    file = tmp_path / "jepa-ep300.pth.tar"
    saved = {
        part: {f"module.{key}": value for key, value in state.items()}
        for part, state in golden.state.items()
    }
    torch.save({**saved, "opt": {}, "scaler": None, "epoch": 300, "loss": 0.1}, file)
    table = tmp_path / "gradient.csv"
    np.savetxt(table, golden.gradient[0].numpy(), delimiter=",", fmt="%.9g")
    j = golden.load(file, table)
    with torch.no_grad():
        close(j.encoder(golden.fmri), golden.out["full/encoder"])


def test_a_file_that_is_truncated_or_holds_code_is_refused_in_one_line(tmp_path: Path) -> None:
    file = tmp_path / "bad.pth.tar"
    torch.save({"encoder": Path("x")}, file)  # an object that is neither tensor nor plain value
    with pytest.raises(CheckpointError, match="never run") as error:
        read_checkpoint(file)
    assert "\n" not in str(error.value)
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="truncated"):
        read_checkpoint(file)
    with pytest.raises(CheckpointError, match="does not exist"):
        read_checkpoint(tmp_path / "none.pth.tar")


def test_a_checkpoint_that_does_not_fit_is_refused_with_the_keys() -> None:
    golden = Golden("brainjepa_a")

    def load(state: dict = golden.state, **changes: object) -> None:
        from_upstream("brainjepa", state, config=golden.config | changes, gradient=golden.gradient)

    with pytest.raises(CheckpointError, match="another size"):
        load(pred_emb_dim=64)
    with pytest.raises(CheckpointError, match="12 keys are missing"):
        load(depth=3)
    with pytest.raises(CheckpointError, match="is add_w right"):
        load(add_w="origin")
    with pytest.raises(CheckpointError, match="lacks target_encoder"):
        load({key: golden.state[key] for key in ("encoder", "predictor")})
    with pytest.raises(CheckpointError, match="no entry 'model'"):
        load(golden.state | {"model": {}})
    with pytest.raises(UserError, match="Did you mean 'embed_dim'"):
        load(embed_dims=48)


def test_a_gradient_table_with_wrong_rows_is_one_clear_error() -> None:
    golden = Golden("brainjepa_a")
    with pytest.raises(UserError, match=r"\(19, 30\).*expects \(20, 30\)") as error:
        golden.load(gradient=golden.gradient[:, 1:])
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="do not hold the gradient table"):
        from_upstream("brainjepa", golden.state, config=golden.config)
    with pytest.raises(UserError, match="not finite"):
        BrainJEPA(SMALL, np.full((6, 4), np.nan))


def test_mapping_without_a_gradient_table_says_how_to_give_one() -> None:
    with pytest.raises(UserError, match="pass gradient="):
        BrainJEPA(SMALL).encode(torch.zeros(1, 6, 24))


# -- our own checkpoints, the average, encoding ----------------------------------------------------


def test_our_state_dict_is_complete(small: BrainJEPA) -> None:
    other = BrainJEPA(SMALL)
    other.load_state_dict(small.state_dict())
    bold = torch.randn(2, 6, 24)
    assert torch.equal(other.encode(bold), small.encode(bold))
    assert "encoder/position.gradient" not in to_upstream(small)


def test_target_encoder_starts_equal_and_follows_as_a_moving_average(small: BrainJEPA) -> None:
    pairs = list(zip(small.encoder.parameters(), small.target_encoder.parameters(), strict=True))
    before = [target.clone() for _, target in pairs]
    assert all(torch.equal(online, target) for online, target in pairs)
    with torch.no_grad():
        for online, _ in pairs:
            if online.requires_grad:
                online.add_(1.0)
    small.update_target(0.75)
    for (online, target), old in zip(pairs, before, strict=True):
        assert_close(target, old + 0.25 * online.requires_grad)
    small.update_target(0.0)
    assert all(torch.allclose(online, target) for online, target in pairs)


def test_a_step_trains_encoder_and_predictor_and_leaves_the_target_alone() -> None:
    torch.manual_seed(1)
    j = BrainJEPA(SMALL, torch.randn(6, 4))
    fmri = torch.randn(2, 6, 24)
    j(fmri, masks([0, 1, 2, 5], [1, 2, 3, 4]), masks([9, 12], [10, 17])).backward()
    missing = [n for n, p in j.named_parameters() if p.requires_grad and p.grad is None]
    assert missing == []
    assert all(p.grad is None for p in j.target_encoder.parameters())


def test_context_features_do_not_depend_on_hidden_tokens() -> None:
    torch.manual_seed(2)
    j = BrainJEPA(SMALL, torch.randn(6, 4))
    fmri = torch.randn(1, 6, 24)
    changed = fmri.clone()
    changed[0, 3, 8:16] = 100.0  # token 3 * 3 + 1
    assert torch.equal(j.encoder(fmri, masks([0, 9, 11])), j.encoder(changed, masks([0, 9, 11])))
    assert not torch.allclose(
        j.encoder(fmri, masks([0, 9, 10])), j.encoder(changed, masks([0, 9, 10]))
    )


@torch.no_grad()
def test_encode_is_deterministic_and_does_not_depend_on_batch_mates(small: BrainJEPA) -> None:
    bold = torch.randn(7, 6, 61)
    together = small.train().encode(bold)
    assert torch.equal(together, small.eval().encode(bold))
    alone = torch.cat([small.encode(row[None]) for row in bold])
    assert_close(alone, together, rtol=0.0, atol=1e-5)  # float32 in another order of sums


@torch.no_grad()
def test_encode_averages_windows_that_cover_a_long_recording(small: BrainJEPA) -> None:
    bold = torch.randn(2, 6, 61)
    windows = [bold[:, :, start : start + 24] for start in (0, 24, 37)]
    for pooling in ("mean", "parcel-mean"):
        expected = sum(small.encode(window, pooling=pooling) for window in windows) / 3
        assert_close(small.encode(bold, pooling=pooling), expected)


@torch.no_grad()
@pytest.mark.parametrize(("n_trs", "n_patches"), [(8, 1), (15, 1), (16, 2), (23, 2)])
def test_a_recording_shorter_than_a_window_shows_the_patches_that_it_has(
    small: BrainJEPA, n_trs: int, n_patches: int
) -> None:
    bold = torch.randn(2, 6, n_trs)
    window = torch.randn(2, 6, 24)  # what lies beyond the recording is never seen
    window[:, :, : 8 * n_patches] = bold[:, :, : 8 * n_patches]
    seen = [[3 * parcel + patch for parcel in range(6) for patch in range(n_patches)]] * 2
    tokens = small.target_encoder(window, masks(*seen))
    assert_close(small.encode(bold), tokens.mean(1))
    parcels = tokens.unflatten(1, (6, n_patches))
    assert_close(small.encode(bold, pooling="parcel-mean"), parcels.mean(2).flatten(1))
    # A whole window of the same start is something else.
    assert not torch.allclose(small.encode(bold), small.encode(window), atol=1e-3)


@torch.no_grad()
def test_parcel_pooling_averages_the_times_of_each_parcel(small: BrainJEPA) -> None:
    bold = torch.randn(2, 6, 24)
    tokens = small.target_encoder(bold)
    parcels = small.encode(bold, pooling="parcel-mean")
    assert parcels.shape == (2, 6 * 16)
    assert_close(parcels[1, 3 * 16 : 4 * 16], tokens[1, 9:12].mean(0))
    assert_close(parcels.unflatten(1, (6, 16)).mean(1), small.encode(bold))
    maps = small.encoder.attention_maps(bold)
    assert maps.shape == (2, 2, 18, 18)
    assert_close(maps.sum(-1), torch.ones(2, 2, 18))


@pytest.mark.parametrize(
    ("bold", "options", "message"),
    [
        (torch.zeros(1, 6, 7), {}, r"has 7 TRs, fewer than one patch \(8 TRs\): leave it out"),
        (torch.zeros(1, 6, 15), {"pooling": "parcel-std"}, "needs at least 2 time patches"),
        (torch.zeros(1, 5, 24), {}, "expected .recordings, 6 parcels"),
        (torch.full((1, 6, 24), torch.nan), {}, "not finite"),
        (torch.zeros(1, 6, 24), {"pooling": "cls"}, "has no CLS token"),
        (torch.zeros(1, 6, 24), {"pooling": "meen"}, "Did you mean 'mean'"),
    ],
)
def test_encode_refuses_what_it_cannot_do(
    small: BrainJEPA, bold: torch.Tensor, options: dict, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        small.encode(bold, **options)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_trs": 170}, "Use n_trs=160"),
        ({"n_trs": 8}, "shorter than one patch"),
        ({"width": 66}, "multiple of 4"),
        ({"n_heads": 5}, "multiple of 4 .* n_heads=5"),
        ({"positions": "map"}, "mapping"),
    ],
)
def test_an_impossible_architecture_is_refused(changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make(**changes)


def test_tiny_takes_any_number_of_parcels_and_trs() -> None:
    j = make(n_parcels=7, n_trs=48, positions="origin")
    assert (j.window_trs, j.n_parcels, j.n_tokens) == (48, 7, 21)
    assert j.encode(torch.randn(2, 7, 50)).shape == (2, PRESETS["tiny"].width)


# -- gradients of connectivity ---------------------------------------------------------------------


def circle(p: int) -> np.ndarray:
    angle = 2 * np.pi * np.arange(p) / p
    return np.asarray(np.exp((np.cos(angle[:, None] - angle) - 1.0) / 0.05))


def test_gradients_of_a_ring_are_its_sine_and_cosine() -> None:
    p = 60
    table = gradient_table(circle(p), 4).astype(np.float64)
    radius = np.hypot(table[:, 0], table[:, 1])
    np.testing.assert_allclose(radius, radius[0], rtol=1e-5)
    phase = np.unwrap(np.arctan2(table[:, 1], table[:, 0]))
    np.testing.assert_allclose(np.abs(np.diff(phase)), 2 * np.pi / p, rtol=1e-4)
    assert (np.diff(np.hypot(table[:, ::2], table[:, 1::2])[0]) < 0).all()  # falling eigenvalues


def test_gradients_do_not_depend_on_the_order_of_the_parcels() -> None:
    rng = np.random.default_rng(3)
    mixed = rng.normal(size=(40, 4)) @ rng.normal(size=(4, 200))
    matrix = np.asarray(np.corrcoef(mixed))
    order = rng.permutation(40)
    table = gradient_table(matrix, 10)
    assert (table.max(0) > -table.min(0)).all()  # the largest entry is positive
    moved = gradient_table(matrix[np.ix_(order, order)], 10)
    np.testing.assert_allclose(moved, table[order], atol=1e-4 * np.abs(table).max())


def test_missing_parcels_and_small_atlases_get_zeros_and_a_note(
    capsys: pytest.CaptureFixture[str],
) -> None:
    matrix = circle(12)
    matrix[5], matrix[:, 5] = np.nan, np.nan
    table = gradient_table(matrix, 30)
    assert table.shape == (12, 30)
    assert np.isfinite(table).all()
    assert not table[5].any()
    assert not table[:, 10:].any()
    assert table[:, :10].any(axis=0).all()
    note = capsys.readouterr().err
    assert "1 of 12 parcels" in note
    assert "columns 11 to 30" in note
    apart = np.kron(np.eye(2), np.ones((3, 3)))
    with pytest.raises(UserError, match="groups of parcels"):
        gradient_table(apart, 2)


class Listed:
    def __init__(self, bolds: list[np.ndarray]) -> None:
        self.bolds = bolds

    def read(self, row: int) -> np.ndarray:
        return self.bolds[row]


def test_connectivity_averages_fisher_z_over_the_recordings_that_have_the_pair() -> None:
    rng = np.random.default_rng(4)
    bolds = [rng.normal(size=(5, 80)) + rng.normal(size=80) for _ in range(3)]
    bolds[0][2] = np.nan
    bolds[1][4] = 7.3  # constant: it correlates with nothing
    bolds[2][4] = np.nan
    bolds[0][4] = np.nan
    found = connectivity_of(Listed([b.astype(np.float32) for b in bolds]), [0, 1, 2])  # type: ignore[arg-type]
    z = [np.arctanh(np.asarray(np.corrcoef(b[[0, 2]]))[0, 1]) for b in bolds[1:]]
    assert found[0, 2] == pytest.approx(np.tanh(np.mean(z)), abs=1e-6)
    z = [np.arctanh(np.asarray(np.corrcoef(b[[0, 1]]))[0, 1]) for b in bolds]
    assert found[1, 0] == pytest.approx(np.tanh(np.mean(z)), abs=1e-6)
    assert np.isnan(found[4, :4]).all()
    np.testing.assert_array_equal(np.diag(found), 1.0)
