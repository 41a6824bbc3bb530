"""Runs side by side: paired on the people that all have, and nobody's id on the page."""

import json
from pathlib import Path

import numpy as np
import pytest

from brainfusion.data.features import write_features
from brainfusion.eval.report.compare import (
    compare_runs,
    comparison_page,
    findings,
    read_alignment_runs,
    short_names,
)
from brainfusion.eval.retrieval.metrics import retrieval_metrics
from brainfusion.runtime.errors import UserError

N = 120
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
