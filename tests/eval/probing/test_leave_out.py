"""Ridge probes without one block of columns: the closed form is what refitting gives, planted
blocks come first, and of none planted none is found.
"""

import numpy as np
import pytest
from sklearn.linear_model import Ridge

from brainfusion.eval.attribution import (
    drop_p_value,
    found,
    mean_p_value,
    target_contributions,
)
from brainfusion.eval.probing.leave_out import blocks_out, principal_columns
from brainfusion.eval.probing.linear import FeatureSpace, ridge_out_of_fold
from brainfusion.eval.probing.probes import PENALTIES
from brainfusion.eval.statistics import auroc
from brainfusion.runtime.errors import UserError


def by_refitting(x, y, folds, fixed, penalties):
    """Nested cross-validation by scikit-learn, one fit a penalty, fold and pair of folds."""

    def predicted(train, rows, penalty):
        inverse = np.linalg.pinv(fixed[train])
        left, gamma = x - fixed @ (inverse @ x[train]), inverse @ y[train]
        model = Ridge(alpha=penalty, fit_intercept=False, solver="svd")
        model.fit(left[train], y[train] - fixed[train] @ gamma)
        return model.predict(left[rows]) + fixed[rows] @ gamma

    out, chosen = np.empty(len(y)), []
    for k in range(folds.max() + 1):
        others = [j for j in range(folds.max() + 1) if j != k]
        errors = [
            np.mean(
                [
                    np.mean(
                        (y[folds == j] - predicted(~np.isin(folds, (j, k)), folds == j, a)) ** 2
                    )
                    for j in others
                ]
            )
            for a in penalties
        ]
        chosen.append(int(np.argmin(errors)))
        out[folds == k] = predicted(folds != k, folds == k, penalties[chosen[-1]])
    return out, chosen


@pytest.mark.parametrize(
    ("widths", "n"), [((4, 3, 6), 60), ((30, 45, 25), 50), ((2, 80, 1), 50)], ids=str
)
def test_leaving_a_block_out_equals_fitting_again_without_it(widths, n):
    """With fewer columns than people, with more, and with one block wider than the people."""
    rng = np.random.default_rng(0)
    raw = [rng.standard_normal((n, w)) * rng.uniform(0.5, 3) + 7 for w in widths]
    y = raw[0] @ rng.standard_normal(widths[0]) + rng.standard_normal(n)
    folds = rng.permutation(np.arange(n) % 4)
    fixed = np.c_[np.ones(n), rng.standard_normal((n, 2))]
    penalties = PENALTIES[::3]
    out = blocks_out(
        [principal_columns(x) for x in raw], y, folds, fixed=fixed, penalties=penalties
    )
    centred = [x - x.mean(0) for x in raw]
    scale = np.sqrt(sum((x**2).sum() for x in centred) / n)
    for g in range(-1, len(raw)):  # -1: nothing is left out
        x = np.concatenate([x for i, x in enumerate(centred) if i != g], axis=1) / scale
        want, chosen = by_refitting(x, y, folds, fixed, penalties)
        got = out.whole if g < 0 else out.without[:, g]
        np.testing.assert_allclose(got, want, atol=1e-8, rtol=1e-8)
        assert out.chosen[:, 1 + g].tolist() == chosen


def test_with_all_blocks_the_predictions_are_those_of_the_probe():
    rng = np.random.default_rng(1)
    raw = [rng.standard_normal((80, w)) for w in (5, 9, 3)]
    y, folds = raw[1][:, 0] + rng.standard_normal(80), rng.permutation(np.arange(80) % 5)
    fixed = np.ones((80, 1))
    out = blocks_out(
        [principal_columns(x) for x in raw], y, folds, fixed=fixed, penalties=PENALTIES
    )
    space = FeatureSpace(np.concatenate(raw, axis=1), folds)
    want, chosen = ridge_out_of_fold(space, fixed, y[:, None], PENALTIES)
    np.testing.assert_allclose(out.whole, want[:, 0], atol=1e-8)
    assert out.chosen[:, 0].tolist() == chosen[:, 0].tolist()


def test_a_block_in_its_own_axes_keeps_distances_and_drops_what_is_not_there():
    rng = np.random.default_rng(2)
    haplotypes = rng.standard_normal((4, 50)) + 100
    values = haplotypes[rng.integers(0, 4, 30)]
    known = rng.random(30) < 0.8
    columns = principal_columns(values, known)
    assert columns.shape == (30, 3)  # four haplotypes span three dimensions
    assert not columns[~known].any()
    some = values[known]
    want = ((some[:, None] - some) ** 2).sum(-1)
    got = ((columns[known][:, None] - columns[known]) ** 2).sum(-1)
    np.testing.assert_allclose(got, want, atol=1e-9)
    assert principal_columns(np.ones((5, 3))).shape == (5, 0)


def cohort(seed: int, *, linked: bool, n: int = 200, n_genes: int = 10, label: float = 0.0):
    """Genes of six haplotypes, siblings who share one; the first two genes move the target."""
    rng = np.random.default_rng(seed)
    family = np.repeat(np.arange(n // 2), 2)
    blocks, y = [], rng.standard_normal(n)
    y[1::2] = 0.5 * y[::2] + 0.87 * y[1::2]
    for gene in range(n_genes):
        carried = rng.choice(6, (n, 2), p=rng.dirichlet(np.ones(6)))
        carried[1::2, 0] = carried[::2, 0]
        blocks.append(principal_columns(rng.standard_normal((6, 5))[carried].mean(1)))
        if linked and gene < 2:
            score = rng.permutation(np.linspace(-1, 1, 6))[carried].mean(1)
            y += (score - score.mean()) / score.std()
    if label:
        y = (y > np.quantile(y, 1 - label)).astype(float)
    folds = rng.permutation(np.arange(n // 2) % 5)[family]
    out = blocks_out(blocks, y, folds, fixed=np.ones((n, 1)), penalties=PENALTIES[::3])
    names = [f"g{i}" for i in range(n_genes)]
    return y, out, family, target_contributions(names, y, out, families=family, n_bootstrap=100)


@pytest.mark.parametrize("seed", [0, *(pytest.param(s, marks=pytest.mark.slow) for s in (1, 2))])
def test_planted_genes_come_first_and_lose_what_is_without_them(seed):
    y, out, _, (r2, table) = cohort(seed, linked=True)
    causal = np.array([name in ("g0", "g1") for name in table["unit"]])
    assert auroc(causal, table["drop"].to_numpy()) == 1.0
    assert set(found(table)["unit"]) == {"g0", "g1"}
    assert (table["ci_low"].to_numpy()[:2] > 0).all()
    assert r2 == pytest.approx(1 - ((y - out.whole) ** 2).sum() / ((y - out.baseline) ** 2).sum())
    for row in table.iter_rows(named=True):
        lost = out.without[:, int(row["unit"][1:])]
        want = 1 - ((y - lost) ** 2).sum() / ((y - out.baseline) ** 2).sum()
        assert row["r2"] == pytest.approx(want)
        assert row["drop"] == pytest.approx(r2 - want)


def test_without_a_link_few_p_values_are_small_and_none_survives():
    tables = [cohort(10 + seed, linked=False)[3][1] for seed in range(6)]
    p = np.concatenate([table["p_value"].to_numpy() for table in tables])
    assert (p < 0.05).mean() < 0.08
    assert sum(len(found(table)) > 0 for table in tables) <= 1


@pytest.mark.slow
def test_ranks_alone_would_find_a_rare_label_where_nothing_is():
    """Which is why the mean has to be above 0, too."""
    ranks, both = [], []
    for seed in range(12):
        y, out, family, (_, table) = cohort(30 + seed, linked=False, label=0.05)
        grown = (y[:, None] - out.without) ** 2 - ((y - out.whole) ** 2)[:, None]
        for unit, p in zip(table["unit"], table["p_value"], strict=True):
            drops = grown[:, int(unit[1:])]
            ranks.append(drop_p_value(drops, family))
            both.append(p)
            assert p == pytest.approx(max(ranks[-1], mean_p_value(drops, family)))
    assert (np.array(both) < 0.05).mean() < 0.08
    assert (np.array(ranks) < 0.05).mean() > (np.array(both) < 0.05).mean()


def test_the_t_test_is_that_of_scipy_on_family_means():
    from scipy import stats

    rng = np.random.default_rng(3)
    drops, family = rng.normal(0.2, 1, 40), np.repeat(np.arange(20), 2)
    want = stats.ttest_1samp(drops.reshape(20, 2).mean(1), 0, alternative="greater").pvalue
    assert mean_p_value(drops, family) == pytest.approx(want)
    assert mean_p_value(np.zeros(40), family) == 1.0


def test_too_few_folds_or_blocks_are_refused():
    x = np.random.default_rng(0).standard_normal((20, 2))
    known = {"fixed": np.ones((20, 1)), "penalties": PENALTIES}
    with pytest.raises(UserError, match="2 folds: nested cross-validation needs 3 or more"):
        blocks_out([x, x], x[:, 0], np.arange(20) % 2, **known)
    with pytest.raises(UserError, match="1 blocks that vary: leaving one out needs 2"):
        blocks_out([x], x[:, 0], np.arange(20) % 4, **known)
