"""A run that was stopped goes on from its parts, and mixes them with nothing else."""

import dataclasses
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

from brainfusion.data.cohort import Cohort
from brainfusion.data.features import read_features
from brainfusion.encoders import embed as embedding
from brainfusion.encoders.checkpoints import Pretrained
from brainfusion.encoders.embed import EmbedSettings, embed_to_file, parts_folder
from brainfusion.encoders.parts import Parts
from brainfusion.runtime.errors import UserError
from tests.encoders.own_cohort import fresh
from tests.encoders.tiny_cohort import tiny_cohort

MODELS = ("brainlm", "brainjepa")
SCANNED = [(0, 64), (1, 64), (2, 150), (3, 64), (1, 80), (0, 64), (5, 64)]


@pytest.fixture(params=MODELS)
def encoder(request) -> Pretrained:
    return fresh(request.param)


@pytest.fixture(scope="module")
def cohort(tmp_path_factory) -> Cohort:
    folder = tmp_path_factory.mktemp("new")
    return tiny_cohort(folder, n_people=6, scanned=SCANNED, missing=0.1)


def features(encoder: Pretrained, cohort: Cohort) -> np.ndarray:
    """In one go."""
    embedded = embedding.embed(encoder, cohort, EmbedSettings(pooling="mean"))
    assert embedded is not None
    return embedded.vectors


def interrupt(
    encoder: Pretrained, cohort: Cohort, out: Path, *, after: int, **options: Any
) -> None:
    """Stop an embedding, one recording a batch and a part a batch, after some batches."""
    count, real = 0, embedding.FrozenEncoder.__call__

    def stops(self, x):
        nonlocal count
        count += 1
        if count > after:
            raise KeyboardInterrupt
        return real(self, x)

    options = {"pooling": "mean", "batch_size": 1, **options}
    with (
        mock.patch.object(embedding.FrozenEncoder, "__call__", stops),
        pytest.raises(KeyboardInterrupt),
    ):
        embedding.embed(
            encoder,
            cohort,
            EmbedSettings(**options),
            parts=parts_folder(out),
            save_every_s=0.0,
        )


def recordings_encoded(encoder: Pretrained, cohort: Cohort, out: Path, **options: Any) -> int:
    """Finish an embedding; returns how many recordings that took."""
    count, real = 0, embedding.FrozenEncoder.__call__

    def counts(self, x):
        nonlocal count
        count += len(x)
        return real(self, x)

    with mock.patch.object(embedding.FrozenEncoder, "__call__", counts):
        embed_to_file(out, encoder, cohort, EmbedSettings(**{"pooling": "mean", **options}))
    return count


def test_an_interrupted_run_goes_on_and_ends_with_the_same_features(
    encoder, cohort, tmp_path, capsys
):
    out = tmp_path / "x.parquet"
    expected = features(encoder, cohort)
    interrupt(encoder, cohort, out, after=3)
    assert not out.exists()
    interrupt(encoder, cohort, out, after=2)
    capsys.readouterr()
    assert recordings_encoded(encoder, cohort, out, batch_size=4) == 2
    assert "5 recordings were embedded before: going on from there" in capsys.readouterr().err
    found = read_features(out)
    np.testing.assert_allclose(found.vectors, expected, atol=1e-5)
    assert found.provenance["n_recordings"] == 7
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.parquet"]


def test_a_run_that_was_killed_before_it_wrote_the_file_encodes_nothing_again(
    encoder, cohort, tmp_path
):
    out = tmp_path / "x.parquet"
    with (
        mock.patch.object(embedding, "write_features", side_effect=KeyboardInterrupt),
        pytest.raises(KeyboardInterrupt),
    ):
        embed_to_file(out, encoder, cohort, EmbedSettings(pooling="mean"))
    assert recordings_encoded(encoder, cohort, out) == 0
    expected = features(encoder, cohort)
    np.testing.assert_array_equal(read_features(out).vectors, expected)


def test_parts_of_another_run_are_refused_and_what_differs_is_named(encoder, cohort, tmp_path):
    out = tmp_path / "x.parquet"
    interrupt(encoder, cohort, out, after=2)
    other = fresh({"brainlm": "brainjepa", "brainjepa": "brainlm"}[encoder.model])
    moved = tiny_cohort(tmp_path / "moved", n_people=6, scanned=SCANNED)
    scaled = dataclasses.replace(encoder.conditioning.standardiser, divide_by=2.0)
    other_scale = dataclasses.replace(encoder.conditioning, standardiser=scaled)
    for another, people, options, named in (
        (encoder, cohort, {"pooling": "parcel-mean"}, r"\(pooling mean -> parcel-mean\)"),
        (encoder, cohort, {"precision": "bfloat16"}, r"\(precision float32 -> bfloat16\)"),
        (encoder, moved, {}, r"\(cohort \w+ -> \w+\)"),
        (
            dataclasses.replace(encoder, conditioning=other_scale),
            cohort,
            {},
            r"\(conditioning \w+ -> \w+\)",
        ),
        (other, cohort, {}, r"\(encoder \w+ -> \w+, weights \w+ -> "),
    ):
        with pytest.raises(UserError, match=named) as caught:
            recordings_encoded(another, people, out, **options)
        assert "holds parts of another run" in str(caught.value)
        assert "--restart to forget it" in str(caught.value)
    assert recordings_encoded(encoder, cohort, out) == 5


def test_parts_of_other_random_weights_are_refused(encoder, cohort, tmp_path):
    """Both say hash 'untrained': the weights themselves tell them apart."""
    out = tmp_path / "x.parquet"
    interrupt(encoder, cohort, out, after=2)
    other = fresh(encoder.model, seed=1)
    assert other.hash == encoder.hash
    with pytest.raises(UserError, match=r"\(weights \w+ -> \w+\)"):
        recordings_encoded(other, cohort, out)


def test_a_broken_part_is_said_and_its_recordings_are_encoded_again(
    encoder, cohort, tmp_path, capsys
):
    out = tmp_path / "x.parquet"
    interrupt(encoder, cohort, out, after=3)
    part = sorted(parts_folder(out).glob("part-*.npy"))[1]
    part.write_bytes(part.read_bytes()[:-7])
    (parts_folder(out) / ".part-left-over.npy").write_bytes(b"half")
    assert recordings_encoded(encoder, cohort, out) == 5
    assert f"{part} is broken: its recordings are encoded again" in capsys.readouterr().err
    expected = features(encoder, cohort)
    np.testing.assert_allclose(read_features(out).vectors, expected, atol=1e-5)


def test_a_folder_of_other_things_is_neither_used_nor_removed(encoder, cohort, tmp_path):
    out = tmp_path / "x.parquet"
    parts_folder(out).mkdir()
    (parts_folder(out) / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="is not a folder of partial features"):
        recordings_encoded(encoder, cohort, out)
    assert (parts_folder(out) / "thesis.txt").read_text() == "mine"


def test_parts_that_vanish_are_an_error_and_not_a_smaller_cohort(encoder, cohort, tmp_path):
    out = tmp_path / "x.parquet"
    means = Parts.means

    def another_process_removes_one(self, groups):
        next(self.folder.glob("part-*.npy")).unlink()
        return means(self, groups)

    with (
        mock.patch.object(Parts, "means", another_process_removes_one),
        pytest.raises(UserError, match="lacks the vectors of 7 recordings"),
    ):
        recordings_encoded(encoder, cohort, out)


def test_parts_average_in_float64_in_the_rows_order_whatever_part_they_are_in(tmp_path):
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(9, 4)).astype(np.float32) * 10.0 ** rng.integers(-6, 7, (9, 1))
    vectors = vectors.astype(np.float32)
    groups = [np.array([2, 0, 8]), np.array([5]), np.array([7, 1, 3, 4, 6])]
    expected = np.stack(
        [np.stack(vectors[np.sort(g)].astype(np.float64)).mean(0) for g in groups]
    ).astype(np.float32)
    for name, order in (("a", np.arange(9)), ("b", rng.permutation(9))):
        work = Parts(tmp_path / name, save_every_s=0.0)
        work.begin({})
        for rows in np.array_split(order, 4):
            work.add(rows, vectors[rows])
        work.flush()
        np.testing.assert_array_equal(work.done(), np.arange(9))
        np.testing.assert_allclose(work.means(groups), expected, rtol=1e-7)
