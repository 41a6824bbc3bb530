"""Ridge CCA against the generalised eigenproblem, scikit-learn and planted correlations."""

import numpy as np
import pytest
from scipy.linalg import block_diag, eigh

from brainfusion.data.cca import fit_cca
from brainfusion.data.cca_choice import (
    choose_cca,
    cross_validated_cca,
    fold_of,
    held_out_correlations,
    information,
)
from brainfusion.data.oracle import mutual_information, pmi_scores
from brainfusion.runtime.errors import UserError


def paired(
    n: int, rho: np.ndarray, *, widths: tuple[int, int] = (12, 9), seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Two views with these canonical correlations, turned at random; large unshared directions."""
    rng = np.random.default_rng(seed)
    u = rng.standard_normal((n, len(rho)))
    v = rho * u + np.sqrt(1 - rho**2) * rng.standard_normal(u.shape)
    sides = []
    for shared, width in ((u, widths[0]), (v, widths[1])):
        own = 3 * rng.standard_normal((n, width - len(rho)))
        turn = np.linalg.qr(rng.standard_normal((width, width)))[0]
        sides.append(np.concatenate([shared, own], axis=1) @ turn + 5)
    return sides[0], sides[1]


def brute_force(x: np.ndarray, y: np.ndarray, ridges: tuple[float, float]):
    """Regularised correlations and directions from the eigenproblem of both views at once."""
    x, y = x - x.mean(0), y - y.mean(0)
    n, d, e = len(x), x.shape[1], y.shape[1]
    sxx, syy, sxy = x.T @ x / n, y.T @ y / n, x.T @ y / n
    sxx = sxx + ridges[0] * np.trace(sxx) / d * np.eye(d)
    syy = syy + ridges[1] * np.trace(syy) / e * np.eye(e)
    zeros_x, zeros_y = np.zeros((d, d)), np.zeros((e, e))
    cross = np.block([[zeros_x, sxy], [sxy.T, zeros_y]])
    values, vectors = eigh(cross, block_diag(sxx, syy))
    return values[::-1], vectors[:d, ::-1], vectors[d:, ::-1]


def parallel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Cosine of matching columns, without sign."""
    return np.abs((a * b).sum(0)) / np.linalg.norm(a, axis=0) / np.linalg.norm(b, axis=0)


@pytest.mark.parametrize("ridges", [(0.0, 0.0), (0.3, 0.02), (5.0, 1.0)])
@pytest.mark.parametrize("widths", [(12, 9), (9, 12)])
def test_directions_solve_the_generalised_eigenproblem(ridges, widths):
    x, y = paired(80, np.array([0.9, 0.6, 0.4]), widths=widths)
    cca = fit_cca(x, y, n_components=5, ridge_x=ridges[0], ridge_y=ridges[1])
    _, a, b = brute_force(x, y, ridges)
    np.testing.assert_allclose(parallel(cca.weights_x, a[:, :5]), 1, atol=1e-9)
    np.testing.assert_allclose(parallel(cca.weights_y, b[:, :5]), 1, atol=1e-9)


def test_more_columns_than_people_give_the_same_directions():
    x, y = paired(40, np.array([0.9, 0.6]), widths=(70, 55))
    cca = fit_cca(x, y, n_components=4, ridge_x=0.2, ridge_y=0.1)
    _, a, b = brute_force(x, y, (0.2, 0.1))
    np.testing.assert_allclose(parallel(cca.weights_x, a[:, :4]), 1, atol=1e-8)
    np.testing.assert_allclose(parallel(cca.weights_y, b[:, :4]), 1, atol=1e-8)


def test_without_ridge_it_is_the_cca_of_scikit_learn():
    from sklearn import cross_decomposition

    x, y = paired(300, np.array([0.9, 0.6, 0.4]))
    ours = fit_cca(x, y, n_components=3, ridge_x=0, ridge_y=0)
    theirs = cross_decomposition.CCA(n_components=3, max_iter=5000, tol=1e-12)
    u, v = theirs.fit(x, y).transform(x, y)
    expected = [np.corrcoef(u[:, i], v[:, i])[0, 1] for i in range(3)]
    # Theirs is a power iteration.
    np.testing.assert_allclose(ours.correlations, expected, atol=1e-5)
    np.testing.assert_allclose(parallel(ours.variates_x(x), u), 1, atol=1e-5)


def test_variates_have_unit_variance_and_the_correlations_that_are_said():
    x, y = paired(100, np.array([0.8, 0.5]))
    cca = fit_cca(x, y, n_components=4, ridge_x=0.5, ridge_y=0.1)
    u, v = cca.variates_x(x), cca.variates_y(y)
    np.testing.assert_allclose(u.mean(0), 0, atol=1e-12)
    np.testing.assert_allclose([u.std(0), v.std(0)], 1)
    found = [np.corrcoef(u[:, i], v[:, i])[0, 1] for i in range(4)]
    np.testing.assert_allclose(found, cca.correlations, atol=1e-12)


@pytest.mark.parametrize("how", ["validation", "folds"])
def test_planted_correlations_are_found_in_held_out_people(how):
    rho = np.array([0.9, 0.7, 0.5])
    x, y = paired(3000, rho, widths=(40, 30))
    if how == "validation":
        cca, found = choose_cca(x[:2000], y[:2000], x[2000:], y[2000:])
    else:
        cca, found = cross_validated_cca(x[:2000], y[:2000], folds=fold_of(2000))
    # 1,000 people: a correlation of 0.5 has a standard error of 0.024.
    np.testing.assert_allclose(found[:3], rho, atol=0.09)
    assert (found[3:] < 0.1).all()
    assert cca.weights_x.shape == (40, len(found))


def test_a_noisy_view_gets_ridge_and_beats_plain_cca():
    rho = np.linspace(0.8, 0.3, 6)
    x, y = paired(2300, rho, widths=(20, 20), seed=1)
    # Directions of hardly any variance: fitting them takes people and gives nothing.
    rng = np.random.default_rng(2)
    x, y = (np.concatenate([s, 0.05 * rng.standard_normal((2300, 100))], axis=1) for s in (x, y))
    parts = slice(0, 300), slice(300, 1300), slice(1300, 2300)
    train, val, test = ((x[part], y[part]) for part in parts)
    chosen, _ = choose_cca(*train, *val)
    plain, _ = choose_cca(*train, *val, ridges=(0.0,))
    assert max(chosen.ridge_x, chosen.ridge_y) > 0
    gains = [information(c.variates_x(test[0]), c.variates_y(test[1])) for c in (chosen, plain)]
    assert gains[0] > gains[1] + 0.05
    assert gains[0] < mutual_information(rho)


def test_shuffled_pairs_share_no_information():
    x, y = paired(600, np.array([0.9, 0.7]), widths=(40, 30))
    y = y[np.random.default_rng(4).permutation(600)]
    _, found = choose_cca(x[:300], y[:300], x[300:450], y[300:450])
    assert (found < 0.2).all()
    fit = fit_cca(x[:300], y[:300], n_components=8, ridge_x=0.1, ridge_y=0.1)
    assert fit.correlations[0] > 0.3
    assert information(fit.variates_x(x[300:]), fit.variates_y(y[300:])) < 0.02


def test_information_is_the_mean_score_of_pairs():
    rho = np.array([0.8, 0.5, 0.2])
    rng = np.random.default_rng(0)
    u = rng.standard_normal((40_000, 3))
    v = rho * u + np.sqrt(1 - rho**2) * rng.standard_normal(u.shape)
    got = information(3 * u + 1, v / 7)
    scores = [
        pmi_scores(u[i : i + 400], v[i : i + 400], rho).diagonal() for i in range(0, 40_000, 400)
    ]
    # Both have the same draws: only the estimates of means, variances and rho differ.
    assert got == pytest.approx(np.mean(scores), abs=2e-3)


def test_held_out_correlations_take_chance_out_and_fall():
    rng = np.random.default_rng(1)
    u, v = rng.standard_normal((2, 50, 200))
    found = held_out_correlations(u, v)
    # Raw squares are 1/50 in the mean.
    assert (found**2).mean() < 0.5 / 50
    assert (np.diff(found) <= 0).all()
    assert held_out_correlations(u, u).max() < 1


def test_the_choice_can_be_made_again_bit_for_bit():
    x, y = paired(300, np.array([0.8, 0.5]))
    first, second = (choose_cca(x[:200], y[:200], x[200:], y[200:])[0] for _ in range(2))
    np.testing.assert_array_equal(first.weights_x, second.weights_x)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda x, y: (x[:5], y), "row i of both from one person"),
        (lambda x, y: (x * 0, y), "the same features"),
    ],
)
def test_what_cannot_be_fitted_is_said(change, says):
    x, y = change(*paired(20, np.array([0.5])))
    with pytest.raises(UserError, match=says):
        fit_cca(x, y, n_components=1, ridge_x=0, ridge_y=0)


def test_too_few_people_to_choose_with_are_refused():
    x, y = paired(20, np.array([0.5]))
    with pytest.raises(UserError, match="4 pairs or more"):
        choose_cca(x, y, x[:3], y[:3])
    with pytest.raises(UserError, match="one component or more"):
        fit_cca(x, y, n_components=1, ridge_x=-1, ridge_y=0)


def test_folds_are_even_and_keep_groups_together():
    assert np.ptp(np.bincount(fold_of(103))) <= 1
    assert fold_of(8).max() == 1
    groups = np.random.default_rng(0).integers(50, 90, 400)
    folds = fold_of(400, groups=groups)
    assert {len(np.unique(folds[groups == g])) for g in np.unique(groups)} == {1}
    assert len(np.unique(folds)) == 5
