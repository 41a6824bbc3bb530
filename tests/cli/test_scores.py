"""Alignments with score vectors: what retrieve and query make of them."""

import json
import shutil
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from brainfusion.cli import main
from brainfusion.data.features import read_features, write_features
from brainfusion.eval.retrieval.metrics import retrieval_metrics
from brainfusion.runtime.files import read_json
from tests.cli.conftest import BRIEF


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory) -> Path:
    """Noisy traits aligned with DNA by rCCA, with its control, and scored.

    The score vectors lack their first component: they rank otherwise than the cosine.
    """
    root = tmp_path_factory.mktemp("scores")
    cohort, features = root / "cohort", root / "work" / "features"
    place = ("--cohort", cohort, "--workspace", root / "work")

    def run(*words: object) -> None:
        assert main([str(word) for word in words]) == 0

    run("simulate", "--n-people", 200, "--n-parcels", 16, "--n-trs", 32, "--out", cohort)
    latents = pl.read_parquet(cohort / "truth" / "latents.parquet")
    traits = latents.select(pl.selectors.starts_with("trait_")).to_numpy()
    noise = np.random.default_rng(0).normal(size=traits.shape)
    features.mkdir(parents=True)
    people = latents["subject"].to_list()
    write_features(features / "mine.parquet", people, traits + 0.3 * noise, provenance={})
    run("align", "--brain", "mine", "--method", "rcca", *place)
    made = root / "work" / "align" / "mine-evo2"
    for path in [*made.glob("scores/*.parquet"), *made.glob("control/scores/*.parquet")]:
        table = read_features(path)
        vectors = table.vectors * (np.arange(table.vectors.shape[1]) > 0)
        write_features(path, table.subjects, vectors, provenance={}, extra=table.extra.to_dict())
    run("retrieve", "--brain", "mine", *BRIEF, *place)
    return made


def place_of(run_dir: Path) -> tuple[object, ...]:
    root = run_dir.parents[2]
    return "--brain", "mine", "--cohort", root / "cohort", "--workspace", root / "work"


def test_vectors(run_dir: Path, folder: str) -> tuple[np.ndarray, np.ndarray]:
    tables = [read_features(run_dir / folder / f"{side}.parquet") for side in ("brain", "dna")]
    assert tables[0].subjects == tables[1].subjects
    keep = (tables[0].extra["split"] == "test").to_numpy()
    return tables[0].vectors[keep], tables[1].vectors[keep]


test_vectors.__test__ = False  # type: ignore[attr-defined]


def test_the_density_ratio_is_the_main_score_and_the_cosine_stands_beside_it(run_dir):
    scores = read_json(run_dir / "retrieval.json")
    both = {"brain_to_dna": "query_to_gallery", "dna_to_brain": "gallery_to_query"}
    ratio, cosine = (
        retrieval_metrics(*test_vectors(run_dir, folder)) for folder in ("scores", "embeddings")
    )
    for name, key in both.items():
        assert scores[name]["score"] == "density ratio"
        for metric in ("auc", "recall_at_1", "recall_at_10", "median_rank"):
            assert scores[name][metric] == pytest.approx(ratio[key][metric])
            assert scores["cosine"][name][metric] == pytest.approx(cosine[key][metric])
    assert ratio != cosine
    assert scores["brain_to_dna"]["auc"] > 0.6
    control = retrieval_metrics(*test_vectors(run_dir / "control", "scores"))
    assert scores["shuffled_control"]["brain_to_dna"]["auc"] == pytest.approx(
        control["query_to_gallery"]["auc"]
    )


def test_what_is_attained_is_held_against_the_best_linear_model(run_dir):
    scores = read_json(run_dir / "retrieval.json")
    row = scores["attainable_linear"]
    assert row["n_pairs"] == 200
    assert row["n_gallery"] == scores["brain_to_dna"]["n_gallery"]
    assert 0.6 < row["ci_low"] <= row["auc"] <= row["ci_high"] < 1
    assert row["auc"] < scores["brain_to_dna"]["attainable"]
    assert not scores["relatives"]["warns"]


def test_the_naive_p_value_and_what_was_kept_together_are_there(run_dir):
    row = read_json(run_dir / "retrieval.json")["brain_to_dna"]
    assert row["exchanged_within"] == ["site", "group", "family"]
    assert row["p_value_freely_exchanged"] == 0.05  # of 19 permutations


def test_figures_are_of_the_main_score_and_hold_no_ids(run_dir):
    arrays = np.load(run_dir / "similarity.npz")
    scores = read_json(run_dir / "retrieval.json")
    brain, dna = test_vectors(run_dir, "scores")
    np.testing.assert_allclose(arrays["pairs"], (brain * dna).sum(axis=1), rtol=1e-5)
    for name in ("brain_to_dna", "dna_to_brain"):
        assert arrays[f"ranks_{name}"].mean() == pytest.approx(scores[name]["auc"])
    table = brain @ dna.T
    others = table[~np.eye(len(table), dtype=bool)]
    assert len(arrays["non_pairs"]) == len(others)
    # Drawn with replacement from the very non-pairs.
    distance = np.abs(np.sort(others) - arrays["non_pairs"][:50, None]).min(axis=1)
    np.testing.assert_allclose(distance, 0, atol=1e-4)
    assert all(arrays[name].dtype.kind == "f" for name in arrays.files)


def test_a_query_ranks_by_density_ratio_and_says_so(run_dir, done):
    sides = {s: read_features(run_dir / "scores" / f"{s}.parquet") for s in ("brain", "dna")}
    person = sides["dna"].subjects[7]
    said = done("retrieve", "--query", person, "--json", *place_of(run_dir))
    answer = json.loads(said.out)
    rows = answer["rows"]
    scores = sides["brain"].vectors @ sides["dna"].vectors[7]
    nearest = [sides["brain"].subjects[i] for i in np.argsort(-scores)[:10]]
    assert [row["id"] for row in rows] == nearest
    found = [row["score"] for row in rows]
    np.testing.assert_allclose(found, np.sort(scores)[::-1][:10], rtol=1e-4, atol=1e-4)
    assert answer["score"] == "density ratio, nats"
    said = done("retrieve", "--query", person, *place_of(run_dir))
    assert "by density ratio, nats:" in said.out.splitlines()[1]


def test_the_table_names_the_score_the_cosine_and_the_share(run_dir, done):
    said = done("retrieve", *BRIEF, *place_of(run_dir))
    assert "score: density ratio, unit: person" in said.out
    assert "brain to DNA, by cosine" in said.out
    assert "best linear-Gaussian model of 200 such people: AUC" in said.out
    assert "of its way from chance" in said.out


def test_without_score_vectors_the_cosine_is_the_score(run_dir, done, tmp_path):
    root = shutil.copytree(run_dir.parents[2], tmp_path / "copy")
    own = root / "work" / "align" / "mine-evo2"
    shutil.rmtree(own / "scores")
    shutil.rmtree(own / "control")
    done("retrieve", *BRIEF, *place_of(own))
    scores = read_json(own / "retrieval.json")
    cosine = retrieval_metrics(*test_vectors(run_dir, "embeddings"))["query_to_gallery"]
    assert scores["brain_to_dna"]["score"] == "cosine"
    assert scores["brain_to_dna"]["auc"] == pytest.approx(cosine["auc"])
    assert "cosine" not in scores
    person = read_features(own / "embeddings" / "dna.parquet").subjects[0]
    said = done("retrieve", "--query", person, *place_of(own))
    assert "by cosine:" in said.out.splitlines()[1]


def test_the_report_reads_all_of_it(run_dir, done):
    done("retrieve", "--permutations", 199, "--bootstrap", 20, *place_of(run_dir))
    said = done("report", *place_of(run_dir))
    assert "of the best linear-Gaussian model's AUC above chance" in said.out
