"""What a linear-Gaussian model attains: against the exact oracle, and nothing from nothing."""

import numpy as np
import pytest

from brainfusion.data.oracle import attainable
from brainfusion.eval.attainable import (
    attainable_linear,
    cross_fit,
    expected_auc,
    share_of_attainable,
)
from brainfusion.runtime.errors import UserError
from tests.eval.test_baselines import paired


@pytest.mark.parametrize("rho", [[0.0], [0.3], [0.3] * 20, [0.9, 0.5, 0.1]])
def test_the_expected_auc_is_that_of_the_oracle(rho):
    # The oracle's own Monte Carlo has a standard error of about 0.29 / sqrt(20,000) = 0.002.
    expected = attainable(rho, n_gallery=1000, n_draws=20_000)["auc"]
    assert expected_auc(np.array(rho), n_draws=20_000) == pytest.approx(expected, abs=0.006)


def test_no_correlation_attains_exactly_one_half():
    assert expected_auc(np.zeros(3)) == 0.5
    # Smooth near it, where drawn wins and losses would be half a percent off.
    assert 0.5 < expected_auc(np.array([0.01])) < 0.503


def test_with_many_people_the_estimate_is_the_oracles():
    rho = np.array([0.9, 0.8, 0.7, 0.6])
    found = attainable_linear(*paired(2500, rho), n_gallery=400, n_bootstrap=50)
    oracle = attainable(rho, n_gallery=400, n_draws=20_000)
    assert found["correlations"][:4] == pytest.approx(rho, abs=0.05)
    assert all(value < 0.1 for value in found["correlations"][4:])
    assert found["ci_low"] < found["auc"] < found["ci_high"]
    # Learnt directions fall a little short of the true ones, and never beyond them.
    assert oracle["auc"] - 0.015 < found["auc"] < oracle["auc"] + 0.005
    assert found["recall_at_10"] == pytest.approx(oracle["recall_at_10"], rel=0.15)
    assert found["recall_at_1_low"] <= found["recall_at_1_high"]
    assert (found["n_pairs"], found["n_gallery"]) == (2500, 400)
    assert found["p_value"] < 1e-10


def test_fewer_people_attain_less_of_the_same_link():
    rho = np.array([0.6, 0.5])
    many, few = (
        attainable_linear(*paired(n, rho), n_gallery=200, n_bootstrap=50)["auc"]
        for n in (2000, 250)
    )
    assert 0.5 < few < many - 0.02


def test_null_cohorts_attain_one_half_and_say_how_much_they_may_hide():
    found = [
        attainable_linear(*paired(300, np.zeros(1), seed=s), n_gallery=60, n_bootstrap=20, seed=s)
        for s in range(4)
    ]
    # At 5% a cohort, two of four above 0.5 would be a chance of 1.4%.
    assert sum(row["auc"] > 0.5 for row in found) <= 1
    for row in (row for row in found if row["auc"] == 0.5):
        assert row["ci_low"] == 0.5
        assert 0.5 <= row["ci_high"] < 0.6
        assert row["recall_at_1"] == pytest.approx(1 / 60)
        assert row["correlations"] == []
        assert row["information_nats"] == 0.0


def test_a_link_through_a_covariate_goes_with_the_covariate():
    x, y = paired(400, np.zeros(1))
    site = np.random.default_rng(1).integers(0, 3, 400)
    levels = np.eye(3)[site]
    x[:, :2] += 3 * levels[:, :2]
    y[:, :2] += 3 * levels[:, :2]
    naive, controlled = (
        attainable_linear(x, y, n_gallery=100, n_bootstrap=20, covariates=covariates)
        for covariates in (None, levels)
    )
    assert naive["auc"] > 0.6
    assert controlled["auc"] == 0.5


def test_nobody_is_looked_at_by_a_fit_that_saw_their_family():
    # Siblings have the same own part in both tables: a fit that has seen one knows the other.
    rng = np.random.default_rng(0)
    family = np.repeat(np.arange(100), 4)
    own = rng.standard_normal((100, 200))[family]
    x, y = (own[:, half] + 0.1 * rng.standard_normal((400, 100)) for half in (
        slice(0, 100), slice(100, 200)
    ))  # fmt: skip
    torn = attainable_linear(x, y, n_gallery=80, n_bootstrap=20)
    whole = attainable_linear(x, y, n_gallery=80, n_bootstrap=20, families=family)
    assert torn["auc"] > 0.6
    assert whole["auc"] == 0.5


def test_everyone_is_held_out_once_and_standardised_in_their_fold():
    rho = np.array([0.8, 0.7])
    held_out = cross_fit(*paired(420, rho), np.arange(420))
    assert held_out.u.shape == held_out.v.shape == held_out.weight.shape
    assert (held_out.u[:, 0] != 0).all()
    assert np.square(held_out.u[:, 0]).mean() == pytest.approx(1.0)
    assert (held_out.u[:, 0] * held_out.v[:, 0]).mean() > 0.6


@pytest.mark.slow
def test_the_interval_covers_what_fits_of_as_many_people_attain():
    rho = np.array([0.6, 0.4])
    rows = [
        attainable_linear(*paired(350, rho, seed=s), n_gallery=70, n_bootstrap=100, seed=s)
        for s in range(20)
    ]
    truth = np.mean([row["auc"] for row in rows])
    covered = [row["ci_low"] <= truth <= row["ci_high"] for row in rows]
    # The spread between cohorts is about that of the intervals: 19 of 20 in the long run.
    assert sum(covered) >= 16
    spread = np.std([row["auc"] for row in rows], ddof=1)
    width = np.mean([row["ci_high"] - row["ci_low"] for row in rows]) / (2 * 1.96)
    assert 0.4 < width / spread < 2.5


def test_the_same_seed_gives_the_same_figures():
    x, y = paired(200, np.array([0.8]))
    first, again = (attainable_linear(x, y, n_gallery=40, n_bootstrap=20, seed=3) for _ in "ab")
    assert first == again


def test_the_share_is_of_the_way_from_chance():
    assert share_of_attainable(0.6, 0.7) == pytest.approx(0.5)
    assert np.isnan(share_of_attainable(0.6, 0.5))


def test_bad_input_is_refused_in_one_line():
    x, y = paired(200, np.array([0.5]))
    with pytest.raises(UserError, match="the same 70 people or more"):
        attainable_linear(x[:50], y[:50], n_gallery=10)
    with pytest.raises(UserError, match="to fit on, choose with, look at"):
        attainable_linear(x, y, n_gallery=10, n_folds=2)
    with pytest.raises(UserError, match="5 families for 7 folds"):
        attainable_linear(x, y, n_gallery=10, families=np.arange(200) % 5)
    with pytest.raises(UserError, match="all people have the same features"):
        attainable_linear(np.ones_like(x), y, n_gallery=10)
