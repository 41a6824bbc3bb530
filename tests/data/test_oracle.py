"""The oracle against closed forms, brute force and the published table of what is attainable."""

import numpy as np
import pytest

from brainfusion.data import oracle
from brainfusion.runtime.errors import UserError

RHO = np.array([0.85, 0.5, 0.2, 0.0, -0.3])


def draw_pairs(n: int, rho: np.ndarray, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    u = rng.standard_normal((n, len(rho)))
    return u, rho * u + np.sqrt(1 - rho**2) * rng.standard_normal(u.shape)


def test_pmi_is_the_log_density_ratio_of_the_joint_normal():
    from scipy.stats import multivariate_normal

    u, v = draw_pairs(7, RHO)
    k = len(RHO)
    joint = np.block([[np.eye(k), np.diag(RHO)], [np.diag(RHO), np.eye(k)]])
    pairs = np.concatenate([np.repeat(u, 7, axis=0), np.tile(v, (7, 1))], axis=1)
    expected = multivariate_normal(np.zeros(2 * k), joint).logpdf(pairs)
    for side in (pairs[:, :k], pairs[:, k:]):
        expected = expected - multivariate_normal(np.zeros(k), np.eye(k)).logpdf(side)
    # Two float64 evaluations of one formula.
    np.testing.assert_allclose(oracle.pmi_scores(u, v, RHO).ravel(), expected, atol=1e-8)


@pytest.mark.parametrize("swap", [False, True])
def test_inner_products_rank_as_the_density_ratio_does(swap: bool):
    u, v = draw_pairs(60, RHO)
    if swap:
        u, v = v, u
    queries, gallery = oracle.inner_product_form(u, v, RHO)
    scores = oracle.pmi_scores(u, v, RHO)
    np.testing.assert_array_equal(
        np.argsort(queries @ gallery.T, axis=1), np.argsort(scores, axis=1)
    )


def test_mean_score_over_pairs_is_the_mutual_information():
    rho = RHO[:3]
    u, v = draw_pairs(40_000, rho)
    scores = [
        oracle.pmi_scores(u[i : i + 400], v[i : i + 400], rho).diagonal()
        for i in range(0, len(u), 400)
    ]
    values = np.concatenate(scores)
    error = values.std() / np.sqrt(len(values))
    assert abs(values.mean() - oracle.mutual_information(rho)) < 4 * error
    assert oracle.mutual_information([0.3] * 10) == pytest.approx(0.472, abs=1e-3)


@pytest.mark.parametrize(
    ("rho", "auc", "recall_at_1", "recall_at_10", "median_rank"),
    [
        ([0.5], 0.618, 0.0023, 0.0220, 343),
        ([0.3] * 10, 0.752, 0.0131, 0.0787, 173),
        ([0.5] * 10, 0.887, 0.0549, 0.2368, 51),
        ([0.5] * 20, 0.957, 0.1895, 0.5106, 10),
    ],
)
def test_attainable_agrees_with_the_table(rho, auc, recall_at_1, recall_at_10, median_rank):
    got = oracle.attainable(rho, n_gallery=1000, n_draws=4000)
    # 4,000 queries: the standard error of an AUC is at most 0.29 / 63 = 0.005, and the table has
    # an error of its own.
    assert got["auc"] == pytest.approx(auc, abs=0.012)
    for key, expected in (("recall_at_1", recall_at_1), ("recall_at_10", recall_at_10)):
        assert got[key] == pytest.approx(expected, abs=5 * np.sqrt(expected / 4000))
    assert got["median_rank"] == pytest.approx(median_rank, rel=0.15)


def test_attainable_without_correlation_is_exactly_chance():
    got = oracle.attainable([0.0, 0.0], n_gallery=50)
    assert got == {
        "auc": 0.5,
        "recall_at_1": 0.02,
        "recall_at_5": 0.1,
        "recall_at_10": 0.2,
        "median_rank": 25.5,
    }


def test_cosine_of_true_variates_does_not_beat_the_oracle():
    rho = np.array([0.9, 0.5, 0.2, 0.1])
    u, v = draw_pairs(800, rho)
    best = oracle.matched_pair_metrics(oracle.pmi_scores(u, v, rho))

    def unit(x: np.ndarray) -> np.ndarray:
        return x / np.linalg.norm(x, axis=1, keepdims=True)

    cosine = oracle.matched_pair_metrics(unit(u) @ unit(v).T)
    assert cosine["auc"] < best["auc"] - 0.02
    oracle.check_below_oracle(
        cosine["auc"], standard_error=cosine["standard_error"], oracle_auc=best["auc"]
    )


def test_metrics_match_brute_force_with_ties():
    rng = np.random.default_rng(3)
    scores = rng.integers(0, 4, (30, 30)).astype(float)
    auc, recall = [], []
    for i, row in enumerate(scores):
        others = np.delete(row, i)
        auc.append(np.mean((others < row[i]) + 0.5 * (others == row[i])))
        # Every order of the tied entries is as likely as any other.
        n_better, n_tied = (others > row[i]).sum(), (others == row[i]).sum()
        recall.append(np.mean([n_better + place < 5 for place in range(n_tied + 1)]))
    got = oracle.matched_pair_metrics(scores)
    assert got["auc"] == pytest.approx(np.mean(auc))
    assert got["recall_at_5"] == pytest.approx(np.mean(recall))


def test_constant_scores_are_at_chance():
    got = oracle.both_directions(np.zeros((20, 20)))
    expected = pytest.approx((0.5, 0.05, 10.5))
    assert (got["auc"], got["recall_at_1"], got["median_rank"]) == expected


def test_learner_above_its_oracle_is_a_bug():
    oracle.check_below_oracle(0.82, standard_error=0.01, oracle_auc=0.80)
    with pytest.raises(AssertionError, match="bug or a leak"):
        oracle.check_below_oracle(0.84, standard_error=0.01, oracle_auc=0.80)
    with pytest.raises(AssertionError, match="bug or a leak"):
        oracle.check_below_oracle(float("nan"), standard_error=0.01, oracle_auc=0.80)


def test_impossible_input_is_refused():
    with pytest.raises(UserError, match="strictly between -1 and 1"):
        oracle.mutual_information([1.0])
    with pytest.raises(UserError, match="expected \\[n, k\\]"):
        oracle.pmi_scores(np.zeros((2, 3)), np.zeros((2, 2)), [0.1, 0.2])
    with pytest.raises(UserError, match="square matrix"):
        oracle.matched_pair_metrics(np.zeros((2, 3)))
    with pytest.raises(UserError, match="2 people or more"):
        oracle.attainable([0.5], n_gallery=1)
