import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import rankdata
from sklearn.metrics import roc_auc_score

from brainfusion.eval.statistics import (
    auroc,
    block_permutations,
    family_bootstrap,
    family_codes,
    fdr,
    interval,
    midranks,
    n_fixed,
    p_value,
)
from brainfusion.runtime.errors import UserError


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 6), st.integers(0, 2)), min_size=1, max_size=30),
    st.integers(0, 5),
)
def test_permutations_move_whole_families_of_equal_make_up_within_blocks(people, seed) -> None:
    families, blocks = (np.array(x) for x in zip(*people, strict=True))
    for move in block_permutations(len(people), families, blocks, 4, seed):
        assert sorted(move) == list(range(len(people)))
        assert (blocks[move] == blocks).all()
        for family in np.unique(families):
            members = np.flatnonzero(families == family)
            source = families[move[members]]
            assert len(set(source)) == 1  # from one family ...
            assert (families == source[0]).sum() == len(members)  # ... of the same size


def test_every_family_reaches_every_place_of_its_kind() -> None:
    moves = block_permutations(9, list("aabbccdef"), None, 300, seed=0)
    assert {tuple(sorted(set(moves[:, i]))) for i in (0, 2, 4)} == {(0, 2, 4)}
    assert set(moves[:, 6]) == {6, 7, 8}


def test_people_without_a_family_are_nobodys_relatives() -> None:
    codes = family_codes(["a", None, "a", float("nan"), "", None], 6)
    assert codes[0] == codes[2]
    assert len(set(codes)) == 5


def test_people_who_cannot_move_are_counted() -> None:
    assert n_fixed(6, list("aabccc"), None) == 6
    assert n_fixed(6, list("aabbcd"), [0, 0, 0, 0, 1, 2]) == 2
    assert (block_permutations(3, list("aab"), None, 5) == np.arange(3)).all()


def test_family_bootstrap_spread_is_that_of_independent_families() -> None:
    rng = np.random.default_rng(0)
    family_means = rng.standard_normal(80)
    values = np.repeat(family_means, 3)
    draws = family_bootstrap(values, np.repeat(np.arange(80), 3), 4000, seed=1)
    # 4,000 draws give a standard deviation to 1.1 %.
    assert draws.std() == pytest.approx(family_means.std() / np.sqrt(80), rel=0.05)
    alone = family_bootstrap(values, None, 4000, seed=1)
    assert alone.std() == pytest.approx(values.std() / np.sqrt(240), rel=0.05)


def test_family_bootstrap_weighs_people_not_families() -> None:
    values, families = np.array([1.0, 1.0, 1.0, 0.0]), list("aaab")
    draws = family_bootstrap(np.stack([values, 2 * values], axis=1), families, 200)
    assert set(np.unique(draws[:, 0])) <= {0.0, 0.75, 1.0}
    np.testing.assert_allclose(draws[:, 1], 2 * draws[:, 0])


def test_interval_holds_95_percent_of_the_draws() -> None:
    low, high = interval(np.arange(1001.0))
    assert (low, high) == pytest.approx((25, 975))


def test_p_value_is_never_zero_and_counts_ties() -> None:
    assert p_value(5.0, np.zeros(99)) == 0.01
    assert p_value(1.0, np.array([1.0, 0.0, 2.0])) == 0.75
    assert p_value(0.0, np.array([])) == 1.0


def test_fdr_is_benjamini_hochberg_and_keeps_tests_not_done() -> None:
    p = np.array([0.01, np.nan, 0.04, 0.03, 0.2])
    # By hand: sorted p * 4 / rank, then the running minimum from the largest.
    expected = [0.04, np.nan, 0.16 / 3, 0.16 / 3, 0.2]
    np.testing.assert_allclose(fdr(p), expected)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 4)), min_size=2, max_size=40))
def test_auroc_and_ranks_with_ties_equal_the_references(rows) -> None:
    positive, scores = (np.array(x) for x in zip(*rows, strict=True))
    np.testing.assert_array_equal(midranks(scores[None])[0], rankdata(scores))
    if positive.any() and not positive.all():
        assert auroc(positive, scores) == pytest.approx(roc_auc_score(positive, scores))
    else:
        assert np.isnan(auroc(positive, scores))


def test_wrong_number_of_labels_is_an_error() -> None:
    with pytest.raises(UserError, match="3 labels for 4 people"):
        block_permutations(4, ["a", "b", "c"], None, 1)
