import dataclasses

import numpy as np
import pytest

from brainfusion.genetics.tokens import TokenPool, spans_of_lengths, spans_of_mask
from brainfusion.runtime.errors import UserError

RNG = np.random.default_rng(0)


def pool_of(**changes) -> TokenPool:
    return TokenPool(**{"pooling": "mean", "n_before": 0, "n_after": 0, **changes})


def one(pool: TokenPool, tokens: np.ndarray, span=None) -> np.ndarray:
    spans = None if span is None else np.array([span])
    return pool(tokens[None], spans, where="x.pt")[0]


@pytest.mark.parametrize("pooling", ["mean", "max", "last", "separator"])
def test_pooling_matches_the_plain_formula_on_what_is_left(pooling):
    tokens = RNG.normal(size=(30, 8)).astype(np.float32)
    pool = pool_of(pooling=pooling, n_before=1, n_after=2, trim_left=3, trim_right=4)
    kept = tokens[5 + 1 + 3 : 25 - 2 - 4].astype(np.float64)
    expected = {
        "mean": kept.mean(axis=0),
        "max": kept.max(axis=0),
        "last": kept[-1],
        "separator": tokens[24],
    }[pooling]
    np.testing.assert_allclose(one(pool, tokens, (5, 25)), expected, rtol=1e-6)


@pytest.mark.parametrize("pooling", ["mean", "max", "last", "separator"])
def test_what_stands_in_padding_does_not_matter(pooling):
    tokens = RNG.normal(size=(2, 20, 8)).astype(np.float32)
    tokens[1, :12] = tokens[0, :12]
    tokens[1, 12:] = np.nan
    after = 1 if pooling == "separator" else 0
    spans = np.array([[0, 12], [0, 12]])
    a, b = pool_of(pooling=pooling, n_after=after)(tokens, spans, where="x.pt")
    np.testing.assert_array_equal(a, b)


def test_padding_on_the_left_is_left_out_too():
    lengths = np.array([3, 5])
    np.testing.assert_array_equal(spans_of_lengths(lengths, 8, "left"), [[5, 8], [3, 8]])
    np.testing.assert_array_equal(spans_of_lengths(lengths, 8, "right"), [[0, 3], [0, 5]])


def test_attention_masks_give_the_same_spans_and_holes_are_refused():
    mask = np.array([[0, 0, 1, 1, 1], [1, 1, 0, 0, 0], [0, 0, 0, 0, 0]])
    np.testing.assert_array_equal(spans_of_mask(mask, where="x"), [[2, 5], [0, 2], [0, 0]])
    with pytest.raises(UserError, match="holes"):
        spans_of_mask(np.array([[1, 0, 1]]), where="x")


def test_a_sequence_of_which_nothing_is_left_becomes_nan():
    tokens = RNG.normal(size=(6, 4)).astype(np.float32)
    assert np.isnan(one(pool_of(trim_left=15), tokens)).all()
    assert np.isnan(one(pool_of(n_before=1, n_after=1), tokens, (2, 2))).all()


def test_means_of_long_nearly_equal_positions_keep_a_ten_thousandth():
    # 100,000 bfloat16-like positions around 1 whose mean differs by 1e-4 between two people.
    tokens = np.ones((2, 100_000, 2), dtype=np.float32)
    tokens[1, :10] = 2.0
    a, b = pool_of()(tokens, None, where="x.pt")
    np.testing.assert_allclose(b - a, 1e-4, rtol=1e-3)  # float32 of 1.0001: step 1.2e-7


def test_the_half_that_runs_backwards_is_turned_before_positions_count():
    tokens = RNG.normal(size=(12, 8)).astype(np.float32)
    pool = pool_of(pooling="last", mirrored=True, n_after=1)
    vector = one(pool, tokens)
    np.testing.assert_array_equal(vector[:4], tokens[10, :4])
    np.testing.assert_array_equal(vector[4:], tokens[0, 4:])
    trimmed = one(dataclasses.replace(pool, pooling="mean", trim_left=2), tokens)
    np.testing.assert_allclose(trimmed[:4], tokens[2:11, :4].mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(trimmed[4:], tokens[:9, 4:].mean(axis=0), rtol=1e-5)


@pytest.mark.parametrize(
    ("unit_bp", "length_bp", "n_positions", "fits"),
    [(1, 100, 102, True), (6, 96, 18, True), (6, 96, 96, False), (1, 100, 100, False)],
)
def test_tokens_are_held_against_base_pairs(unit_bp, length_bp, n_positions, fits):
    pool = pool_of(n_before=1, n_after=1, unit_bp=unit_bp, length_bp=length_bp)
    tokens = np.ones((2, n_positions, 4), dtype=np.float32)
    if fits:
        assert np.isfinite(pool(tokens, None, where="x.pt")).all()
    else:
        with pytest.raises(UserError, match="another number of tokens than length_bp"):
            pool(tokens, None, where="x.pt")


def test_lengths_beyond_what_is_stored_are_refused():
    with pytest.raises(UserError, match="1 lengths are beyond the 5 positions"):
        one(pool_of(), np.ones((5, 2), dtype=np.float32), (0, 6))
