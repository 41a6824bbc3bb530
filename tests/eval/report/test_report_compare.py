"""Runs side by side: paired on the people that all have, and nobody's id on the page."""

import json
from pathlib import Path

import numpy as np
import pytest

from brainfusion.data.features import write_features
from brainfusion.eval.report.compare import compare_runs, read_alignment_runs, short_names
from brainfusion.eval.report.comparison import comparison_page
from brainfusion.eval.report.findings import comparison, comparison_table, findings
from brainfusion.eval.retrieval.metrics import retrieval_metrics
from brainfusion.runtime.errors import UserError

N = 120
RUNS = {"strong": 1.5, "weak": 0.5, "alike": 1.5, "null": 0.0}
IDS = [f"person-{i:05d}" for i in range(N)]


def write_run(folder: Path, seed: int, *, signal: float, test: slice = slice(0, N)) -> Path:
    """A run whose test people are those of `test`; the others are training people."""
    people = np.random.default_rng(0).standard_normal((N, 16))  # what brain and DNA share
    rng = np.random.default_rng([seed, 1])
    sides = [signal * people + rng.standard_normal((N, 16)) for _ in range(2)]
    sides = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in sides]
    split = np.full(N, "train")
    split[test] = "test"
    for side, vectors in zip(("brain", "dna"), sides, strict=True):
        path = folder / "embeddings" / f"{side}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_features(path, IDS, vectors, provenance={}, extra={"split": split.tolist()})
    found = retrieval_metrics(sides[0][test], sides[1][test], n_permutations=99, n_bootstrap=99)
    named = {"query_to_gallery": "brain_to_dna", "gallery_to_query": "dna_to_brain"}
    retrieval = {named.get(key, key): value for key, value in found.items()}
    (folder / "retrieval.json").write_text(json.dumps(retrieval))
    summary = {"n_train": N, "n_test": N, "best_step": 3, "loss_name": "info_nce"}
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "config.yaml").write_text(f"seed: {seed}\ninit: rcca\n")
    return folder


def test_the_better_run_is_named_and_equal_ones_are_not_told_apart(tmp_path):
    folders = [
        write_run(tmp_path / "strong", 1, signal=1.5),
        write_run(tmp_path / "weak", 2, signal=0.5),
        write_run(tmp_path / "alike", 3, signal=1.5),
    ]
    runs = read_alignment_runs(folders)
    compared = compare_runs(runs, n_permutations=499, n_bootstrap=99)
    text = "\n".join(findings(runs, compared))
    assert "strong beats weak by" in text
    assert "alike beats weak by" in text
    assert "strong and alike are not told apart" in text
    page = comparison_page(runs, compared)
    assert "person-" not in page
    assert "<script" not in page
    assert page.count("strong") > 5
    assert text.splitlines()[0].startswith("The highest is ")
    assert "not clearly ahead of " in text.splitlines()[0]
    # The settings in which they differ, and no others.
    assert "One setting differs" in page
    assert "<td>seed</td><td>1</td><td>2</td><td>3</td>" in page
    assert "<td>init</td>" not in page


def test_the_headline_says_whether_the_best_is_clearly_ahead(tmp_path):
    folders = [write_run(tmp_path / n, i, signal=s) for i, (n, s) in enumerate(RUNS.items())]
    runs = read_alignment_runs(folders[:2])
    compared = compare_runs(runs, n_permutations=499, n_bootstrap=99)
    assert next(findings(runs, compared)).startswith("strong is best, clearly ahead of weak: AUC ")
    runs = read_alignment_runs([folders[0], folders[2]])
    compared = compare_runs(runs, n_permutations=499, n_bootstrap=99)
    assert next(findings(runs, compared)).startswith("No run is clearly best. The highest is ")
    # Four runs: the best with each other one, and no sentence of the other pairs.
    runs = read_alignment_runs(folders)
    lines = list(findings(runs, compare_runs(runs, n_permutations=499, n_bootstrap=99)))
    assert any(line.startswith("No evidence of alignment in null: p = ") for line in lines)
    assert len([line for line in lines if "beats" in line or "not told apart" in line]) == 3
    assert lines[-1] == "Every other pair of runs is in the table of differences."


def test_the_numbers_of_the_page_are_those_of_the_runs_and_of_the_comparison(tmp_path):
    folders = [write_run(tmp_path / n, i, signal=s) for i, (n, s) in enumerate(RUNS.items())]
    runs = read_alignment_runs(folders[:2])
    compared = compare_runs(runs, n_permutations=99, n_bootstrap=99)
    found = json.loads(json.dumps(comparison(runs, compared), allow_nan=False))
    assert found["n_common"] == N
    strong, weak = found["runs"]
    assert strong["settings"] == {"seed": 0, "init": "rcca"}
    for row in found["differences"]:
        values = [run["retrieval"][row["direction"]][row["metric"]] for run in (strong, weak)]
        assert row["difference"] == pytest.approx(values[0] - values[1])
    table = comparison_table(found)
    rows = table.filter(section="difference")
    assert rows["value"].to_list() == [row["difference"] for row in found["differences"]]
    assert rows["n"].unique().to_list() == [N]
    assert not [one for one in IDS if one in table.write_csv() or one in json.dumps(found)]


def test_only_common_test_people_are_compared(tmp_path):
    folders = [
        write_run(tmp_path / "one", 1, signal=1.5, test=slice(0, 80)),
        write_run(tmp_path / "two", 2, signal=0.5, test=slice(40, N)),
    ]
    runs = read_alignment_runs(folders)
    compared = compare_runs(runs, n_permutations=99, n_bootstrap=99)
    assert {row["n_queries"] for row in compared} == {40}
    apart = [
        write_run(tmp_path / "three", 1, signal=1.5, test=slice(0, 40)),
        write_run(tmp_path / "four", 2, signal=0.5, test=slice(80, N)),
    ]
    runs = read_alignment_runs(apart)
    assert compare_runs(runs) == []
    assert "share too few test people to be compared" in "\n".join(findings(runs, []))
    assert "too few test people in common" in comparison_page(runs, [])


def test_names_are_the_shortest_ends_that_differ(tmp_path):
    assert short_names([tmp_path / "a" / "run", tmp_path / "b" / "run"]) == ["a/run", "b/run"]
    assert short_names([tmp_path / "a", tmp_path / "b"]) == ["a", "b"]
    with pytest.raises(UserError, match="named twice"):
        short_names([tmp_path / "a", tmp_path / "b" / ".." / "a"])


def test_a_folder_that_is_no_scored_alignment_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"no summary\.json: expected the folder of an"):
        read_alignment_runs([tmp_path])
