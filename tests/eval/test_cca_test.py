import numpy as np
import pytest
from sklearn import cross_decomposition

from brainfusion.data.cca import fit_cca
from brainfusion.eval.cca_permutation import _rotated, _whitened, cca_test, theil, trailing
from brainfusion.runtime.errors import UserError


def views(n: int, d: int, e: int, shared: tuple[float, ...], seed: int):
    """Two views; the first columns of both are correlated as `shared` says."""
    rng = np.random.default_rng(seed)
    x, y = rng.standard_normal((n, d)), rng.standard_normal((n, e))
    for i, rho in enumerate(shared):
        y[:, i] = rho * x[:, i] + np.sqrt(1 - rho**2) * y[:, i]
    return x @ rng.standard_normal((d, d)), y @ rng.standard_normal((e, e))


def inverse_root(matrix: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(matrix)
    return vectors / np.sqrt(values) @ vectors.T


def canonical(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Canonical correlations of plain views, from the definition."""
    whitened = inverse_root(x.T @ x) @ (x.T @ y) @ inverse_root(y.T @ y)
    return np.linalg.svd(whitened, compute_uv=False)


@pytest.mark.parametrize("statistic", ["wilks", "roy"])
@pytest.mark.parametrize(("d", "e"), [(5, 8), (8, 5), (6, 6)])
def test_all_permutations_and_components_equal_a_loop_of_refitted_ccas(d, e, statistic) -> None:
    x, y = views(60, d, e, (0.8, 0.5), 0)
    x, y = x - x.mean(axis=0), y - y.mean(axis=0)
    u, v = _rotated(_whitened(x, None, 0.0), _whitened(y, None, 0.0))
    moves = np.stack([np.random.default_rng(s).permutation(60) for s in range(5)])
    moves = np.concatenate([np.arange(60)[None], moves])
    found = trailing(u, v, moves, 3, statistic)
    for b, move in enumerate(moves):
        for k in range(3):
            # The variates of the components from k on, refitted with the pairs moved.
            r = canonical(u[:, k:], v[move][:, k:])
            expected = -np.log(1 - r**2).sum() if statistic == "wilks" else r[0]
            assert found[b, k] == pytest.approx(expected, rel=1e-4)


def test_correlations_are_those_of_scikit_learn_and_of_the_regularised_fit() -> None:
    x, y = views(200, 6, 9, (0.8, 0.5), 1)
    none = {"n_permutations": 0, "n_folds": 0}
    plain = cca_test(x, y, **none)
    variates = (
        cross_decomposition.CCA(n_components=3, max_iter=5000, tol=1e-12).fit(x, y).transform(x, y)
    )
    expected = [np.corrcoef(a, b)[0, 1] for a, b in zip(*(v.T for v in variates), strict=True)]
    np.testing.assert_allclose(plain.correlations, expected, atol=1e-5)
    ridged = cca_test(x, y, ridge=0.3, **none)
    fitted = fit_cca(x, y, n_components=3, ridge_x=0.3, ridge_y=0.3)
    np.testing.assert_allclose(ridged.correlations, fitted.correlations, atol=1e-10)
    assert np.isnan(plain.held_out).all()


def test_what_takes_the_nuisance_out_is_orthonormal_and_blind_to_it() -> None:
    rng = np.random.default_rng(2)
    z = np.column_stack([rng.standard_normal(40), np.arange(40) % 3 == 0, np.arange(40) % 3 == 1])
    kept, (q,) = theil(z, [np.eye(40)])
    assert len(kept) == 40 - 4
    np.testing.assert_allclose(q @ q.T, np.eye(36), atol=1e-9)
    np.testing.assert_allclose(q @ np.column_stack([np.ones(40), z]), 0, atol=1e-9)
    # Each row belongs to its person more than to anyone else.
    np.testing.assert_array_equal(np.abs(q[:, kept]).argmax(axis=1), np.arange(36))


def test_shared_components_are_found_and_no_more() -> None:
    x, y = views(400, 10, 14, (0.7, 0.5), 3)
    found = cca_test(x, y, n_components=4, n_permutations=199, n_held_out_permutations=49)
    np.testing.assert_allclose(found.p_family_wise[:2], 0.005)
    assert (found.p_family_wise[2:] > 0.05).all()
    assert (np.diff(found.p_family_wise) >= 0).all()
    assert found.held_out[0] == pytest.approx(0.7, abs=0.08)
    assert found.held_out[1] == pytest.approx(0.5, abs=0.12)
    assert found.correlations[0] > found.held_out[0]
    assert (found.ci_low[:2] > 0.2).all()
    assert found.ci_low[0] < 0.7 < found.ci_high[0]
    assert (found.p_held_out[:2] <= 0.04).all()
    assert found.ci_low[3] < 0.1
    rows = found.rows()
    assert rows[0]["component"] == 1
    assert rows[0].keys() >= {"correlation", "p_value", "p_family_wise", "held_out", "p_held_out"}


def null_p(seed: int, **about) -> np.ndarray:
    """p-values of two components when families and sites are alike and nothing is shared."""
    rng = np.random.default_rng(seed)
    family = rng.integers(0, 40, 60)
    site = family % 2
    x, y = (rng.standard_normal((40, 4))[family] + 0.5 * rng.standard_normal((60, 4)) for _ in "xy")
    found = cca_test(
        x, y, families=family, blocks=site, n_components=2, n_permutations=39,
        n_folds=3, n_held_out_permutations=19, n_bootstrap=0, seed=seed, **about,
    )  # fmt: skip
    return np.array([found.p_values[0], found.p_held_out[0]])


def test_p_values_of_nothing_are_uniform_with_families_and_sites() -> None:
    p = np.array([null_p(seed) for seed in range(60)]).T
    for column in p:
        # 60 uniform draws: the Kolmogorov distance stays below 0.21 with probability 0.99.
        assert np.abs(np.sort(column) - np.arange(1, 61) / 60).max() < 0.21


@pytest.mark.slow
def test_a_second_component_is_not_feigned_by_a_strong_first_one() -> None:
    p = []
    for seed in range(60):
        x, y = views(80, 4, 5, (0.8,), seed)
        p.append(cca_test(x, y, n_components=2, n_permutations=39, n_folds=0, seed=seed).p_values)
    first, second = np.array(p).T
    assert (first == 1 / 40).all()
    assert np.abs(np.sort(second) - np.arange(1, 61) / 60).max() < 0.21


def test_what_both_sides_know_only_of_the_nuisance_is_taken_out() -> None:
    rng = np.random.default_rng(5)
    age = rng.standard_normal((200, 1))
    x, y = (age + rng.standard_normal((200, 5)) for _ in "xy")
    none = {"n_permutations": 99, "n_folds": 0}
    assert cca_test(x, y, **none).p_values[0] == 0.01
    found = cca_test(x, y, nuisance=age, **none)
    assert found.p_values[0] > 0.05
    assert found.n == 198


def test_wide_views_are_tested_by_principal_components() -> None:
    rng = np.random.default_rng(6)
    z = rng.standard_normal((100, 1))
    x, y = (2 * z @ rng.standard_normal((1, 300)) + rng.standard_normal((100, 300)) for _ in "xy")
    found = cca_test(x, y, n_pcs=10, n_permutations=99, n_held_out_permutations=9)
    assert found.n_columns == (10, 10)
    assert found.p_family_wise[0] == 0.01
    assert found.held_out[0] > 0.8
    ridged = cca_test(x, y, ridge=1.0, n_permutations=19, n_folds=0)
    assert ridged.p_values[0] == 0.05


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"y": np.ones((5, 2))}, "row i of both from one person"),
        ({"x": np.ones((30, 4))}, "the same features"),
        ({"x": np.random.default_rng(0).standard_normal((30, 29))}, "give n_pcs"),
        ({"x": np.full((30, 2), np.nan)}, "x has NaN"),
        ({"nuisance": np.ones((3, 1))}, "nuisance has 3 rows for 30 people"),
        ({"ridge": -1.0}, "ridge of 0 or more"),
    ],
)
def test_wrong_input_is_one_clear_line(change, message) -> None:
    rng = np.random.default_rng(0)
    given = {"x": rng.standard_normal((30, 3)), "y": rng.standard_normal((30, 3))} | change
    with pytest.raises(UserError, match=message) as caught:
        cca_test(given.pop("x"), given.pop("y"), **given)
    assert "\n" not in str(caught.value)
