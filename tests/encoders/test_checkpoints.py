"""Encoders for a cohort, and checkpoints that are complete and loaded strictly."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from brainfusion.data.atlas import Atlas
from brainfusion.data.cohort import Cohort
from brainfusion.encoders import ENCODERS as SPECS
from brainfusion.encoders.brainlm_image import BrainLMImage
from brainfusion.encoders.checkpoints import (
    build,
    describe_training_data,
    known_model,
    load_pretrained,
)
from brainfusion.encoders.pretrain import pretrain
from brainfusion.encoders.pretrain_config import DataConfig
from brainfusion.runtime import checkpoint
from brainfusion.runtime.distributed import Ranks
from brainfusion.runtime.errors import CheckpointError, UserError
from brainfusion.runtime.files import hash_file
from tests.encoders.tiny_cohort import ATLAS, ENCODERS, IMAGE, N_PARCELS, settings, tiny_cohort

MODELS = ("brainlm", "brainjepa")
PUBLISHED = [
    (model, preset) for model in MODELS for preset in SPECS[model].presets if preset != "tiny"
]


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Cohort:
    return tiny_cohort(tmp_path_factory.mktemp("cohort"))


@pytest.fixture(scope="module")
def runs(cohort, tmp_path_factory) -> Path:
    """A folder with a run of each model, named after it."""
    folder = tmp_path_factory.mktemp("runs")
    for model in MODELS:
        pretrain(settings(model, steps=2), cohort, folder / model, ranks=Ranks())
    return folder


@pytest.fixture
def copied(runs, tmp_path) -> Path:
    """A checkpoint of BrainLM that a test may spoil."""
    return shutil.copytree(checkpoint.newest(runs / "brainlm"), tmp_path / "step-0000002")


def refused(path: Path, model: str | None = None) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_pretrained(path, model)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("model", MODELS)
def test_a_run_and_its_newest_checkpoint_load_the_same_complete_encoder(runs, cohort, model):
    folder = checkpoint.newest(runs / model)
    for path in (runs / model, folder):
        loaded = load_pretrained(path, model)
        assert (loaded.model, loaded.path) == (model, folder)
        assert loaded.module.config == ENCODERS[model]
        assert not loaded.module.training
        assert loaded.hash == hash_file(folder / "model.safetensors")
        assert loaded.atlas.to_dict() == cohort.atlas.to_dict()
        assert loaded.conditioning.standardiser.kind == "recording-zscore"
        fitted_on = loaded.conditioning.standardiser.fitted_on
        assert fitted_on == f"{loaded.state['n_people']} people of cohort tiny"
        stored = load_file(folder / "model.safetensors")
        assert loaded.module.state_dict().keys() == stored.keys()
        for key, value in loaded.module.state_dict().items():
            assert torch.equal(value, stored[key]), key


@pytest.mark.parametrize("model", MODELS)
def test_the_untrained_encoder_is_the_one_that_training_started_from(runs, cohort, model):
    loaded = load_pretrained(runs / model, model, untrained=True)
    torch.manual_seed(0)
    rows = list(range(len(cohort.recordings)))
    fresh = build(model, ENCODERS[model], cohort, rows).state_dict()
    trained = load_pretrained(runs / model).module.state_dict()
    moved = 0
    for key, value in loaded.module.state_dict().items():
        if key.endswith("position.gradient"):  # made from the training people alone
            assert torch.equal(value, trained[key])
        else:
            assert torch.equal(value, fresh[key]), key
            moved += not torch.equal(value, trained[key])
    assert moved > 20
    assert loaded.hash == "untrained"


def test_an_untrained_encoder_is_not_fed_what_was_enlarged_for_training(cohort, tmp_path, capsys):
    """Its statistics follow, so that the check before embedding finds nothing unusual."""
    options = settings("brainjepa", steps=1)
    enlarged = dataclasses.replace(options, data=DataConfig(divide_by=0.1))
    pretrain(enlarged, cohort, tmp_path, ranks=Ranks())
    trained, blank = (load_pretrained(tmp_path, untrained=untrained) for untrained in (False, True))
    assert "divided by 1, not by 0.1 as in training" in capsys.readouterr().err
    rows = list(range(len(cohort.recordings)))
    for loaded, divide_by in ((trained, 0.1), (blank, 1.0)):
        assert loaded.conditioning.standardiser.divide_by == divide_by
        seen = loaded.conditioning.measure(cohort.recordings, rows)
        kept = loaded.conditioning.statistics
        assert kept is not None
        assert seen.mean["log_sd"] == pytest.approx(kept.mean["log_sd"], abs=0.05)
        bold = loaded.conditioning.prepare(cohort.recordings.read(0), tr_s=2.0)
        assert bold.std() == pytest.approx(1 / divide_by, rel=1e-3)


def test_the_image_family_is_loaded_as_what_it_is(cohort, tmp_path):
    pretrain(settings("brainlm", encoder=IMAGE, steps=1), cohort, tmp_path, ranks=Ranks())
    loaded = load_pretrained(tmp_path, "brainlm")
    assert isinstance(loaded.module, BrainLMImage)
    assert loaded.module.config == IMAGE


def test_positions_by_index_load_trained_and_untrained(cohort, tmp_path):
    encoder = dataclasses.replace(ENCODERS["brainjepa"], positions="origin")
    pretrain(settings("brainjepa", encoder=encoder, steps=1), cohort, tmp_path, ranks=Ranks())
    for untrained in (False, True):
        loaded = load_pretrained(tmp_path, "brainjepa", untrained=untrained)
        assert loaded.module.config == encoder


def test_a_checkpoint_of_the_other_encoder_is_refused(runs):
    message = refused(runs / "brainlm", "brainjepa")
    assert "holds a brainlm encoder, expected brainjepa" in message
    assert "--model brainlm" in message


def test_a_folder_without_a_checkpoint_is_refused(tmp_path):
    assert "does not exist" in refused(tmp_path / "nowhere")
    assert "holds no checkpoint" in refused(tmp_path)


@pytest.mark.parametrize("file", ["model.safetensors", "state.json"])
def test_a_truncated_checkpoint_is_refused(copied, file):
    whole = (copied / file).read_bytes()
    (copied / file).write_bytes(whole[: len(whole) // 2])
    assert file in refused(copied)


def test_weights_that_do_not_fit_the_architecture_are_refused(copied):
    path = copied / "model.safetensors"
    weights = load_file(path)
    weights["surplus"] = weights.pop("cls_token")
    weights["mask"] = torch.zeros(1)
    weights["norm.weight"] = torch.zeros(3)
    save_file(weights, path)
    message = refused(copied)
    assert "1 keys missing ['cls_token'], 2 unknown ['mask', 'surplus']" in message
    assert "1 of another shape ['norm.weight']" in message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "brainbert"}, "holds a 'brainbert' encoder, which this version does not know"),
        ({"config_class": "BrainLM2Config"}, "was written for BrainLM2Config, this version knows"),
        ({"format": 2}, "has format 2, this version reads 1"),
        ({"model": None, "config": None}, "no checkpoint of an encoder.*lacks config, model"),
    ],
)
def test_a_state_that_this_version_cannot_read_is_refused(copied, changes, message):
    state = json.loads((copied / "state.json").read_text()) | changes
    state = {key: value for key, value in state.items() if value is not None}
    (copied / "state.json").write_text(json.dumps(state))
    with pytest.raises(CheckpointError, match=message):
        load_pretrained(copied)


def test_an_encoder_config_with_a_typo_is_refused(copied):
    state = json.loads((copied / "state.json").read_text())
    state["config"]["encoder"]["widht"] = state["config"]["encoder"].pop("width")
    (copied / "state.json").write_text(json.dumps(state))
    with pytest.raises(UserError, match=r"unknown key 'widht'.*Did you mean 'width'"):
        load_pretrained(copied)


@pytest.mark.parametrize(("model", "preset"), PUBLISHED)
def test_a_published_size_is_refused_for_another_atlas(cohort, model, preset):
    published = SPECS[model].presets[preset]
    message = f"has 16 parcels but the encoder '{model}' expects {published.n_parcels}.*--preset"
    with pytest.raises(UserError, match=message):
        build(model, published, cohort, [0])


def test_brainjepa_takes_the_atlas_gradient_and_otherwise_makes_one(tmp_path, capsys):
    cohort = tiny_cohort(tmp_path / "cohort")
    encoder = ENCODERS["brainjepa"]
    made = build("brainjepa", encoder, cohort, [0, 1]).get_buffer("encoder.position.gradient")
    assert "has no gradient coordinates: they are made from" in capsys.readouterr().err
    assert made.shape == (N_PARCELS, 4)
    assert made.isfinite().all()
    gradient = torch.randn(N_PARCELS, 4, generator=torch.Generator().manual_seed(0)).numpy()
    atlas = Atlas(name="graded", parcels=ATLAS.parcels, xyz_mm=ATLAS.xyz_mm, gradient=gradient)
    atlas.save(cohort.path / "atlas.json")
    graded = build("brainjepa", encoder, Cohort.open(cohort.path), [0, 1])
    for part in ("encoder", "predictor", "target_encoder"):
        table = graded.get_buffer(f"{part}.position.gradient")
        assert torch.equal(table, torch.from_numpy(gradient))


def test_training_data_is_described_without_anyones_id(cohort):
    facts = describe_training_data(cohort, [0, 3, 5])
    assert (facts["n_people"], facts["n_recordings"], facts["tr_s"]) == (3, 3, 2.0)
    assert (facts["cohort"], facts["cohort_hash"]) == ("tiny", cohort.hash)
    assert not set(cohort.subjects["subject"]) & set(json.dumps(facts).split('"'))


def test_an_unknown_model_names_the_nearest():
    assert known_model("brainlm") == "brainlm"
    with pytest.raises(UserError, match="Did you mean 'brainjepa'"):
        known_model("brain-jepa")
