"""The encoder in the graph makes the features that `embed` makes, and is saved as any other."""

import dataclasses

import numpy as np
import pytest
import torch

from brainfusion import encoders
from brainfusion.data.conditioning import InputConditioning
from brainfusion.data.standardise import Standardiser
from brainfusion.encoders.checkpoints import Pretrained, load_pretrained
from brainfusion.encoders.embed import EmbedSettings, embed
from brainfusion.encoders.trainable import RecordingTower, save_tuned
from brainfusion.runtime import config
from brainfusion.runtime.errors import UserError
from tests.encoders.tiny_cohort import ENCODERS, N_PARCELS, N_TRS, tiny_cohort

SCANNED = [(0, 64), (0, 96), (1, 64), (2, 150), (3, 64), (3, 64), (3, 200), (4, 80)]
"""(person, TRs): several recordings, shorter and longer than a window and no multiple of it."""


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    return tiny_cohort(tmp_path_factory.mktemp("tower") / "c", n_people=6, scanned=SCANNED)


def pretrained(model: str, cohort, tmp_path) -> Pretrained:
    torch.manual_seed(0)
    gradient = (
        np.random.default_rng(0).normal(size=(N_PARCELS, 4)) if model == "brainjepa" else None
    )
    module = encoders.build(model, ENCODERS[model], gradient=gradient).eval()
    rows = range(len(cohort.recordings))
    conditioning = InputConditioning(
        standardiser=Standardiser.fit("recording-zscore", cohort.recordings, rows, cohort="tiny"),
        tr_s=2.0, resampling="linear", statistics=None,
    )  # fmt: skip
    state = {
        "model": model,
        "config_class": type(module.config).__name__,
        "config": {"encoder": config.to_dict(module.config)},
        "conditioning": conditioning.to_dict(),
        "atlas": cohort.atlas.to_dict(),
    }
    return Pretrained(
        model=model, module=module, conditioning=conditioning, atlas=cohort.atlas, state=state,
        path=tmp_path, hash="0",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("model", "pooling"),
    [("brainjepa", "parcel-std"), ("brainjepa", "mean"), ("brainlm", "cls"), ("brainlm", "mean")],
)
def test_features_in_the_graph_are_those_of_embed(cohort, tmp_path, model, pooling):
    source = pretrained(model, cohort, tmp_path)
    expected = embed(source, cohort, EmbedSettings(pooling=pooling))
    assert expected is not None
    people = [3, 0, 2, 1, 4]
    tower = RecordingTower(source, cohort, [expected.subjects[i] for i in people], pooling=pooling)
    tower.module.requires_grad_(True)
    features = tower.features(tower.load(np.arange(5), None))
    assert features.requires_grad
    # embed averages a person's recordings in float64.
    torch.testing.assert_close(
        features.detach(), torch.from_numpy(expected.vectors[people]), rtol=1e-5, atol=1e-5
    )
    some = tower.features(tower.load(np.array([4, 1]), 3))  # no windows: the same in training
    torch.testing.assert_close(some, features[[4, 1]], rtol=1e-5, atol=1e-5)


def test_windows_are_functions_of_seed_step_and_person(cohort, tmp_path):
    source = pretrained("brainlm", cohort, tmp_path)
    subjects = cohort.subjects["subject"].to_list()[:5]

    def drawn(people: list[int], step: int | None, seed: int = 0) -> dict[int, np.ndarray]:
        tower = RecordingTower(source, cohort, subjects, pooling="mean", windows=2, seed=seed)
        loaded = tower.load(np.array(people), step)
        found: dict[int, list[np.ndarray]] = {}
        for bold, owner in zip(loaded.bold, loaded.owner, strict=True):
            for row, place in zip(bold.numpy(), owner.tolist(), strict=True):
                found.setdefault(people[place], []).append(row)
        return {person: np.stack(rows) for person, rows in found.items()}

    alone, together = drawn([3], 7), drawn([0, 3, 2], 7)
    assert alone[3].shape == (2, N_PARCELS, N_TRS)
    np.testing.assert_array_equal(alone[3], together[3])
    assert not np.array_equal(alone[3], drawn([3], 8)[3])
    assert not np.array_equal(alone[3], drawn([3], 7, seed=1)[3])
    # Every window is a piece of one of the person's conditioned recordings.
    tower = RecordingTower(source, cohort, subjects, pooling="mean")
    whole = tower.load(np.array([3]), None)
    pieces = {
        bold[:, i : i + N_TRS].tobytes()
        for group in whole.bold
        for bold in group.numpy()
        for i in range(bold.shape[1] - N_TRS + 1)
    }
    for step in range(10):
        for window in drawn([3], step)[3]:
            assert window.tobytes() in pieces


@pytest.mark.parametrize("model", ["brainjepa", "brainlm"])
def test_a_tuned_encoder_is_a_checkpoint_like_any_other(cohort, tmp_path, model):
    source = pretrained(model, cohort, tmp_path)
    tower = RecordingTower(source, cohort, cohort.subjects["subject"].to_list()[:5], pooling="mean")
    before = {key: value.clone() for key, value in source.module.state_dict().items()}
    with torch.no_grad():
        getattr(tower.module, tower.blocks)[0].norm1.weight.mul_(1.5)
    save_tuned(tmp_path / "encoder", source, {"how": "test"})
    opened = load_pretrained(tmp_path / "encoder", model)
    assert opened.state["finetuned"] == {"from": "0", "how": "test"}
    assert opened.atlas.parcels == cohort.atlas.parcels
    state = opened.module.state_dict()
    moved = {key for key in before if not torch.equal(state[key], before[key])}
    prefix = "target_encoder." if model == "brainjepa" else ""
    assert moved == {f"{prefix}{tower.blocks}.0.norm1.weight"}
    expected = embed(dataclasses.replace(source), cohort, EmbedSettings(pooling="mean"))
    found = embed(opened, cohort, EmbedSettings(pooling="mean"))
    assert expected is not None
    assert found is not None
    np.testing.assert_array_equal(found.vectors, expected.vectors)
    # Its random start can be drawn again, as that of a pretraining run.
    load_pretrained(tmp_path / "encoder", model, untrained=True)


def test_somebody_without_a_long_enough_recording_is_counted(cohort, tmp_path):
    source = pretrained("brainlm", cohort, tmp_path)
    subjects = cohort.subjects["subject"].to_list()  # the sixth has no recording
    with pytest.raises(UserError, match="1 of 6 people have no recording of at least 16 TRs"):
        RecordingTower(source, cohort, subjects, pooling="mean")


def test_a_pooling_that_the_encoder_lacks_is_refused(cohort, tmp_path):
    source = pretrained("brainjepa", cohort, tmp_path)
    with pytest.raises(UserError, match="has no CLS token"):
        RecordingTower(source, cohort, ["000"], pooling="cls")
