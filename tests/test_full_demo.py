"""The demo at its full size: what it must find, and what it must not."""

import subprocess
import sys
from pathlib import Path

import pytest

from brainfusion.runtime.files import read_json

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.slow


def demo(*flags: str) -> str:
    """Run the demo in the checkout, where finished stages are kept; returns what it printed."""
    command = [sys.executable, "-m", "brainfusion.cli", "demo", *flags]
    done = subprocess.run(command, cwd=ROOT, check=True, text=True, stdout=subprocess.PIPE)
    return done.stdout


@pytest.fixture(scope="module")
def found() -> dict:
    demo()
    return read_json(ROOT / "runs/demo/results.json")


@pytest.fixture(scope="module")
def nothing() -> dict:
    demo("--preset", "null")
    return read_json(ROOT / "runs/demo-null/results.json")


@pytest.mark.parametrize("direction", ["brain_to_dna", "dna_to_brain"])
def test_the_demo_finds_the_planted_link_and_stays_below_the_oracle(found, direction):
    row = found["retrieval"][direction]
    assert row["auc"] > 0.65
    assert row["ci_low"] > 0.5
    assert row["p_value"] < 0.01
    assert row["auc"] < row["attainable"]
    assert (row["chance"], row["n_gallery"]) == (0.5, 200)


def test_the_demo_stands_beside_its_baselines(found):
    names = [row["name"] for row in found["retrieval"]["baselines"]]
    for expected in ("encoder features", "untrained encoder", "connectome (Pearson FC, PCA)"):
        assert f"ridge-CCA, {expected}" in names
    assert "covariates only" in names
    for row in found["retrieval"]["baselines"]:
        assert row["auc"] < found["retrieval"]["brain_to_dna"]["attainable"]


@pytest.mark.parametrize("results", ["found", "nothing"])
def test_shuffled_pairs_are_at_chance(results, request):
    control = request.getfixturevalue(results)["retrieval"]["shuffled_control"]
    assert abs(control["auc"] - 0.5) < 3 * control["standard_error"]


def test_brainlm_rebuilds_hidden_patches(found):
    # Other parcels at the same time explain 0.53 of a parcel's variance; the mean explains 0.
    assert 0.2 < found["pretraining"]["brainlm"]["last"]["masked_r2"] < 0.6


def test_probes_find_cognition_in_the_connectome_and_nothing_in_confounds(found):
    rows = {(row["target"], row["features"]): row for row in found["probes"]}
    assert rows["cognition", "connectome | confounds"]["p_value"] < 0.01
    assert rows["cognition", "connectome | confounds"]["ci_low"] > 0
    assert rows["cognition", "confounds only"]["p_value"] > 0.01


def test_without_a_link_nothing_is_found(nothing):
    for direction in ("brain_to_dna", "dna_to_brain"):
        row = nothing["retrieval"][direction]
        assert row["attainable"] == 0.5
        assert row["p_value"] > 0.01
        assert abs(row["auc"] - 0.5) < 3 * row["standard_error"]


def test_a_finished_demo_does_nothing_again():
    demo()
    lines = demo().splitlines()
    stages = [line for line in lines if line.endswith("done before")]
    assert len(stages) == len(read_json(ROOT / "runs/demo/stages.json")["stages"])
