"""The traps end to end: with the controls nothing is found, and without them the verdict warns."""

from pathlib import Path

import numpy as np
import polars as pl
import pytest

from brainfusion.cli import main
from brainfusion.data.cohort import Cohort
from brainfusion.data.features import write_features
from brainfusion.eval.baselines import connectome
from brainfusion.eval.report.verdict import verdict
from brainfusion.runtime.files import read_json

pytestmark = pytest.mark.slow
DIRECTIONS = ("brain_to_dna", "dna_to_brain")


def make(root: Path, preset: str, *, n_people: int, seed: int) -> tuple[object, ...]:
    """A trap cohort with its connectomes as brain features; the flags that name it."""
    cohort, features = root / "cohort", root / "work" / "features"
    size = ("--n-people", n_people, "--n-parcels", 24, "--n-trs", 160, "--seed", seed)
    run("simulate", "--preset", preset, *size, "--out", cohort)
    recordings = Cohort.open(cohort).recordings
    people = recordings.index["subject"].to_list()
    features.mkdir(parents=True)
    values = connectome(recordings, range(len(people)))
    write_features(features / "fc.parquet", people, values, provenance={})
    return "--brain", "fc", "--cohort", cohort, "--workspace", root / "work"


def run(*words: object) -> None:
    assert main([str(word) for word in words]) == 0


def found(root: Path, place: tuple[object, ...], method: str, *flags: object) -> dict:
    """Align and score; the content of retrieval.json."""
    run("align", "--method", method, "--no-control", *flags, *place)
    run("retrieve", "--permutations", 199, "--bootstrap", 100, *place)
    return read_json(root / "work" / "align" / "fc-evo2" / "retrieval.json")


def is_at_chance(row: dict) -> bool:
    return abs(row["auc"] - 0.5) <= 3 * row["standard_error"]


@pytest.mark.parametrize("method", ["rcca", "infonce"])
def test_stratification_is_unmasked(tmp_path, method):
    place = make(tmp_path, "stratification", n_people=600, seed=1)
    naive = found(tmp_path, place, method)
    strata = [row for row in naive["strata"] if row["name"] == "same site and ancestry group"]
    for direction, stratum in zip(DIRECTIONS, strata, strict=True):
        row = naive[direction]
        # Off: everybody exchanged with everybody, a link is "found".
        assert row["auc"] - 0.5 > 2 * row["standard_error"]
        assert row["p_value_freely_exchanged"] <= 0.01
        # On: exchanged within site and ancestry group, or searched among their like, there is none.
        assert row["p_value"] > 0.05
        assert is_at_chance(stratum)
    said = verdict({"retrieval": naive})
    [warning] = [text for text in said if "exchanging everybody with everybody" in text]
    assert warning.startswith("Warning: ")
    assert "within their site and ancestry group does not" in warning
    assert not any("better than chance" in text for text in said)

    # On: what differs between sites and ancestries is regressed out of both modalities.
    flags = ("--residualise", "site", "group", "ancestry_*")
    controlled = found(tmp_path, place, method, *flags)
    for direction in DIRECTIONS:
        assert controlled[direction]["p_value"] > 0.05
        assert is_at_chance(controlled[direction])
    assert controlled["attainable_linear"]["auc"] < 0.53 < naive["attainable_linear"]["auc"]
    assert verdict({"retrieval": controlled})[0].startswith("No evidence of alignment")


def test_siblings_on_both_sides_of_a_split_are_unmasked(tmp_path):
    place = make(tmp_path, "family", n_people=1000, seed=0)
    whole = found(tmp_path, place, "rcca")
    for direction in DIRECTIONS:
        assert whole[direction]["p_value"] > 0.05
        assert is_at_chance(whole[direction])
    assert not whole["relatives"]["warns"]
    assert not any("sibling" in text for text in verdict({"retrieval": whole}))

    # The same people, and nobody knows who is a relative.
    path = tmp_path / "cohort" / "subjects.parquet"
    pl.read_parquet(path).drop("family").write_parquet(path)
    (tmp_path / "cohort" / "splits.json").unlink()
    torn = found(tmp_path, place, "rcca")
    mean = np.mean([torn[direction]["auc"] for direction in DIRECTIONS])
    assert min(torn[direction]["p_value"] for direction in DIRECTIONS) < 0.05
    assert mean > 0.5 + 2 * torn["brain_to_dna"]["standard_error"]
    assert torn["relatives"]["n_alike"] > 100
    [warning] = [text for text in verdict({"retrieval": torn}) if "sibling" in text]
    assert warning.startswith("Warning: ")
    assert "may be the family's and not the person's" in warning
