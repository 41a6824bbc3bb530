import numpy as np
import polars as pl
import pytest
from scipy import stats

from brainfusion.eval.attribution import contributions, drop_p_value, found, person_auc
from brainfusion.eval.statistics import auroc
from brainfusion.runtime.errors import UserError


def test_a_persons_auc_is_the_share_of_others_below_the_partner_by_brute_force():
    rng = np.random.default_rng(0)
    a = rng.integers(-1, 2, (30, 3)).astype(float)  # small integers: plenty of ties
    b = rng.integers(-1, 2, (30, 3)).astype(float)
    expected = []
    for i in range(30):
        parts = []
        for own, others in (
            (a[i] @ b[i], [a[i] @ b[j] for j in range(30) if j != i]),
            (a[i] @ b[i], [a[j] @ b[i] for j in range(30) if j != i]),
        ):
            parts.append(np.mean([(own > x) + 0.5 * (own == x) for x in others]))
        expected.append(np.mean(parts))
    np.testing.assert_allclose(person_auc(a, b), expected)


def test_vectors_that_are_not_paired_are_refused():
    with pytest.raises(UserError, match="expected two of one shape"):
        person_auc(np.ones((3, 2)), np.ones((4, 2)))
    with pytest.raises(UserError, match="2 people or more"):
        person_auc(np.ones((1, 2)), np.ones((1, 2)))


def test_the_p_value_is_the_signed_rank_test_of_family_means():
    rng = np.random.default_rng(1)
    drops, families = rng.normal(0.1, 1, 40), np.repeat(np.arange(20), 2)
    means = drops.reshape(20, 2).mean(axis=1)
    expected = stats.wilcoxon(means, alternative="greater").pvalue
    assert drop_p_value(drops, families) == pytest.approx(expected)
    assert drop_p_value(-drops, families) == pytest.approx(1 - expected, abs=0.01)
    assert drop_p_value(np.zeros(40), families) == 1.0


def planted(seed: int, *, linked: bool) -> tuple[pl.DataFrame, np.ndarray]:
    """30 units of 2 columns; of the first 4 the other modality is a noisy copy, if linked."""
    rng = np.random.default_rng(seed)
    dna = rng.standard_normal((150, 30, 2))
    used = dna if linked else rng.standard_normal((150, 30, 2))
    brain = used + rng.standard_normal((150, 30, 2))
    brain[:, 4:] = rng.standard_normal((150, 26, 2))
    weights = np.full(30, 0.3)
    weights[:4] = 1.0  # a model that looks at all units, at the planted ones most

    def vectors(x: np.ndarray) -> np.ndarray:
        return (x * weights[:, None]).reshape(len(x), -1)

    def hidden():
        for unit in range(30):
            without = dna.copy()
            without[:, unit] = 0
            yield f"unit-{unit:02d}", vectors(brain), vectors(without)

    table = contributions((vectors(brain), vectors(dna)), hidden(), n_bootstrap=200)
    return table, np.array([int(name[-2:]) < 4 for name in table["unit"]])


@pytest.mark.parametrize("seed", range(3))
def test_planted_units_come_first_and_without_a_link_none_is_found(seed):
    table, is_planted = planted(seed, linked=True)
    assert is_planted[:4].all()
    assert auroc(is_planted, table["drop"].to_numpy()) == 1.0
    kept = found(table)
    assert {int(name[-2:]) for name in kept["unit"]} >= {0, 1, 2, 3}
    assert ((kept["ci_low"] > 0) | (kept["p_value"] < 0.05)).all()
    null, _ = planted(seed, linked=False)
    assert len(found(null)) == 0


def test_p_values_without_a_link_are_not_too_small():
    p = np.concatenate([planted(10 + s, linked=False)[0]["p_value"].to_numpy() for s in range(20)])
    share = (p < 0.05).mean()
    assert share < 0.05 + 4 * np.sqrt(0.05 * 0.95 / len(p)) + 0.03, share
