"""Features of a cohort: the same on every call, for any batch size and any order of parcels."""

from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

import brainfusion
from brainfusion.data.atlas import Atlas
from brainfusion.data.cohort import Cohort, write_cohort_tables
from brainfusion.data.features import read_features, write_features
from brainfusion.data.recordings import RecordingWriter
from brainfusion.encoders.checkpoints import Pretrained, load_pretrained
from brainfusion.encoders.embed import embed
from brainfusion.encoders.pretrain import pretrain
from brainfusion.runtime.distributed import Ranks
from brainfusion.runtime.errors import UserError
from tests.encoders.tiny_cohort import ATLAS, N_PARCELS, XYZ_MM, settings, tiny_cohort

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


def encode(encoder: Pretrained, cohort: Cohort, row: int, pooling: str) -> np.ndarray:
    """One recording alone, without any of embed's code."""
    x = encoder.standardiser.transform(cohort.recordings.read(row)[None])
    where = (torch.from_numpy(XYZ_MM),) if encoder.model == "brainlm" else ()
    with torch.no_grad():
        return encoder.module.encode(torch.from_numpy(x), *where, pooling=pooling)[0].numpy()


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
    large = tmp_path / "large"
    xyz = np.concatenate([[[0.0, 0.0, 0.0]], XYZ_MM])
    atlas = Atlas(name="seventeen", parcels=("extra", *ATLAS.parcels), xyz_mm=xyz)
    people = pl.DataFrame({"subject": ["000", "001"]})
    write_cohort_tables(large, name="large", origin="imported", subjects=people, atlas=atlas)
    with RecordingWriter(large / "recordings", n_parcels=17) as writer:
        for row in range(2):
            values = small.recordings.read(row)
            values = np.concatenate([9.0 * values[:1], values])
            writer.add(values, recording=f"r{row}", subject=f"00{row}", tr_s=2.0)
    for model in MODELS:
        _, expected, _ = embed(trained[model], small, pooling="mean")
        capsys.readouterr()
        _, vectors, _ = embed(trained[model], Cohort.open(large), pooling="mean")
        np.testing.assert_allclose(vectors, expected, atol=1e-5)
        assert "1 of 17 parcels are not in the encoder's atlas" in capsys.readouterr().err


def test_another_tr_warns_with_both_numbers(encoder, tmp_path, capsys):
    for tr_s, warned in ((0.72, True), (2.06, False), (2.2, True)):
        cohort = tiny_cohort(tmp_path / str(tr_s), n_people=2, tr_s=tr_s)
        embed(encoder, cohort, pooling="mean")
        message = f"warning: the encoder was trained at TR 2 s, this cohort has {tr_s:g} s"
        assert (message in capsys.readouterr().err) is warned


def test_short_recordings_are_an_error_or_filled_up_as_the_encoder_says(trained, tmp_path):
    cohort = tiny_cohort(tmp_path, n_people=2, scanned=[(0, 64), (1, 40)])
    with pytest.raises(UserError, match="the recording has 40 TRs but a window"):
        embed(trained["brainjepa"], cohort, pooling="mean")
    subjects, vectors, _ = embed(trained["brainlm"], cohort, pooling="mean")
    assert len(subjects) == 2
    assert np.isfinite(vectors).all()


@pytest.mark.parametrize(
    ("model", "pooling", "message"),
    [
        ("brainlm", "parcels", "pooling 'parcels' is unknown. Did you mean 'parcel-"),
        ("brainjepa", "cls", "this encoder has no CLS token"),
    ],
)
def test_a_pooling_that_an_encoder_has_not_is_refused(trained, cohort, model, pooling, message):
    with pytest.raises(UserError, match=message):
        embed(trained[model], cohort, pooling=pooling)


def test_brainlm_uses_the_places_it_was_trained_with_where_a_cohort_has_none(trained, tmp_path):
    cohort = tiny_cohort(tmp_path, n_people=3)
    _, expected, _ = embed(trained["brainlm"], cohort, pooling="mean")
    Atlas(name="bare", parcels=ATLAS.parcels).save(cohort.path / "atlas.json")
    _, vectors, _ = embed(trained["brainlm"], Cohort.open(cohort.path), pooling="mean")
    np.testing.assert_array_equal(vectors, expected)


def test_a_feature_file_says_where_it_came_from(encoder, cohort, tmp_path: Path):
    subjects, vectors, provenance = embed(encoder, cohort, pooling="mean")
    assert provenance == {
        "kind": "features",
        "encoder": encoder.model,
        "checkpoint_hash": encoder.hash,
        "cohort_hash": cohort.hash,
        "pooling": "mean",
        "window_trs": 64,
        "standardiser": encoder.standardiser.fitted_on,
        "n_recordings": 7,
        "package_version": brainfusion.__version__,
    }
    path = tmp_path / "x.parquet"
    write_features(path, subjects, vectors, provenance=provenance)
    found = read_features(path)
    assert list(found.subjects) == subjects
    np.testing.assert_array_equal(found.vectors, vectors)
    assert found.provenance == provenance
