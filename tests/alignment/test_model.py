"""A trained alignment as a folder: heads, kinds of models, and the format before them."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from brainfusion.alignment import Alignment, load, train
from brainfusion.alignment.density_ratio import DensityRatio
from brainfusion.runtime.errors import CheckpointError, UserError
from tests.alignment.test_train import TINY, cohort
from tests.alignment.test_train_modalities import views


@pytest.fixture(scope="module")
def scored(tmp_path_factory) -> tuple[Alignment, dict[str, np.ndarray], Path]:
    """An alignment with a head, its features, its folder."""
    features, labels = cohort()
    folder = tmp_path_factory.mktemp("scored")
    alignment = train(features, labels, config=TINY, run_dir=folder / "run").alignment
    split = np.asarray(labels)
    parts = (
        {name: alignment.embed(name, x[split == part]) for name, x in features.items()}
        for part in ("train", "validation")
    )
    alignment = dataclasses.replace(alignment, head=DensityRatio.fit(*parts))
    alignment.save(folder / "model")
    return alignment, features, folder / "model"


def test_a_head_is_saved_and_gives_the_same_scores(scored):
    alignment, features, folder = scored
    opened = load(folder)
    u, v = (opened.score_vectors(name, features[name]) for name in ("brain", "dna"))
    assert u.dtype == np.float32
    np.testing.assert_array_equal(u, alignment.score_vectors("brain", features["brain"]))
    assert alignment.head is not None
    embedded = (alignment.embed(name, features[name]) for name in ("brain", "dna"))
    np.testing.assert_allclose(u @ v.T, alignment.head.scores(*embedded), atol=1e-4)


def test_a_side_of_several_modalities_has_score_vectors_of_its_mean(tmp_path):
    features, present, labels = views()
    alignment = train(features, labels, config=TINY, run_dir=tmp_path, present=present).alignment
    all_three = np.logical_and.reduce(list(present.values()))
    rows = {name: x[all_three] for name, x in features.items()}
    brain = {"jepa": rows["brain_jepa"], "lm": rows["brain_lm"]}
    both = {"brain": alignment.embed_brain(brain), "dna": alignment.embed_dna(rows["dna"])}
    head = DensityRatio.fit(both, both)
    alignment = dataclasses.replace(alignment, head=head)
    found = alignment.score_vectors("brain", brain)
    np.testing.assert_array_equal(found, head.vectors("brain", both["brain"]))
    one = alignment.score_vectors("brain_lm", brain["lm"])
    want = head.vectors("brain", alignment.embed("brain_lm", brain["lm"]))
    np.testing.assert_array_equal(one, want)


def test_score_vectors_without_a_head_are_refused(scored):
    alignment, features, _ = scored
    plain = dataclasses.replace(alignment, head=None)
    with pytest.raises(UserError, match="Align with score 'density-ratio', or use embed"):
        plain.score_vectors("brain", features["brain"])


def copied(folder: Path, target: Path, **changes: object) -> Path:
    """The folder again, with another state.json; None takes a key out."""
    target.mkdir()
    for path in folder.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    state = json.loads((folder / "state.json").read_text())
    state = {key: value for key, value in (state | changes).items() if value is not None}
    (target / "state.json").write_text(json.dumps(state))
    return target


def test_a_folder_of_the_first_format_still_opens(scored, tmp_path):
    alignment, features, folder = scored
    assert json.loads((folder / "state.json").read_text())["format"] == 2
    before = copied(folder, tmp_path / "old", format=1, head=None)
    (before / "head.safetensors").unlink()
    opened = load(before)
    assert opened.head is None
    for name, x in features.items():
        np.testing.assert_array_equal(opened.embed(name, x), alignment.embed(name, x))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 3}, "has format 3, this version reads 1 to 2"),
        ({"model": {"kind": "tree"}}, "of the kind 'tree', which this version does not know"),
    ],
)
def test_what_a_later_version_wrote_is_refused(scored, tmp_path, changes, message):
    with pytest.raises(CheckpointError, match=message):
        load(copied(scored[2], tmp_path / "other", **changes))


def test_a_head_whose_file_is_gone_is_refused(scored, tmp_path):
    folder = copied(scored[2], tmp_path / "other")
    (folder / "head.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"head\.safetensors is missing or cut off"):
        load(folder)
