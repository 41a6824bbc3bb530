import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from brainfusion.data.oracle import attainable, inner_product_form
from brainfusion.data.recordings import Recordings, RecordingWriter
from brainfusion.eval.baselines import (
    RidgeCCA,
    baseline_rows,
    connectome,
    covariate_scores,
    fill_missing,
    held_out_correlations,
)
from brainfusion.eval.retrieval.metrics import metrics_from_scores, retrieval_metrics
from brainfusion.runtime.errors import UserError


def paired(n: int, rho: np.ndarray, *, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Brain [n, 60] and DNA [n, 90] with these canonical correlations, turned at random.

    Unshared directions have more variance than the shared ones, as in real data.
    """
    rng = np.random.default_rng(seed)
    k = len(rho)
    u = rng.standard_normal((n, k))
    v = rho * u + np.sqrt(1 - rho**2) * rng.standard_normal((n, k))
    sides = []
    for shared, width in ((u, 60), (v, 90)):
        own = rng.standard_normal((n, width - k)) * np.arange(1, width - k + 1) ** -0.4
        turn = np.linalg.qr(rng.standard_normal((width, width)))[0]
        sides.append(np.concatenate([0.5 * shared, own], axis=1) @ turn)
    return sides[0], sides[1]


def split(n: int) -> list[str]:
    return (
        ["train"] * (n * 6 // 10)
        + ["validation"] * (n // 5)
        + ["test"] * (n - n * 6 // 10 - n // 5)
    )


def test_connectome_is_fisher_z_of_correlations_with_missing_parcels_nan(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    first, second = rng.standard_normal((4, 30)) + 100, rng.standard_normal((4, 50))
    second[2] = np.nan
    second[0] = 7.3
    with RecordingWriter(tmp_path, n_parcels=4) as writer:
        for i, bold in enumerate((first, second)):
            writer.add(bold, recording=f"r{i}", subject=f"s{i}", tr_s=2.0)
    found = connectome(Recordings.open(tmp_path), [1, 0])
    expected = np.arctanh(np.corrcoef(first)[np.triu_indices(4, 1)])
    # float32 BOLD around 100 keeps 5 digits of its variation.
    np.testing.assert_allclose(found[1], expected, atol=1e-4)
    # Pairs: 01 02 03 12 13 23; parcel 0 is constant, parcel 2 missing.
    np.testing.assert_array_equal(np.isnan(found[0]), [1, 1, 1, 1, 0, 1])
    np.testing.assert_allclose(
        found[0, 4], np.arctanh(np.corrcoef(second[[1, 3]])[0, 1]), atol=1e-5
    )


def test_missing_values_become_the_mean_of_the_training_people() -> None:
    values = np.array([[1.0, np.nan], [3.0, np.nan], [np.nan, 5.0], [100.0, 6.0]], np.float32)
    filled = fill_missing(values, np.array([True, True, False, False]))
    np.testing.assert_array_equal(filled, [[1, 0], [3, 0], [2, 0], [100, 0]])


def test_ridge_cca_comes_near_the_oracle_and_never_above_it() -> None:
    rho = np.array([0.9, 0.8, 0.7, 0.6])
    x, y = paired(2000, rho)
    model = RidgeCCA().fit(x[:1200], y[:1200], x[1200:1600], y[1200:1600])
    found = metrics_from_scores(model.scores(x[1600:], y[1600:]), n_bootstrap=200)
    oracle = attainable(rho, n_gallery=400)["auc"]
    for direction in found.values():
        assert (direction["auc"] - 0.5) / (oracle - 0.5) > 0.95
        assert direction["auc"] < oracle + 3 * direction["standard_error"]
    np.testing.assert_allclose(model.rho_[:4], rho, atol=0.1)
    assert (model.rho_[4:] < 0.2).all()


def test_density_ratio_finds_more_than_the_cosine_of_the_same_variates() -> None:
    x, y = paired(1500, np.linspace(0.85, 0.15, 10))
    model = RidgeCCA(n_components=[32]).fit(x[:900], y[:900], x[900:1200], y[900:1200])
    u, v = model.embed(x[1200:], y[1200:])
    cosine = retrieval_metrics(*(z / np.linalg.norm(z, axis=1, keepdims=True) for z in (u, v)))
    ratio = metrics_from_scores(model.scores(x[1200:], y[1200:]))
    indexed = retrieval_metrics(*inner_product_form(u, v, model.rho_))
    for name in ("auc", "recall_at_1"):
        assert ratio["query_to_gallery"][name] > cosine["query_to_gallery"][name]
    assert indexed["query_to_gallery"]["auc"] == pytest.approx(
        ratio["query_to_gallery"]["auc"], abs=1e-4
    )


def test_rho_is_not_that_of_the_training_people() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((200, 80)), rng.standard_normal((200, 80))
    model = RidgeCCA().fit(x[:140], y[:140], x[140:], y[140:])
    # In 140 people 80 + 80 unrelated columns correlate above 0.9.
    assert model.rho_.max() < 0.6


def test_held_out_correlations_fall_and_chance_is_taken_out() -> None:
    rng = np.random.default_rng(1)
    rho = np.array([0.9, 0.6, 0.3, 0.0, 0.0])
    u = rng.standard_normal((4000, 5))
    v = rho * u + np.sqrt(1 - rho**2) * rng.standard_normal((4000, 5))
    found = held_out_correlations(u, v)
    np.testing.assert_allclose(found, np.maximum(rho, 0.02), atol=0.05)
    assert (np.diff(found) <= 0).all()
    noise = [held_out_correlations(*rng.standard_normal((2, 100, 8))).mean() for _ in range(50)]
    # |r| of 100 unrelated pairs is 0.08 in the mean.
    assert np.mean(noise) < 0.05


def test_wide_views_with_few_people_are_fitted_through_the_small_gram() -> None:
    rng = np.random.default_rng(2)
    shared = rng.standard_normal((120, 2))
    x = shared @ rng.standard_normal((2, 3000)) + rng.standard_normal((120, 3000))
    y = shared @ rng.standard_normal((2, 500)) + rng.standard_normal((120, 500))
    model = RidgeCCA().fit(x[:60], y[:60], x[60:90], y[60:90])
    found = metrics_from_scores(model.scores(x[90:], y[90:]))
    assert found["query_to_gallery"]["auc"] > 0.9


def test_baselines_find_a_coupling_and_nothing_in_shuffled_pairs() -> None:
    rng = np.random.default_rng(3)
    brain, dna = paired(600, np.full(6, 0.8))
    connectomes = (brain @ rng.standard_normal((60, 200))).astype(np.float32)
    connectomes[::7, 3] = np.nan
    about = {"labels": split(600), "n_permutations": 99, "n_bootstrap": 100}
    views = {"encoder features": brain, "connectome (Pearson FC, PCA)": connectomes}
    rows = baseline_rows(views, dna, **about)
    assert [row["name"] for row in rows] == [
        "ridge-CCA, encoder features",
        "ridge-CCA, connectome (Pearson FC, PCA)",
    ]
    for row in rows:
        assert row["auc"] > 0.85
        assert row["p_value"] == row["p_value_dna_to_brain"] == 0.01
        assert row["ci_low"] < row["auc"] < row["ci_high"]
        assert (row["n_gallery"], row["recall_at_10_chance"]) == (120, pytest.approx(10 / 120))
    (control,) = baseline_rows({"brain": brain}, rng.permutation(dna), **about)
    assert abs(control["auc"] - 0.5) < 3 * control["standard_error"]


def test_covariates_alone_find_people_only_by_what_both_modalities_predict() -> None:
    rng = np.random.default_rng(4)
    covariates = rng.standard_normal((500, 3))
    labels = split(500)
    seen = [
        covariates @ rng.standard_normal((3, 20)) + 0.3 * rng.standard_normal((500, 20))
        for _ in range(2)
    ]
    found = metrics_from_scores(covariate_scores(*seen, covariates, labels))
    assert found["query_to_gallery"]["auc"] > 0.9
    # Strongly coupled modalities that know nothing of the covariates score chance.
    brain, dna = paired(500, np.full(6, 0.9))
    other = metrics_from_scores(covariate_scores(brain, dna, covariates, labels), n_bootstrap=100)
    found = other["query_to_gallery"]
    assert abs(found["auc"] - 0.5) <= 3 * found["standard_error"] + 1e-9


def test_too_few_validation_people_and_constant_features_are_errors() -> None:
    x, y = paired(40, np.array([0.5]))
    with pytest.raises(UserError, match="2 validation people"):
        RidgeCCA().fit(x[:30], y[:30], x[30:32], y[30:32])
    with pytest.raises(UserError, match="same features"):
        RidgeCCA().fit(np.ones((30, 4)), y[:30], np.ones((10, 4)), y[30:])
    with pytest.raises(UserError, match="pairs"):
        RidgeCCA().fit(x[:30], y[:29], x[30:], y[30:])


def test_evaluation_loads_nothing_heavy_before_it_is_used() -> None:
    modules = [
        "retrieval.index",
        "retrieval.metrics",
        "retrieval.ranking",
        "statistics",
        "probing.probes",
        "probing.linear",
        "design",
        "baselines",
    ]
    code = (
        f"import sys, brainfusion.eval, {', '.join('brainfusion.eval.' + m for m in modules)}\n"
        "heavy = {'torch', 'sklearn', 'faiss', 'pandas', 'scipy.stats', 'matplotlib'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
        "from brainfusion.eval import RetrievalIndex, probe, retrieval_metrics\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
