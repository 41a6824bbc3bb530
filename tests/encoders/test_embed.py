"""Features of a cohort: the same on every call, for any batch size, order or interruption."""

import dataclasses
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

import brainfusion
from brainfusion.data.atlas import Atlas
from brainfusion.data.cohort import Cohort
from brainfusion.data.features import read_features
from brainfusion.data.standardise import Standardiser
from brainfusion.encoders import build, create
from brainfusion.encoders import embed as embedding
from brainfusion.encoders.checkpoints import Pretrained, load_pretrained
from brainfusion.encoders.embed import (
    EmbedSettings,
    default_pooling,
    embed_to_file,
    parts_folder,
    poolings,
    shortest_trs,
)
from brainfusion.encoders.pretrain import pretrain
from brainfusion.runtime.distributed import Ranks
from brainfusion.runtime.errors import UserError
from tests.encoders.own_cohort import written
from tests.encoders.tiny_cohort import (
    ATLAS,
    ENCODERS,
    IMAGE,
    N_PARCELS,
    N_TRS,
    XYZ_MM,
    bold,
    settings,
    tiny_cohort,
)

MODELS = ("brainlm", "brainjepa")
# Persons 0 and 1 have two recordings, person 4 none, person 2 one that is longer than the window.
SCANNED = [(0, 64), (1, 64), (2, 150), (3, 64), (1, 80), (0, 64), (5, 64)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> dict[str, Pretrained]:
    cohort = tiny_cohort(tmp_path_factory.mktemp("cohort"))
    folder = tmp_path_factory.mktemp("runs")
    for model in MODELS:
        pretrain(settings(model, steps=2), cohort, folder / model, ranks=Ranks())
    return {model: load_pretrained(folder / model, model) for model in MODELS}


@pytest.fixture(params=MODELS)
def encoder(request, trained) -> Pretrained:
    return trained[request.param]


@pytest.fixture(scope="module")
def cohort(tmp_path_factory) -> Cohort:
    folder = tmp_path_factory.mktemp("new")
    return tiny_cohort(folder, n_people=6, scanned=SCANNED, missing=0.1)


def embed(encoder: Pretrained, cohort: Cohort, **options: Any) -> tuple[list[str], np.ndarray, Any]:
    embedded = embedding.embed(encoder, cohort, EmbedSettings(**options))
    assert embedded is not None
    return embedded.subjects, embedded.vectors, embedded.provenance


def encode(encoder: Pretrained, cohort: Cohort, row: int, pooling: str) -> np.ndarray:
    """One recording alone, without any of embed's code."""
    tr_s = cohort.recordings.index["tr_s"][row]
    x = encoder.conditioning.prepare(cohort.recordings.read(row), tr_s=tr_s)[None]
    where = (torch.from_numpy(XYZ_MM),) if encoder.model == "brainlm" else ()
    with torch.no_grad():
        return encoder.module.encode(torch.from_numpy(x), *where, pooling=pooling)[0].numpy()


def conditioned(encoder: Pretrained, **changes: Any) -> Pretrained:
    """The encoder with another conditioning."""
    conditioning = dataclasses.replace(encoder.conditioning, **changes)
    return dataclasses.replace(encoder, conditioning=conditioning)


@pytest.mark.parametrize("pooling", ["mean", "parcel-std"])
def test_features_are_those_of_each_recording_averaged_over_a_person(encoder, cohort, pooling):
    subjects, vectors, _ = embed(encoder, cohort, pooling=pooling)
    assert subjects == ["000", "001", "002", "003", "005"]
    assert vectors.shape == (5, 16 if pooling == "mean" else 16 * N_PARCELS)
    assert vectors.dtype == np.float32
    rows = {"000": [0, 5], "001": [1, 4], "002": [2], "003": [3], "005": [6]}
    for subject, vector in zip(subjects, vectors, strict=True):
        alone = np.mean([encode(encoder, cohort, row, pooling) for row in rows[subject]], axis=0)
        np.testing.assert_allclose(vector, alone, atol=1e-5)  # float32, another batch
    assert vectors.std(axis=0).mean() > 1e-4  # people differ by far more than that
    assert np.abs(vectors[0] - encode(encoder, cohort, 0, pooling)).max() > 1e-4


def test_features_do_not_depend_on_the_batch_size_and_repeat_exactly(encoder, cohort):
    _, before, _ = embed(encoder, cohort, pooling="parcel-mean", batch_size=16)
    torch.rand(5)
    _, again, _ = embed(encoder, cohort, pooling="parcel-mean", batch_size=16)
    np.testing.assert_array_equal(before, again)
    for batch_size in (1, 2, 3):
        _, other, _ = embed(encoder, cohort, pooling="parcel-mean", batch_size=batch_size)
        np.testing.assert_allclose(before, other, atol=1e-5)


def test_features_do_not_depend_on_the_order_of_recordings_in_the_cohort(encoder, cohort, tmp_path):
    index = cohort.recordings.index
    rows = [(index["subject"][i], cohort.recordings.read(i), 2.0) for i in range(len(index))]
    backwards = written(tmp_path, rows[::-1])
    subjects, expected, _ = embed(encoder, cohort, pooling="parcel-mean", batch_size=3)
    other, vectors, _ = embed(encoder, backwards, pooling="parcel-mean", batch_size=3)
    assert subjects == other
    np.testing.assert_allclose(vectors, expected, atol=1e-5)


def test_parcels_in_another_order_are_matched_by_name(encoder, cohort, tmp_path, capsys):
    order = np.random.default_rng(1).permutation(N_PARCELS)
    other = tiny_cohort(tmp_path, n_people=6, scanned=SCANNED, missing=0.1, order=order.tolist())
    np.testing.assert_array_equal(other.recordings.read(0), cohort.recordings.read(0)[order])
    message = "parcels are in another order than the encoder's: matched by name"
    _, expected, _ = embed(encoder, cohort, pooling="parcel-mean")
    assert message not in capsys.readouterr().err
    _, vectors, _ = embed(encoder, other, pooling="parcel-mean")
    # The recording's mean is summed in another order.
    np.testing.assert_allclose(vectors, expected, atol=1e-5)
    assert message in capsys.readouterr().err


def renamed(cohort: Cohort, parcels: tuple[str, ...]) -> Cohort:
    Atlas(name="theirs", parcels=parcels, xyz_mm=XYZ_MM).save(cohort.path / "atlas.json")
    return Cohort.open(cohort.path)


def test_missing_parcels_are_refused(encoder, tmp_path):
    cohort = tiny_cohort(tmp_path, n_people=2)
    cohort = renamed(cohort, ("q0", "q1", *ATLAS.parcels[2:]))
    message = r"'tiny' \(theirs, 16 parcels\) lacks 2 of the 16 parcels.*\(sixteen\).*'p0', 'p1'"
    with pytest.raises(UserError, match=message) as caught:
        embed(encoder, cohort, pooling="mean")
    assert "\n" not in str(caught.value)
    cohort = renamed(cohort, tuple(f"other-{i}" for i in range(N_PARCELS)))
    with pytest.raises(UserError, match="none of the 16 parcel names"):
        embed(encoder, cohort, pooling="mean")


def test_parcels_that_the_encoder_does_not_know_are_counted(trained, tmp_path, capsys):
    """A cohort with a parcel more gives the features of the cohort without it."""
    small = tiny_cohort(tmp_path / "small", n_people=2)
    xyz = np.concatenate([[[0.0, 0.0, 0.0]], XYZ_MM])
    atlas = Atlas(name="seventeen", parcels=("extra", *ATLAS.parcels), xyz_mm=xyz)
    both = [small.recordings.read(row) for row in range(2)]
    more = [np.concatenate([9.0 * values[:1], values]) for values in both]
    large = written(tmp_path / "large", [(f"00{i}", more[i], 2.0) for i in range(2)], atlas)
    for model in MODELS:
        _, expected, _ = embed(trained[model], small, pooling="mean")
        capsys.readouterr()
        _, vectors, _ = embed(trained[model], large, pooling="mean")
        np.testing.assert_allclose(vectors, expected, atol=1e-5)
        assert "1 of 17 parcels are not in the encoder's atlas" in capsys.readouterr().err


def test_recordings_come_at_the_encoders_tr_before_they_are_grouped(encoder, tmp_path):
    """Twice as many frames at half the TR, every other one the same, are the same recording."""
    rng, frames = np.random.default_rng(0), np.arange(N_TRS)
    slow = [bold(rng) for _ in range(3)]
    fast = []
    for values in slow:
        between = np.random.default_rng(1).normal(size=(N_PARCELS, N_TRS - 1))
        fast.append(np.insert(values, frames[1:], between, axis=1).astype(np.float32))
    assert fast[0].shape[1] == 2 * N_TRS - 1
    # Without scaling, whose mean would see the frames between.
    none = Standardiser(kind="none", n_parcels=N_PARCELS, cohort="x", n_people=1, n_recordings=1)
    encoder = conditioned(encoder, standardiser=none, tr_s=2.0, statistics=None)
    ids = ["a", "b", "c"]
    one = written(tmp_path / "one", [(ids[i], slow[i], 2.0) for i in range(3)])
    mixed = [("a", slow[0], 2.0), ("b", fast[1], 1.0), ("c", slow[2], 2.0)]
    _, expected, _ = embed(encoder, one, pooling="parcel-mean")
    batches = []
    prepare = embedding.FrozenEncoder.__call__

    def noted(self, x):
        batches.append(len(x))
        return prepare(self, x)

    with mock.patch.object(embedding.FrozenEncoder, "__call__", noted):
        _, vectors, _ = embed(encoder, written(tmp_path / "mixed", mixed), pooling="parcel-mean")
    np.testing.assert_allclose(vectors, expected, atol=1e-5)
    assert batches == [3]  # one length, whatever it was before


def test_a_tr_that_is_not_known_is_refused(encoder, tmp_path):
    unknown = written(tmp_path, [("a", bold(np.random.default_rng(0)), None)])
    with pytest.raises(UserError, match=r"a TR that is not known.*import it again with --tr-s"):
        embed(conditioned(encoder, tr_s=2.0), unknown, pooling="mean")


def test_recordings_that_are_too_short_are_counted_said_and_left_out(encoder, tmp_path, capsys):
    shortest = shortest_trs(encoder.module)
    assert shortest == {"brainlm": 16, "brainjepa": 16}[encoder.model]
    scanned = [(0, 64), (1, shortest - 1), (2, 70), (0, shortest - 2), (2, shortest)]
    cohort = tiny_cohort(tmp_path, n_people=3, scanned=scanned)
    subjects, vectors, provenance = embed(encoder, cohort, pooling="mean")
    assert subjects == ["000", "002"]
    np.testing.assert_allclose(vectors[0], encode(encoder, cohort, 0, "mean"), atol=1e-5)
    alone = np.mean([encode(encoder, cohort, row, "mean") for row in (2, 4)], axis=0)
    np.testing.assert_allclose(vectors[1], alone, atol=1e-5)
    assert (provenance["n_recordings"], provenance["n_recordings_too_short"]) == (3, 2)
    said = capsys.readouterr().err
    assert (
        f"2 of 5 recordings are shorter than the {shortest} TRs that this {encoder.model}" in said
    )
    assert f"the shortest has {shortest - 2})" in said
    assert "with them 1 people who have no other" in said


def test_no_recording_that_is_long_enough_is_an_error(encoder, tmp_path):
    cohort = tiny_cohort(tmp_path, n_people=2, scanned=[(0, 9), (1, 12)])
    with pytest.raises(UserError, match=r"all 2 recordings are shorter .*\(the longest has 12\)"):
        embed(encoder, cohort, pooling="mean")


def test_the_shortest_recording_is_what_encode_takes_and_no_shorter_one():
    torch.manual_seed(0)
    for config in (*ENCODERS.values(), IMAGE):
        name = "brainjepa" if config is ENCODERS["brainjepa"] else "brainlm"
        table = np.random.default_rng(0).normal(size=(N_PARCELS, 4))
        module: Any = build(name, config, gradient=table if name == "brainjepa" else None)
        where = (torch.from_numpy(XYZ_MM),) if name == "brainlm" else ()
        shortest = shortest_trs(module)
        with torch.no_grad():
            module.encode(torch.zeros(1, N_PARCELS, shortest), *where)
            with pytest.raises(UserError, match=f"the recording has {shortest - 1} TRs"):
                module.encode(torch.zeros(1, N_PARCELS, shortest - 1), *where)


def test_warnings_of_the_pre_flight_check_are_said_kept_and_with_strict_an_error(
    encoder, cohort, tmp_path, capsys
):
    """The cohort in another unit: the standardiser is replaced by one that lets it through."""
    none = Standardiser(kind="none", n_parcels=N_PARCELS, cohort="x", n_people=1, n_recordings=1)
    loud = conditioned(encoder, standardiser=none)
    _, _, provenance = embed(encoder, cohort, pooling="mean")
    usual = provenance["warnings"]
    times = [("a", 1000.0 * cohort.recordings.read(row), 2.0) for row in (0, 2, 3, 6)]
    far = written(tmp_path / "far", times)
    capsys.readouterr()
    _, _, provenance = embed(loud, far, pooling="mean")
    assert len(provenance["warnings"]) > len(usual)
    [unit] = [text for text in provenance["warnings"] if "standard deviation over time" in text]
    assert f"warning: {unit}" in capsys.readouterr().err
    out = tmp_path / "x.parquet"
    with pytest.raises(UserError, match=r"--strict makes them an error: ") as caught:
        embed_to_file(out, loud, far, EmbedSettings(pooling="mean", strict=True))
    assert "\n" not in str(caught.value)
    assert not out.exists()
    assert not parts_folder(out).exists()


@pytest.mark.parametrize(
    ("model", "pooling", "message"),
    [
        ("brainlm", "parcels", "pooling 'parcels' is unknown. Did you mean 'parcel-"),
        ("brainjepa", "cls", "this encoder has no CLS token"),
    ],
)
def test_a_pooling_that_an_encoder_has_not_is_refused(
    trained, cohort, tmp_path, model, pooling, message
):
    out = tmp_path / "x.parquet"
    with pytest.raises(UserError, match=message):
        embed_to_file(out, trained[model], cohort, EmbedSettings(pooling=pooling))
    assert list(tmp_path.iterdir()) == []


def test_each_encoder_offers_the_poolings_that_its_encode_takes():
    x = torch.randn(1, N_PARCELS, N_TRS)
    everything = ("mean", "cls", "parcel-mean", "parcel-std")
    for config in (*ENCODERS.values(), IMAGE):
        name = "brainjepa" if config is ENCODERS["brainjepa"] else "brainlm"
        table = np.random.default_rng(0).normal(size=(N_PARCELS, 4))
        module: Any = build(name, config, gradient=table if name == "brainjepa" else None)
        where = (torch.from_numpy(XYZ_MM),) if name == "brainlm" else ()
        with torch.no_grad():
            for pooling in everything:
                if pooling in poolings(module):
                    module.encode(x, *where, pooling=pooling)
                else:
                    with pytest.raises(UserError, match=f"pooling '{pooling}'"):
                        module.encode(x, *where, pooling=pooling)


@pytest.mark.parametrize(
    ("model", "preset", "changes", "expected"),
    [
        ("brainlm", "tiny", {}, "parcel-std"),
        ("brainjepa", "tiny", {}, "parcel-std"),
        ("brainlm", "tiny", {"n_trs": 64, "patch_trs": 64}, "mean"),
        ("brainlm", "5m", {}, "mean"),
        ("brainlm", "111m", {}, "mean"),
        ("brainjepa", "small", {}, "mean"),
    ],
)
def test_the_default_pooling_fits_the_encoders_size(model, preset, changes, expected):
    with torch.device("meta"):
        module = create(model, preset, **changes)
    assert default_pooling(mock.Mock(model=model, module=module)) == expected


def test_the_default_pooling_is_said(encoder, cohort, capsys):
    _, vectors, provenance = embed(encoder, cohort)
    assert provenance["pooling"] == "parcel-std"
    assert vectors.shape[1] == 16 * N_PARCELS
    assert "pooling: parcel-std, which fits an encoder of this size" in capsys.readouterr().err


def test_brainlm_uses_the_places_it_was_trained_with_where_a_cohort_has_none(trained, tmp_path):
    cohort = tiny_cohort(tmp_path, n_people=3)
    _, expected, _ = embed(trained["brainlm"], cohort, pooling="mean")
    Atlas(name="bare", parcels=ATLAS.parcels).save(cohort.path / "atlas.json")
    bare = Cohort.open(cohort.path)
    _, vectors, _ = embed(trained["brainlm"], bare, pooling="mean")
    np.testing.assert_array_equal(vectors, expected)
    nowhere = dataclasses.replace(trained["brainlm"], atlas=bare.atlas)
    with pytest.raises(UserError, match="'bare' has no coordinates, which BrainLM reads"):
        embed(nowhere, bare, pooling="mean")


def test_the_image_shaped_brainlm_sorts_its_rows_by_y_whatever_the_order_of_the_cohort(
    trained, tmp_path
):
    torch.manual_seed(0)
    module: Any = build("brainlm", IMAGE).eval()
    encoder = dataclasses.replace(trained["brainlm"], module=module)
    order = np.random.default_rng(1).permutation(N_PARCELS).tolist()
    straight = tiny_cohort(tmp_path / "a", n_people=3)
    shuffled = tiny_cohort(tmp_path / "b", n_people=3, order=order)
    _, expected, provenance = embed(encoder, straight)
    assert provenance["pooling"] == "mean"
    _, vectors, _ = embed(encoder, shuffled)
    np.testing.assert_allclose(vectors, expected, atol=1e-5)
    # Sorted by hand, without centroids.
    x = encoder.conditioning.prepare(straight.recordings.read(0), tr_s=2.0)
    by_y = torch.from_numpy(x[np.argsort(XYZ_MM[:, 1])][None])
    with torch.no_grad():
        np.testing.assert_allclose(expected[0], module.encode(by_y)[0].numpy(), atol=1e-5)
        assert (
            np.abs(expected[0] - module.encode(torch.from_numpy(x[None]))[0].numpy()).max() > 1e-3
        )


def test_bfloat16_is_near_float32_and_said_in_the_provenance(encoder, cohort):
    _, exact, provenance = embed(encoder, cohort, pooling="mean")
    assert provenance["precision"] == "float32"
    _, rough, provenance = embed(encoder, cohort, pooling="mean", precision="bfloat16")
    assert provenance["precision"] == "bfloat16"
    error = np.abs(rough - exact).max()
    assert 1e-6 < error < 0.05  # bfloat16 has 8 bits; features are layer-normed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size=0: expected 1 or more"),
        ({"precision": "bf16"}, "precision 'bf16' is unknown. Did you mean 'bfloat16'"),
    ],
)
def test_settings_that_cannot_be_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        EmbedSettings(**options)


def test_features_that_are_not_finite_are_refused(trained, cohort):
    spoilt = dataclasses.replace(
        trained["brainlm"], module=build("brainlm", ENCODERS["brainlm"]).eval()
    )
    with torch.no_grad():
        spoilt.module.norm.bias.fill_(torch.nan)  # type: ignore[union-attr]
    with pytest.raises(UserError, match=r"features of 1 recordings are not finite"):
        embed(spoilt, cohort, pooling="mean", batch_size=1)


def test_a_feature_file_says_where_it_came_from(encoder, cohort, tmp_path: Path):
    path = tmp_path / "x.parquet"
    embedded = embed_to_file(path, encoder, cohort, EmbedSettings(pooling="mean"))
    assert embedded is not None
    assert embedded.provenance == {
        "kind": "features",
        "encoder": encoder.model,
        "checkpoint_hash": encoder.hash,
        "cohort_hash": cohort.hash,
        "pooling": "mean",
        "precision": "float32",
        "window_trs": 64,
        "tr_s": 2.0,
        "standardiser": "recording-zscore",
        "fitted_on": encoder.conditioning.standardiser.fitted_on,
        "n_recordings": 7,
        "n_recordings_too_short": 0,
        "warnings": embedded.provenance["warnings"],
        "package_version": brainfusion.__version__,
    }
    found = read_features(path)
    assert list(found.subjects) == embedded.subjects
    np.testing.assert_array_equal(found.vectors, embedded.vectors)
    assert found.provenance == embedded.provenance
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.parquet"]
