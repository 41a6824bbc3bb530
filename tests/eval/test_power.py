import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import ndtr
from scipy.stats import norm

from brainfusion.data.oracle import attainable, inner_product_form
from brainfusion.eval.power import (
    after_training,
    best_auc,
    correlation_for,
    effect_of,
    plan,
    smallest_detectable_auc,
)
from brainfusion.eval.retrieval.metrics import retrieval_metrics
from brainfusion.runtime.errors import UserError


def test_the_exact_auc_is_the_double_integral_for_one_correlation() -> None:
    grid, step = np.linspace(-6, 6, 901, retstep=True)
    u, v = grid[:, None], grid[None, :]
    for rho in (0.2, 0.7):
        # For a query u, the stranger must lie farther from u / rho than the partner does.
        centre, reach = u / rho, np.abs(v - u / rho)
        near = ndtr(centre + reach) - ndtr(centre - reach)
        weight = norm.pdf(u) * norm.pdf(v, rho * u, np.sqrt(1 - rho**2))
        assert best_auc([rho]) == pytest.approx(((1 - near) * weight).sum() * step**2, abs=3e-5)


@settings(max_examples=8, deadline=None)
@given(st.lists(st.floats(0.05, 0.9), min_size=1, max_size=6))
def test_the_exact_auc_is_what_the_oracle_attains_in_any_gallery(rho) -> None:
    for n_gallery in (7, 150):
        found = attainable(rho, n_gallery=n_gallery, n_draws=20_000, seed=1)["auc"]
        # 20,000 queries, as many as share a gallery being dependent at most as in the spread s1.
        assert best_auc(rho) == pytest.approx(found, abs=0.01)


def test_an_auc_has_its_correlation_and_no_link_has_no_effect() -> None:
    for k in (1, 5):
        assert best_auc([correlation_for(0.57, k)] * k) == pytest.approx(0.57, abs=1e-5)
    assert best_auc([]) == best_auc([0.0, 0.0]) == 0.5
    assert best_auc([0.3, 0.0]) == pytest.approx(best_auc([0.3]), abs=1e-12)
    assert best_auc([-0.3]) == pytest.approx(best_auc([0.3]), abs=1e-12)
    nothing = effect_of((0.0,))
    assert nothing.n_needed() is None
    assert nothing.power(500, 0.05) == pytest.approx(0.05)


def test_power_is_the_share_of_studies_whose_permutation_test_rejects() -> None:
    rho, n = (0.25, 0.2), 70
    known, rejected = np.array(rho), []
    for seed in range(300):
        rng = np.random.default_rng(seed)
        u = rng.standard_normal((n, len(rho)))
        v = known * u + np.sqrt(1 - known**2) * rng.standard_normal(u.shape)
        found = retrieval_metrics(*inner_product_form(u, v, known), n_permutations=99, seed=seed)
        rejected.append(found["query_to_gallery"]["p_value"] <= 0.05)
    expected = effect_of(rho).power(n)
    assert 0.5 < expected < 0.95
    # 300 studies: 2.9 points of standard error at most.
    assert np.mean(rejected) == pytest.approx(expected, abs=0.08)


def test_the_people_needed_have_the_power_asked_for() -> None:
    for rho in ((0.15,), (0.3, 0.1)):
        effect = effect_of(rho)
        for power in (0.5, 0.8, 0.95):
            n = effect.n_needed(power, alpha=0.01)
            assert n is not None
            assert effect.power(n, 0.01) >= power > effect.power(n - 2, 0.01)
    assert effect_of((0.9,) * 20).n_needed() == 10


def test_the_smallest_detectable_auc_is_where_power_is_reached() -> None:
    auc = smallest_detectable_auc(400, alpha=0.05, power=0.8)
    assert auc == pytest.approx(0.5 + 2.4865 / np.sqrt(12 * 400), abs=2e-4)
    link = correlation_for(auc)
    # The link narrows the spread a little, so power is slightly above.
    assert effect_of((link,)).power(400) == pytest.approx(0.82, abs=0.025)
    assert smallest_detectable_auc(2) == 1.0


def test_a_plan_says_what_is_attainable_beside_chance() -> None:
    found = plan([0.5, 0.5], [50, 200])
    assert [row["n"] for row in found["rows"]] == [50, 200]
    for row in found["rows"]:
        assert row["recall_at_1_chance"] == 1 / row["n"]
        assert row["recall_at_10"] > 1.5 * row["recall_at_10_chance"]
        assert row["median_rank"] < row["median_rank_chance"]
    assert found["rows"][0]["power"] < found["rows"][1]["power"]


def test_what_training_leaves_is_what_a_fit_to_drawn_people_finds() -> None:
    rho, n, p, q = np.array([0.6, 0.4]), 300, 12, 9
    left = []
    for seed in range(30):
        rng = np.random.default_rng(seed)
        x, y = rng.standard_normal((n, p)), rng.standard_normal((n, q))
        y[:, :2] = rho * x[:, :2] + np.sqrt(1 - rho**2) * y[:, :2]
        x, y = x - x.mean(0), y - y.mean(0)
        bases = [np.linalg.qr(side) for side in (x, y)]
        first, _, second = np.linalg.svd(bases[0][0].T @ bases[1][0])
        a = np.linalg.solve(bases[0][1], first[:, :2])
        b = np.linalg.solve(bases[1][1], second.T[:, :2])
        # In the population features are white: what the two planes share, by its definition.
        cross = np.zeros((p, q))
        cross[[0, 1], [0, 1]] = rho
        inner = np.linalg.inv(a.T @ a) @ (a.T @ cross @ b) @ np.linalg.inv(b.T @ b)
        squares = np.linalg.eigvals(inner @ (b.T @ cross.T @ a))
        left.append(np.sqrt(np.sort(squares.real)[::-1]))
    found = after_training(rho, n, (p, q), n_repeats=60)
    np.testing.assert_allclose(found, np.mean(left, axis=0), atol=0.02)
    assert (found < rho).all()
    np.testing.assert_allclose(after_training(rho, 10**6, (p, q)), rho, atol=1e-3)


def test_wrong_input_is_one_clear_line() -> None:
    for call, message in (
        (lambda: best_auc([1.0]), "strictly between -1 and 1"),
        (lambda: correlation_for(0.5), "between 0.5 .chance. and 1"),
        (lambda: correlation_for(0.99999), "give more components"),
        (lambda: plan([0.2], [1]), "2 people or more"),
        (lambda: smallest_detectable_auc(50, alpha=1.0), "alpha=1.0"),
        (lambda: after_training([0.2, 0.2], 100, (1, 5)), "cannot carry 2"),
        (lambda: after_training([0.2], 100, (60, 60)), r"reduce them \(PCA\) below 100"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)
