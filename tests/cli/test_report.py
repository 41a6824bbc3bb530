"""`brainfusion report` and `probe` on runs that are named by their folder, and on several."""

import json
import re
import shutil
from importlib.resources import files
from pathlib import Path

import polars as pl
import pytest
from jsonschema import Draft202012Validator

from brainfusion.cli import main
from brainfusion.data.cohort import Cohort
from brainfusion.eval.report.findings import TABLE_SCHEMA
from brainfusion.eval.report.tidy import SCHEMA
from brainfusion.runtime.files import read_json, write_json
from tests.cli.conftest import BRIEF

FEW = ("--targets", "age", "--n-folds", 3, *BRIEF)


def validator(name: str) -> Draft202012Validator:
    text = files("brainfusion.eval.report").joinpath(f"{name}.schema.json").read_text("utf-8")
    Draft202012Validator.check_schema(json.loads(text))
    return Draft202012Validator(json.loads(text))


def alter(path: Path, **values: object) -> None:
    """Change values of a run's summary that say where it came from."""
    summary = read_json(path / "summary.json")
    summary["meta"]["provenance"] |= values
    write_json(path / "summary.json", summary)


@pytest.fixture(scope="module")
def runs(site, tmp_path_factory) -> dict[str, Path]:
    """A closed form elsewhere, scored, and two brain modalities in one space."""
    root = tmp_path_factory.mktemp("elsewhere")
    made = {"rcca": root / "rcca", "both": root / "both"}

    def run(*words: object) -> None:
        assert main([str(word) for word in words]) == 0

    run("align", "--method", "rcca", "--out", made["rcca"], *site.place)
    run("retrieve", "--run", made["rcca"], *BRIEF, *site.place)
    pair = ("--brain", "brainjepa", "brainlm", "--init", "random", "--max-steps", 2)
    run("align", *pair, "--no-control", "--out", made["both"], *site.place)
    return made


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}


def test_results_of_a_real_run_fit_the_schema_and_have_learning_curves_by_default(site):
    results = read_json(site.workspace / "results.json")
    validator("results").validate(results)
    curves = [row["learning_curve"] for row in results["probes"] if "learning_curve" in row]
    assert len(curves) >= 5
    for points in curves:
        sizes = [point["n_train"] for point in points]
        assert sizes == sorted(set(sizes))
    # Age has a point at each size; a rare class may lack one, which is said.
    age = next(row for row in results["probes"] if row["features"] == "connectome")
    assert [len(age["learning_curve"]), age["target"]] == [3, "age"]
    pairs = {
        (row["features"], other["against"]): other["difference"]
        for row in results["probes"]
        if row["target"] == "age"
        for other in row.get("comparisons", [])
    }
    joined = "brainjepa features + evo2 vectors"
    assert {("brain embedding", "brainjepa features"), (joined, "evo2 vectors")} <= pairs.keys()
    values = {row["features"]: row["value"] for row in results["probes"] if row["target"] == "age"}
    for (first, second), difference in pairs.items():
        assert difference == pytest.approx(values[first] - values[second], abs=1e-9)
    page = (site.workspace / "report.html").read_text("utf-8")
    assert re.search(r"\d+ of 10 differences between representations are clear", page)
    assert "Would more people help?" in page
    assert "Learning curves of age" in page


def test_a_run_given_as_its_folder_has_the_whole_page_there_and_nothing_elsewhere(site, done, runs):
    before, folder = contents(site.workspace), runs["rcca"]
    done("probe", "--run", folder, *FEW, "--cca", 2, "--cca-permutations", 19, *site.place)
    said = done("report", folder, *site.place)
    assert contents(site.workspace) == before
    results = read_json(folder / "results.json")
    validator("results").validate(results)
    assert results["alignment"]["method"] == "rcca"
    assert results["retrieval"] == read_json(folder / "retrieval.json")
    assert results["probes"] == read_json(folder / "probes.json")
    assert results["cca"] == read_json(folder / "cca.json")
    assert results["pretraining"].keys() == {"brainjepa"}
    assert results["stages"] == []
    for name in (results["alignment"]["metrics"], results["figures"]["similarity"]):
        assert (folder / name).is_file()
    page = (folder / "report.html").read_text("utf-8")
    assert "ridge CCA, closed form" in page
    for part in ("retrieval", "control", "space", "probes", "cca", "cohort", "provenance"):
        assert f'<section id="{part}">' in page
    assert 'id="shared-space' in page
    assert 'id="loss-0' in page
    assert "results.json" in said.err
    table = pl.read_parquet(folder / "results.parquet")
    assert dict(table.schema) == SCHEMA
    held = table.filter(section="cca", metric="held_out_correlation")
    assert held["value"].to_list() == [row["held_out"] for row in results["cca"]["components"]]
    # By --run it is the same run.
    again = done("report", "--run", folder, *site.place)
    assert again.out == said.out


def test_probes_of_another_run_are_not_taken_for_this_ones(site, done, runs, tmp_path):
    folder = shutil.copytree(runs["rcca"], tmp_path / "rcca")
    for name in ("probes.json", "cca.json"):
        (folder / name).unlink(missing_ok=True)
    done("report", folder, *site.place)
    assert read_json(folder / "results.json")["probes"] == []
    other = [{**row, "features": f"x{row['features']}"} for row in read_json(
        site.workspace / "probes.json"
    )]  # fmt: skip
    write_json(folder / "probes.json", other)
    said = done("report", folder, *site.place)
    assert "is not of brainjepa and evo2, so it is left out" in said.err
    assert f"'brainfusion probe --run {folder}" in said.err
    assert read_json(folder / "results.json")["probes"] == []


def test_the_cca_of_a_tuned_encoder_is_of_people_on_whom_it_was_not_tuned(
    site, done, runs, tmp_path
):
    folder = shutil.copytree(runs["rcca"], tmp_path / "tuned")
    summary = read_json(folder / "summary.json")
    del summary["method"]
    write_json(folder / "summary.json", {**summary, "finetune": {"how": "lora"}})
    done("probe", "--run", folder, *FEW, "--cca", 1, "--cca-permutations", 9, *site.place)
    found = read_json(folder / "cca.json")
    assert found["held_out_only"]
    assert found["n_people"] == summary["n_validation"] + summary["n_test"]
    done("report", folder, *site.place)
    page = (folder / "report.html").read_text("utf-8")
    assert "InfoNCE, fine-tuned (lora)" in page
    assert "The encoder was tuned on pairs" in page
    assert read_json(folder / "results.json")["config"].keys() == {"finetune", "brainjepa"}


def test_several_modalities_of_a_side_are_a_row_each_and_one_cca(site, done, runs):
    words = ("--cca", 1, "--cca-permutations", 9, "--pca", 4, *FEW)
    done("probe", "--run", runs["both"], *words, *site.place)
    rows = {row["features"]: row for row in read_json(runs["both"] / "probes.json")}
    joined = "brainjepa features + brainlm features + evo2 vectors"
    wanted = {"brainjepa features", "brainlm features", "evo2 vectors", "brain embedding", joined}
    assert wanted <= rows.keys()
    alone = {row["features"]: row for row in read_json(site.workspace / "probes.json")}
    # The features themselves are the same as in a run of one modality.
    assert alone["brainjepa features"]["n"] == rows["brainjepa features"]["n"]
    found = read_json(runs["both"] / "cca.json")
    assert (found["brain"], found["dna"]) == ("brainjepa,brainlm", "evo2")
    done("retrieve", "--run", runs["both"], *BRIEF, *site.place)
    done("report", runs["both"], *site.place)
    results = read_json(runs["both"] / "results.json")
    validator("results").validate(results)
    assert results["cca"] == found
    assert results["pretraining"].keys() == {"brainjepa", "brainlm"}


def test_runs_side_by_side_leave_a_page_and_its_numbers(site, done, runs, tmp_path):
    usual, out = site.workspace / "align" / "brainjepa-evo2", tmp_path / "page.html"
    said = done("report", usual, runs["rcca"], "--out", out, *site.place)
    found = read_json(tmp_path / "page.json")
    validator("comparison").validate(found)
    assert [run["name"] for run in found["runs"]] == ["brainjepa-evo2", "rcca"]
    assert [run["method"] for run in found["runs"]] == ["InfoNCE", "ridge CCA, closed form"]
    assert said.out.splitlines() == found["findings"]
    for run, folder in zip(found["runs"], (usual, runs["rcca"]), strict=True):
        scores = read_json(folder / "retrieval.json")
        assert run["retrieval"]["dna_to_brain"] == scores["dna_to_brain"]
    table = pl.read_parquet(tmp_path / "page.parquet")
    assert dict(table.schema) == TABLE_SCHEMA
    asked = {"run": "rcca", "section": "retrieval", "direction": "brain_to_dna", "metric": "auc"}
    row = found["runs"][1]["retrieval"]["brain_to_dna"]
    assert table.filter(**asked)["value"].item() == row["auc"]
    differences = table.filter(section="difference", metric="auc")
    assert set(differences["other_run"]) == {"rcca"}
    assert set(differences["direction"]) == {"brain_to_dna", "dna_to_brain"}
    assert differences["q_value"].is_not_null().all()
    page = out.read_text("utf-8")
    assert "ridge CCA, closed form" in page
    assert not re.search(r"https?://|<script|<link|@import", page)


def test_no_subject_id_is_in_what_report_and_probe_write(site, done, runs, tmp_path):
    done("report", runs["rcca"], *site.place)
    folders = (site.workspace / "align" / "brainjepa-evo2", runs["rcca"])
    done("report", *folders, "--out", tmp_path / "page.html", *site.place)
    ids = Cohort.open(site.cohort).subjects["subject"].to_list()
    texts = [path for path in runs["rcca"].iterdir() if path.suffix in (".html", ".json", ".md")]
    texts += [tmp_path / f"page.{end}" for end in ("html", "json")]
    assert len(texts) > 5
    for path in texts:
        assert not [one for one in ids if one in path.read_text("utf-8")], path
    for path in (runs["rcca"] / "results.parquet", tmp_path / "page.parquet"):
        assert not [one for one in ids if one in pl.read_parquet(path).write_csv()], path


def test_a_run_in_a_workspace_with_a_cohort_needs_no_other_flag(site, done, tmp_path):
    root = shutil.copytree(site.workspace, tmp_path / "work")
    shutil.copytree(site.cohort, root / "cohort")
    folder = root / "align" / "brainjepa-evo2"
    done("report", folder)
    results = read_json(folder / "results.json")
    assert results["cohort"]["n_people"] == 120
    # In its usual place, what the workspace has of its sides is its own.
    assert results["probes"] == read_json(root / "probes.json")


def test_what_cannot_be_reported_is_one_line(site, call, runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = shutil.copytree(runs["rcca"], tmp_path / "copy")
    assert "there is no cohort in runs/demo/cohort" in call("report", folder).error
    assert list(tmp_path.iterdir()) == [folder]
    error = call("report", folder, runs["rcca"], "--out", "page.json", *site.place).error
    assert "--out page.json: expected the name of a page, such as page.html" in error
    assert "--out goes with several runs" in call("report", folder, "--out", "x.html").error
    error = call("report", folder, "--run", runs["rcca"], *site.place).error
    assert "name one run" in error
    error = call("report", folder, "--brain", "brainlm", *site.place).error
    assert "which was made of brainjepa: leave --brain out" in error
    error = call("report", site.workspace, *site.place).error
    assert "here align/brainjepa-evo2 or " in error
    assert f"'brainfusion report --workspace {site.workspace}' reports the workspace" in error
    error = call("probe", "--run", tmp_path / "nothing", *site.place).error
    assert "holds no finished alignment" in error
    alter(folder, splits_hash="another")
    error = call("report", folder, *site.place).error
    assert "was made from other people, or another split of them" in error
    (folder / "retrieval.json").unlink()
    alter(folder, splits_hash=Cohort.open(site.cohort).splits().hash)
    error = call("report", folder, *site.place).error
    assert f"run 'brainfusion retrieve --run {folder}" in error


def test_families_of_another_cohort_are_not_used_in_a_comparison(site, done, runs, tmp_path):
    folder = shutil.copytree(runs["rcca"], tmp_path / "rcca")
    usual, out = site.workspace / "align" / "brainjepa-evo2", tmp_path / "page.html"
    said = done("report", usual, folder, "--out", out, *site.place)
    assert "people count as unrelated" not in said.err
    alter(folder, splits_hash="another")
    said = done("report", usual, folder, "--out", out, *site.place)
    assert "a run was not made from the people of" in said.err
    assert "people count as unrelated" in said.err


def test_the_usual_place_is_found_whatever_way_the_folder_is_written(site, done, monkeypatch):
    monkeypatch.chdir(site.workspace)
    before = contents(site.workspace / "align" / "brainjepa-evo2")
    done("report", Path("align/brainjepa-evo2"), "--cohort", site.cohort, "--workspace", ".")
    folder = site.workspace / "align" / "brainjepa-evo2"
    results = read_json(folder / "results.json")
    assert results["probes"] == read_json(site.workspace / "probes.json")
    for name in contents(folder).keys() - before.keys():
        (folder / name).unlink()
