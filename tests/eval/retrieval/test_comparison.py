import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest
from sklearn.metrics import roc_auc_score

from brainfusion.eval.paired import compare_auroc, delong, paired_difference
from brainfusion.eval.retrieval.comparison import compare_models, compare_retrieval
from brainfusion.eval.retrieval.metrics import retrieval_metrics
from brainfusion.runtime.errors import UserError


def models(n: int, noise: tuple[float, ...], *, seed: int = 0, k: int = 6) -> list[tuple]:
    """One cohort seen by several models: each blurs the gallery by its own noise."""
    rng = np.random.default_rng(seed)
    u = rng.standard_normal((n, k))
    v = 0.5 * u + np.sqrt(0.75) * rng.standard_normal((n, k))
    return [(u, v + level * rng.standard_normal((n, k))) for level in noise]


def kernel_covariance(positive: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """DeLong's covariance by definition: every pair of a positive and a negative compared."""
    own, others = scores[:, positive, None], scores[:, None, ~positive]
    psi = (own > others) + 0.5 * (own == others)
    return np.cov(psi.mean(2)) / positive.sum() + np.cov(psi.mean(1)) / (~positive).sum()


@settings(max_examples=60, deadline=None)
@given(st.integers(4, 40), st.integers(1, 6), st.integers(0, 10**6))
def test_delong_equals_its_definition_with_ties(n, levels, seed) -> None:
    rng = np.random.default_rng(seed)
    positive = np.arange(n) % n < max(2, n // 3)
    scores = rng.integers(0, levels, (3, n)).astype(float)
    found = delong(positive, scores)
    expected = [roc_auc_score(positive, row) for row in scores]
    np.testing.assert_allclose(found.auroc, expected, atol=1e-12)
    np.testing.assert_allclose(found.covariance, kernel_covariance(positive, scores), atol=1e-12)
    assert found.n_families == n


def test_twins_of_equal_scores_add_no_certainty() -> None:
    rng = np.random.default_rng(0)
    positive, scores = rng.random(60) < 0.4, rng.standard_normal((2, 60))
    scores += positive
    alone = delong(positive, scores)
    twins = delong(np.repeat(positive, 2), np.repeat(scores, 2, axis=1), np.repeat(range(60), 2))
    np.testing.assert_allclose(twins.covariance, alone.covariance, atol=1e-12)
    naive = delong(np.repeat(positive, 2), np.repeat(scores, 2, axis=1))
    assert np.diag(naive.covariance).max() < 0.6 * np.diag(alone.covariance).min()


def test_the_standard_error_of_a_clustered_difference_is_its_spread_over_cohorts() -> None:
    differences, errors = [], []
    for seed in range(300):
        rng = np.random.default_rng(seed)
        family = np.repeat(np.arange(40), rng.integers(1, 5, 40))
        shared = rng.standard_normal((3, 40))[:, family]
        own = rng.standard_normal((3, len(family)))
        positive = shared[0] + own[0] > 0.3
        scores = positive + shared[1:] + 0.5 * own[1:]
        found = compare_auroc(positive, *scores, families=family, n_permutations=1)
        differences.append(found["difference"])
        errors.append(found["standard_error"])
    # 300 cohorts: their spread is known to 4 %.
    assert np.sqrt(np.mean(np.square(errors))) == pytest.approx(np.std(differences), rel=0.15)


def test_delong_and_swapped_ranks_agree() -> None:
    rng = np.random.default_rng(3)
    positive = np.arange(120) < 50
    first = 1.0 * positive + rng.standard_normal(120)
    for gain in (0.0, 0.25, 1.0):
        # On another scale: only ranks may count.
        second = np.exp(first + gain * positive + 0.6 * rng.standard_normal(120))
        found = compare_auroc(positive, first, second, n_permutations=2000)
        assert found["p_permutation"] == pytest.approx(found["p_value"], abs=0.06)
        turned = compare_auroc(positive, second, first, n_permutations=2000)
        assert turned["difference"] == pytest.approx(-found["difference"])
        assert turned["p_value"] == pytest.approx(found["p_value"])
    assert found["p_value"] < 0.02
    assert found["ci_high"] < 0
    assert found["variance"] == "DeLong over 120 people"
    same = compare_auroc(positive, first, first, families=np.arange(120) // 2, n_permutations=50)
    assert (same["p_value"], same["p_permutation"], same["difference"]) == (1, 1, 0)
    assert same["variance"] == "DeLong over 60 families (Obuchowski 1997)"


def test_one_sided_wins_of_few_families_have_the_exact_p_of_a_sign_test() -> None:
    # Every family better by the same: only the two patterns without a change of sign reach it.
    rows = paired_difference(np.ones(6), np.zeros(6), n_permutations=20_000, seed=1)
    assert rows[0]["p_value"] == pytest.approx(2 / 64, abs=0.005)
    both = paired_difference(np.ones(6), np.zeros(6), families=list("aabbcc"), n_permutations=9999)
    assert both[0]["p_value"] == pytest.approx(2 / 8, abs=0.02)
    assert both[0]["n_families"] == 3
    # Hits of 20 people: 9 won, 2 lost, 9 alike; the sign test's p by the binomial.
    first, second = np.r_[np.ones(9), np.zeros(11)], np.r_[np.zeros(9), np.ones(2), np.zeros(9)]
    found = paired_difference(first, second, n_permutations=20_000)[0]
    assert found["p_value"] == pytest.approx(binomtest(2, 11).pvalue, abs=0.01)


def test_the_better_of_two_retrievers_is_found_and_equals_are_not_told_apart() -> None:
    clear, blurred, also_blurred = models(250, (0.0, 1.0, 1.0), seed=1)
    rows = compare_retrieval(clear, blurred, n_permutations=999, n_bootstrap=300)
    assert [row["metric"] for row in rows[:4]] == [
        "auc",
        "recall_at_1",
        "recall_at_5",
        "recall_at_10",
    ]
    for row in rows:
        assert row["difference"] == pytest.approx(row["value_first"] - row["value_second"])
    auc = rows[0]
    assert auc["p_value"] == pytest.approx(0.001)
    assert 0 < auc["ci_low"] < auc["difference"] < auc["ci_high"]
    alone = retrieval_metrics(*clear)["query_to_gallery"]
    assert auc["value_first"] == pytest.approx(alone["auc"])
    assert rows[3]["value_first"] == pytest.approx(alone["recall_at_10"])
    equal = compare_retrieval(blurred, also_blurred, n_permutations=999, n_bootstrap=300)
    assert equal[0]["p_value"] > 0.05
    assert compare_retrieval(clear, clear, n_permutations=99)[0]["p_value"] == 1


def test_all_pairs_or_a_reference_with_rates_of_false_discovery() -> None:
    named = dict(zip("abc", models(80, (0.0, 0.5, 1.0)), strict=True))
    how = {"n_permutations": 199, "n_bootstrap": 50}
    rows = compare_models(named, **how)
    assert len(rows) == 3 * 2 * 4
    assert all(row["q_value"] >= row["p_value"] for row in rows)
    against = compare_models(named, reference="a", **how)
    assert {(row["first"], row["second"]) for row in against} == {("b", "a"), ("c", "a")}
    with pytest.raises(UserError, match="no model 'd'"):
        compare_models(named, reference="d")


def test_p_values_of_equal_retrievers_are_uniform_in_families() -> None:
    p = []
    for seed in range(150):
        rng = np.random.default_rng(seed)
        family = np.repeat(np.arange(30), 1 + np.arange(30) % 3)
        u, v = (rng.standard_normal((30, 4))[family] for _ in "uv")
        u, v = u + 0.5 * rng.standard_normal(u.shape), u + v
        noisy = [(u, v + 0.7 * rng.standard_normal((30, 4))[family]) for _ in range(2)]
        rows = compare_retrieval(
            *noisy, families=family, n_permutations=199, n_bootstrap=2, seed=seed
        )
        p.append(rows[0]["p_value"])
    # 150 uniform draws: the Kolmogorov distance stays below 0.133 with probability 0.99.
    assert np.abs(np.sort(p) - np.arange(1, 151) / 150).max() < 0.133


def test_wrong_input_is_one_clear_line() -> None:
    vectors = np.ones((4, 2))
    for call, message in (
        (lambda: compare_retrieval((vectors, vectors), (vectors, vectors[:3])), "4, 4, 4, 3"),
        (lambda: paired_difference(np.ones(3), np.ones(4)), "needs one row a person in both"),
        (lambda: delong(np.ones(3, bool), np.ones(4)), "one column a person"),
        (lambda: delong(np.array([1, 1, 1, 0], bool), np.ones(4)), "fewer than 2 families"),
        (lambda: delong(np.array([1, 1, 0, 0], bool), np.ones(4), list("aabc")), "fewer than 2"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)
