"""Multiset CCA against ridge CCA of two views, planted latents, and its own leak."""

import numpy as np
import pytest

from brainfusion.data.cca import fit_cca
from brainfusion.data.cca_choice import fold_of
from brainfusion.data.multiset_cca import fit_multiset, out_of_fold
from brainfusion.runtime.errors import UserError

RHO = np.array([0.8, 0.6, 0.5])


def views(n: int, n_views: int, *, width: int = 20, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    z = rng.standard_normal((n, len(RHO)))
    found = []
    for number in range(n_views):
        shared = np.sqrt(RHO) * z + np.sqrt(1 - RHO) * rng.standard_normal(z.shape)
        own = rng.standard_normal((n, width - len(RHO)))
        turn = np.linalg.qr(np.random.default_rng(number).standard_normal((width, width)))[0]
        found.append(np.concatenate([shared, own], axis=1) @ turn + number)
    return found


def correlation(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.array([np.corrcoef(a, b)[0, 1] for a, b in zip(u.T, v.T, strict=True)])


def everyone(parts: list[np.ndarray]) -> list[np.ndarray]:
    return [np.ones(len(part), dtype=bool) for part in parts]


@pytest.mark.parametrize(("n", "width"), [(300, 20), (40, 60)])
def test_of_two_views_it_is_ridge_cca(n: int, width: int):
    x, y = views(n, 2, width=width)
    cca = fit_cca(x, y, n_components=5, ridge_x=0.3, ridge_y=0.05)
    first, second = fit_multiset(
        [x, y], everyone([x, y]), ridges=(0.3, 0.05), n_components=5
    )  # fmt: skip
    np.testing.assert_allclose(
        np.abs(correlation(first.variates(x), cca.variates_x(x))), 1, atol=1e-8
    )
    np.testing.assert_allclose(
        correlation(first.variates(x), second.variates(y)), cca.correlations, atol=1e-8
    )
    np.testing.assert_allclose(first.variates(x).std(0), 1)


def test_views_that_nobody_has_both_of_meet_through_a_third():
    parts = views(4000, 3)
    third = np.arange(4000) % 2 == 0
    present = [third, ~third, np.ones(4000, dtype=bool)]
    fitted = fit_multiset(parts, present, ridges=(0.01,) * 3, n_components=3)
    new = [d.variates(v) for d, v in zip(fitted, views(4000, 3, seed=1), strict=True)]
    # 2,000 people a pair: the directions themselves are a little off.
    np.testing.assert_allclose(correlation(new[0], new[1]), RHO, atol=0.06)


def test_views_without_a_chain_of_people_are_refused():
    parts = views(40, 3)
    half = np.arange(40) < 20
    with pytest.raises(UserError, match="share nobody"):
        fit_multiset(parts, [half, half, ~half], ridges=(0.1,) * 3, n_components=2)


@pytest.mark.parametrize("shuffled", [False, True])
def test_out_of_fold_variates_are_as_alike_as_those_of_new_people(shuffled: bool):
    x, y = views(300, 2, width=80)
    new = views(3000, 2, width=80, seed=1)
    if shuffled:
        y = y[np.random.default_rng(2).permutation(300)]
        new[1] = new[1][np.random.default_rng(3).permutation(3000)]
    ridges = (0.3, 0.3)
    fitted = fit_multiset([x, y], everyone([x, y]), ridges=ridges, n_components=30)
    held_out = out_of_fold(
        [x, y], everyone([x, y]), fitted, ridges=ridges, folds=fold_of(300, n_folds=10)
    )
    seen = correlation(fitted[0].variates(x), fitted[1].variates(y))
    true = correlation(*(d.variates(v) for d, v in zip(fitted, new, strict=True)))
    found = correlation(*held_out)
    assert seen.mean() > true.mean() + 0.2
    # The mean of 30 correlations of 300 people.
    assert found.mean() == pytest.approx(true.mean(), abs=4 / np.sqrt(300 * 30))
    # The leading ones are those of the fit, with its sign.
    if not shuffled:
        assert correlation(held_out[0], fitted[0].variates(x))[0] > 0.7
