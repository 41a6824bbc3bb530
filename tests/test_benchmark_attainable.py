"""The cohorts of benchmarks/attainable.py: their optimum is one, and the table is made."""

import json

import numpy as np
import pytest

from brainfusion.data.cca import fit_cca
from brainfusion.data.oracle import both_directions
from tests.test_benchmarks import load


@pytest.fixture
def benchmark():
    return load("attainable")


@pytest.mark.parametrize("name", ["linear", "skewed"])
def test_the_optimum_is_a_density_ratio(benchmark, monkeypatch, name: str):
    # Weak enough for a mean of exponentials to settle.
    monkeypatch.setitem(benchmark.CORRELATIONS, name, np.array([0.5, 0.3]))
    ratio = np.exp(benchmark.Cohort(name, 10, seed=5).optimal())
    # A ratio of densities has mean 1 over pairs that do not belong together ...
    assert ratio[~np.eye(len(ratio), dtype=bool)].mean() == pytest.approx(1, abs=0.02)
    # ... and its inverse over those that do.
    assert (1 / ratio.diagonal()).mean() == pytest.approx(1, abs=0.1)


def test_linear_views_have_the_correlations_that_are_said(benchmark):
    cohort = benchmark.Cohort("linear", 18_000, seed=5)
    x, y = cohort.features.values()
    found = fit_cca(x, y, n_components=32, ridge_x=0, ridge_y=0).correlations
    # 20,000 people and 640 columns: correlations of the people fitted on are a little high.
    np.testing.assert_allclose(found[:8], benchmark.CORRELATIONS["linear"][:8], atol=0.03)


def test_sufficient_statistics_are_the_latents_with_the_noise_of_their_correlation(benchmark):
    cohort = benchmark.Cohort("linear", 10, seed=5)
    x, y = cohort.sufficient.values()
    found = [np.corrcoef(a, b)[0, 1] for a, b in zip(x.T, y.T, strict=True)]
    # 1,000 people.
    np.testing.assert_allclose(found, cohort.rho, atol=0.12)
    # The features show them: nothing linear of the features beats their correlation, and a
    # regression on features that many people are there for reaches it.
    many = benchmark.Cohort("skewed", 4000, seed=5)
    rows = many.rows("test")["dna"].astype(float)
    fit = np.linalg.lstsq(rows, many.sufficient["dna"], rcond=None)[0]
    np.testing.assert_allclose(rows @ fit, many.sufficient["dna"], atol=1e-3)


def test_the_closed_form_stays_below_the_optimum_and_gets_its_row(benchmark, capsys, tmp_path):
    rows = benchmark.measure("linear", 600, 5, ["plain-rcca"])
    assert [row["method"] for row in rows] == [
        *("optimum", "plain rCCA, cosine", "plain rCCA, density ratio")
    ]
    assert rows[0]["auc_share"] == 1
    assert 0.3 < rows[1]["auc_share"] < rows[2]["auc_share"] < 1
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    benchmark.main(["--read", str(path)])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert lines[3].startswith("linear      600 plain rCCA, density ratio")


def test_people_of_the_test_split_are_those_of_the_optimum(benchmark):
    cohort = benchmark.Cohort("linear", 50, seed=5)
    optimum = both_directions(cohort.optimal())
    assert optimum["n_gallery"] == benchmark.N_TEST == len(cohort.rows("test")["dna"])
    assert 0.99 < optimum["auc"] < 1
