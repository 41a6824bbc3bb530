import json
import re
import shutil

import numpy as np
import polars as pl
import pytest

from brainfusion.alignment import GeneArray, GeneVectors
from brainfusion.cli import retrieve
from brainfusion.cli.align import shuffled, shuffled_order
from brainfusion.cli.modalities import Modalities
from brainfusion.data.cohort import Cohort
from brainfusion.data.features import read_features, write_features
from brainfusion.runtime.files import read_json
from brainfusion.runtime.logs import read_metrics
from tests.cli.conftest import BRIEF, SMALL

SCORED = {"auc", "ci_low", "ci_high", "p_value", "chance", "n_gallery", "attainable", "unit"} | {
    f"{name}{tail}"
    for name in ("recall_at_1", "recall_at_5", "recall_at_10", "median_rank", "mrr")
    for tail in ("", "_chance")
}


@pytest.fixture(scope="module")
def results(site):
    return read_json(site.workspace / "results.json")


def embeddings(site, pair="brainjepa-evo2", kind="embeddings"):
    folder = site.workspace / "align" / pair / kind
    return {tower: read_features(folder / f"{tower}.parquet") for tower in ("brain", "dna")}


def scored(site):
    """The vectors whose inner products rank: those of the density ratio."""
    return embeddings(site, kind="scores")


# -- what the stages leave -------------------------------------------------------------------------


def test_every_stage_leaves_the_files_that_the_formats_name(site):
    made = {
        path.relative_to(site.workspace).as_posix()
        for path in site.workspace.rglob("*")
        if path.is_file()
    }
    run, step = "align/brainjepa-evo2", "checkpoints/step-0000004"
    for model in ("brainjepa", "brainlm"):
        expected = {
            f"pretrain/{model}/{name}" for name in ("config.yaml", "metrics.jsonl", "summary.json")
        }
        expected |= {
            f"pretrain/{model}/{step}/{name}"
            for name in ("model.safetensors", "optimizer.pt", "state.json")
        }
        assert expected | {f"features/{model}.parquet"} <= made
    assert {
        f"{run}/{name}"
        for name in (
            "config.yaml",
            "metrics.jsonl",
            "summary.json",
            "embeddings/brain.parquet",
            "embeddings/dna.parquet",
            "retrieval.json",
        )
    } <= made
    assert {"probes.json", "results.json", "report.html"} <= made
    # Nothing that was written aside is left behind.
    assert not [name for name in made if "/." in f"/{name}"]


def test_results_have_every_headline_number(results):
    for direction in ("brain_to_dna", "dna_to_brain"):
        row = results["retrieval"][direction]
        assert row.keys() >= SCORED
        assert row["ci_low"] <= row["auc"] <= row["ci_high"]
        assert 0 < row["p_value"] <= 1
        assert row["chance"] == 0.5
        assert row["n_gallery"] == results["alignment"]["n_test"] == 24
        assert 0.5 < row["attainable"] <= 1
    control = results["retrieval"]["shuffled_control"]
    assert control.keys() >= {"auc", "standard_error"}
    assert abs(control["auc"] - 0.5) <= 3 * control["standard_error"]
    baselines = [row["name"] for row in results["retrieval"]["baselines"]]
    assert any("connectome" in name for name in baselines)
    assert any("ridge-CCA" in name for name in baselines)


def test_results_have_a_row_for_each_probe_and_the_confounds_alone(results):
    rows = results["probes"]
    assert {row["target"] for row in rows} == {"age", "mdd"}
    keys = {"target", "kind", "features", "metric", "value", "ci_low", "ci_high", "p_value", "n"}
    assert all(row.keys() >= keys for row in rows)
    for target in ("age", "mdd"):
        names = [row["features"] for row in rows if row["target"] == target]
        assert names[0] == "confounds only"
        assert {"brainjepa features", "connectome", "evo2 vectors"} <= set(names)


def test_results_say_who_was_there_and_how_each_part_was_made(site, results):
    cohort = Cohort.open(site.cohort)
    assert results["cohort"]["n_people"] == 120
    assert results["cohort"]["hash"] == cohort.hash
    assert results["cohort"]["splits"]["hash"] == cohort.splits().hash
    assert results["pretraining"].keys() == {"brainjepa", "brainlm"}
    assert results["alignment"]["n_train"] + results["alignment"]["n_validation"] == 96
    assert results["config"].keys() == {"align", "brainjepa", "brainlm"}
    assert results["config"]["brainlm"]["encoder"]["n_parcels"] == 20
    for path in (results["alignment"]["metrics"], results["pretraining"]["brainlm"]["metrics"]):
        assert read_metrics(site.workspace / path)


def test_the_report_is_one_file_that_needs_no_network(site):
    page = (site.workspace / "report.html").read_text(encoding="utf-8")
    assert page.lstrip().lower().startswith("<!doctype html>")
    fetched = re.findall(r"""(?:src|href)\s*=\s*["']([^"']*)|url\(([^)]*)\)|(@import)""", page)
    targets = [next(filter(None, groups), "") for groups in fetched]
    # Anchors within the page, and data that it carries itself.
    assert [t for t in targets if not t.strip("\"'").startswith(("#", "data:"))] == []
    assert "<script" not in page or "http" not in "".join(re.findall("<script.*?</script>", page))


def test_no_subject_id_is_in_any_report_result_or_log(site):
    ids = Cohort.open(site.cohort).subjects["subject"].to_list()
    named = re.compile("|".join(map(re.escape, ids)))
    texts = [
        path
        for path in site.workspace.rglob("*")
        if path.suffix in (".html", ".json", ".jsonl", ".yaml")
    ]
    assert len(texts) > 15
    assert [path.name for path in texts if named.search(path.read_text(encoding="utf-8"))] == []


def test_a_second_pretraining_is_a_word_and_not_an_hour(site, done):
    before = site.checkpoint("brainlm").stat().st_mtime_ns
    said = done("pretrain", "--model", "brainlm", *SMALL, *site.place)
    assert "already trained to step 4" in said.err
    assert site.checkpoint("brainlm").stat().st_mtime_ns == before


# -- queries ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("asking", "searched"), [("dna", "brain"), ("brain", "dna")])
def test_a_query_finds_the_nearest_people_of_the_other_modality(site, done, asking, searched):
    towers = scored(site)
    person = towers["brain"].subjects[7]
    said = done("retrieve", "--query", person, "--query-from", asking, "--json", *site.place)
    rows = json.loads(said.out)["rows"]
    scores = towers[searched].vectors @ towers[asking].vectors[7]
    nearest = [towers[searched].subjects[i] for i in np.argsort(-scores)[:10]]
    assert [row["id"] for row in rows] == nearest
    np.testing.assert_allclose(
        [row["score"] for row in rows], np.sort(scores)[::-1][:10], rtol=1e-4, atol=1e-4
    )
    assert person not in said.err


def test_a_query_among_test_people_names_no_others(site, done):
    towers = embeddings(site)
    test = set(pl.Series(towers["brain"].subjects).filter(towers["brain"].extra["split"] == "test"))
    person = towers["brain"].subjects[0]
    said = done(
        "retrieve", "--query", person, "--among", "test", "--top", 50, "--json", *site.place
    )
    assert {row["id"] for row in json.loads(said.out)["rows"]} == test


def test_a_query_prints_a_table_that_marks_the_person(site, done):
    person = embeddings(site)["dna"].subjects[3]
    said = done("retrieve", "--query", person, "--top", 120, *site.place)
    lines = said.out.splitlines()
    assert "whose brain is nearest to this person's dna" in lines[0]
    assert len(lines) == 2 + 120
    assert [line.split()[1] for line in lines if "the same person" in line] == [person]


# -- other inputs ----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("dna", ["generator", "caduceus"])
def test_the_other_dna_models_are_imported_aligned_and_scored(site, done, dna):
    source = site.cohort / "sources" / dna
    said = done("import", "--dna", dna, source, "--cohort", site.cohort)
    assert f"{dna}: 120 people (120 of the cohort's 120)" in said.err
    pair = ("--brain", "brainlm", "--dna", dna, *site.place)
    done("align", "--max-steps", 5, *pair)
    done("retrieve", *BRIEF, *pair)
    scores = read_json(site.workspace / "align" / f"brainlm-{dna}" / "retrieval.json")
    assert scores["dna_to_brain"].keys() >= SCORED


def test_anyones_features_are_aligned_and_a_planted_link_is_found(site, done):
    # The latent traits themselves, with noise: what a perfect encoder would see.
    latents = pl.read_parquet(site.cohort / "truth" / "latents.parquet")
    traits = latents.select(pl.selectors.starts_with("trait_")).to_numpy()
    noise = np.random.default_rng(0).normal(size=traits.shape)
    path = site.workspace / "features" / "mine.parquet"
    write_features(path, latents["subject"].to_list(), traits + 0.3 * noise, provenance={})
    pair = ("--brain", "mine", "--dna", "evo2", *site.place)
    done("align", *pair)
    said = done("retrieve", "--permutations", 199, "--bootstrap", 50, *pair)
    assert "brain to DNA" in said.out
    scores = read_json(site.workspace / "align" / "mine-evo2" / "retrieval.json")
    for direction in ("brain_to_dna", "dna_to_brain"):
        assert scores[direction]["auc"] > 0.65
        assert scores[direction]["p_value"] <= 0.02
    assert scores["shuffled_control"]["within_3_standard_errors"]


def test_recordings_and_dna_alone_are_enough_for_a_report(site, done, call, tmp_path):
    """A newcomer's cohort: a folder of .npy and a folder of DNA files, and no table of people."""
    cohort = Cohort.open(site.cohort)
    (tmp_path / "npy").mkdir()
    for i, subject in enumerate(cohort.recordings.index["subject"]):
        np.save(tmp_path / "npy" / f"{subject}.npy", cohort.recordings.read(i))
    (tmp_path / "names.txt").write_text("\n".join(cohort.atlas.parcels))
    new = tmp_path / "new"
    words = ("--tr-s", 2, "--parcels", tmp_path / "names.txt")
    said = done("import", *words, tmp_path / "npy", "--out", new)
    assert "kept 120 recordings of 120 people: 20 parcels" in said.out
    assert "no table of people was given" in said.out
    done("import", "--dna", "evo2", site.cohort / "sources" / "evo2", "--cohort", new)
    place = ("--cohort", new, "--workspace", tmp_path / "work")
    for command in (
        ("pretrain", "--model", "brainjepa", *SMALL),
        ("embed",),
        ("align", "--max-steps", 5),
        ("retrieve", *BRIEF),
        ("report",),
    ):
        done(*command, *place)
    error = call("probe", *BRIEF, *place).error
    assert "subjects.parquet has no column that can be predicted" in error
    scores = read_json(tmp_path / "work" / "results.json")["retrieval"]
    assert scores["brain_to_dna"]["attainable"] is None
    facts = read_json(tmp_path / "work" / "results.json")["cohort"]["import"]
    assert (facts["n_files"], facts["n_recordings"]) == (120, 120)
    # One site for all: nothing to stay within.
    assert scores["strata"] == []


def test_a_report_of_the_demo_makes_the_scores_that_it_lacks(site, done, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    root = tmp_path / "runs" / "demo"
    shutil.copytree(site.workspace, root)
    shutil.copytree(site.cohort, root / "cohort")
    scores = root / "align" / "brainjepa-evo2" / "retrieval.json"
    scores.unlink()
    real = retrieve.main
    monkeypatch.setattr(retrieve, "main", lambda argv: real([*argv, *map(str, BRIEF)]))
    said = done("report")
    assert "retrieval.json is missing: scoring brainjepa and evo2" in said.err
    assert read_json(root / "results.json")["retrieval"] == read_json(scores)


def test_a_phenotype_that_cannot_be_predicted_is_left_out_unless_asked_for(
    site, done, call, tmp_path
):
    copy = shutil.copytree(site.cohort, tmp_path / "copy")
    table = pl.read_parquet(copy / "subjects.parquet").drop("cognition", "mdd", "age")
    colour = pl.Series("colour", [f"shade {i}" for i in range(120)])
    rare = pl.Series("rare", [1] + [0] * 119)
    table.with_columns(colour, rare).write_parquet(copy / "subjects.parquet")
    work = shutil.copytree(site.workspace, tmp_path / "work")
    place = ("--cohort", copy, "--workspace", work)
    said = done("probe", *BRIEF, *place)
    assert re.search(r"left out: target 'colour' has \d+ labels", said.err)
    assert "left out: target 'rare' has" in said.err
    assert {row["target"] for row in read_json(work / "probes.json")} == {"sex"}
    refused = call("probe", "--targets", "colour", *BRIEF, *place).error
    assert re.search(r"'colour' has \d+ labels: expected numbers or at most 20", refused)


def test_an_earlier_runs_config_gives_the_same_alignment(site, done, tmp_path):
    config = site.workspace / "align" / "brainjepa-evo2" / "config.yaml"
    done("align", "--config", config, "--no-control", "--out", tmp_path / "again", *site.place)
    for tower, was in embeddings(site).items():
        now = read_features(tmp_path / "again" / "embeddings" / f"{tower}.parquet")
        assert now.subjects == was.subjects
        np.testing.assert_array_equal(now.vectors, was.vectors)
    assert not (tmp_path / "again" / "control").exists()


def some_people(n=40):
    """A modality a side, which say the row that they are of."""
    labels = ["train"] * 25 + ["validation"] * 5 + ["test"] * 10
    row = np.arange(n, dtype=np.float32)[:, None]
    vectors = GeneArray(genes=("one",), vectors=row[:, None], mask=np.ones((n, 1), dtype=bool))
    return Modalities(
        people=pl.DataFrame(
            {"subject": [f"p{i}" for i in range(n)], "site": ["A", "B"] * (n // 2)}
        ),
        brain={"brain": row},
        dna={"dna": GeneVectors.of({"evo2": vectors})},
        present={"brain": np.ones(n, dtype=bool), "dna": np.arange(n) % 5 > 0},
        labels=labels,
        provenance={},
        flow=[],
    )


def test_the_control_pairs_people_with_others_of_the_same_split():
    people = some_people()
    order = shuffled_order(people, seed=0)
    control = shuffled(people, order)
    assert control.labels == people.labels
    assert control.brain is people.brain
    assert sorted(order) == list(range(40))
    assert [people.labels[i] for i in order] == people.labels
    assert np.mean(order == np.arange(40)) < 0.2
    moved = control.dna["dna"].concatenated(known_from=np.arange(25))[:, 0].astype(int)
    np.testing.assert_array_equal(moved, order)
    # Who has no DNA goes with the DNA.
    np.testing.assert_array_equal(control.present["dna"], order % 5 > 0)
    assert control.present["brain"].all()


def test_the_control_of_a_run_within_sites_stays_within_them():
    order = shuffled_order(some_people(), seed=0, within_site=True)
    np.testing.assert_array_equal(order % 2, np.arange(40) % 2)
    assert np.mean(order == np.arange(40)) < 0.3
