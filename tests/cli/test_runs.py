"""Which alignment a command is about: by its sides in the workspace, or by its folder."""

import shutil
from pathlib import Path

import pytest

from brainfusion.cli.runs import AlignmentRun, WhichRun, find_run
from brainfusion.cli.workspace import Workspace
from brainfusion.runtime.errors import UserError
from brainfusion.runtime.files import read_json
from tests.cli.conftest import BRIEF


@pytest.fixture(scope="module")
def place(site) -> Workspace:
    return Workspace(root=site.workspace, cohort_path=site.cohort, demo=False)


@pytest.fixture(scope="module")
def elsewhere(site, tmp_path_factory) -> Path:
    """A copy of the run of brainjepa and evo2 in a folder of another name."""
    folder = tmp_path_factory.mktemp("elsewhere") / "mine"
    shutil.copytree(site.workspace / "align" / "brainjepa-evo2", folder)
    return folder


def test_a_run_is_found_by_its_sides_or_by_its_folder(place, elsewhere):
    named = find_run(place, WhichRun(brain=("brainjepa",), dna=("evo2",)))
    assert named.path == place.align_dir("brainjepa", "evo2")
    by_folder = find_run(place, WhichRun(run=elsewhere))
    assert by_folder.path == elsewhere
    for run in (named, by_folder):
        assert (run.brain, run.dna, run.haplotypes) == (("brainjepa",), ("evo2",), "mean")
    assert named.flags(place)[:4] == ["--brain", "brainjepa", "--dna", "evo2"]
    assert by_folder.flags(place)[:2] == ["--run", str(elsewhere)]
    assert by_folder.flags(place)[2:] == place.options()


def test_its_sides_may_be_repeated_but_not_contradicted(place, elsewhere):
    find_run(place, WhichRun(brain=("brainjepa",), dna=("evo2",), run=elsewhere))
    with pytest.raises(UserError, match=r"--dna caduceus with --run .*made of evo2: leave --dna"):
        find_run(place, WhichRun(dna=("caduceus",), run=elsewhere))
    with pytest.raises(UserError, match=r"--brain brainlm with --run .*made of brainjepa"):
        find_run(place, WhichRun(brain=("brainlm",), run=elsewhere))


def test_several_modalities_of_a_side_are_read_back(place, elsewhere, tmp_path):
    shutil.copytree(elsewhere, tmp_path / "run")
    path = tmp_path / "run" / "summary.json"
    text = path.read_text().replace('"dna": "evo2"', '"dna": "evo2+generator,caduceus"')
    path.write_text(text.replace('"brain": "brainjepa"', '"brain": "brainjepa,brainlm"'))
    run = AlignmentRun.read(tmp_path / "run")
    assert run.brain == ("brainjepa", "brainlm")
    assert run.dna == ("evo2+generator", "caduceus")
    assert run.dna_name == "evo2+generator,caduceus"


def test_a_folder_without_an_alignment_is_one_line(site, call, tmp_path):
    said = call("retrieve", "--run", tmp_path, *site.place)
    assert f"{tmp_path} holds no finished alignment" in said.error


def test_scores_of_a_run_elsewhere_are_written_there_and_another_cohort_is_said(
    site, done, elsewhere
):
    said = done("retrieve", "--run", elsewhere, *BRIEF, *site.place)
    assert "another cohort" not in said.err
    own = site.workspace / "align" / "brainjepa-evo2" / "retrieval.json"
    assert read_json(elsewhere / "retrieval.json")["brain_to_dna"]["auc"] == pytest.approx(
        read_json(own)["brain_to_dna"]["auc"]
    )
    path = elsewhere / "summary.json"
    cohort_hash = read_json(path)["meta"]["provenance"]["cohort_hash"]
    path.write_text(path.read_text().replace(cohort_hash, "0" * 16))
    said = done("retrieve", "--run", elsewhere, *BRIEF, *site.place)
    assert f"warning: {elsewhere} was made from another cohort" in said.err
