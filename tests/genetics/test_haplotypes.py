import numpy as np
import pytest

from brainfusion.genetics.haplotypes import Dictionary, check_combination, combine, combined_width
from brainfusion.runtime.errors import UserError

FIRST, SECOND = (np.array(v, dtype=np.float32) for v in ([1.0, -2.0, 5.0], [3.0, -2.0, -1.0]))


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("mean", [2.0, -2.0, 2.0]),
        ("sum", [4.0, -4.0, 4.0]),
        ("mean-absdiff", [2.0, -2.0, 2.0, 2.0, 0.0, 6.0]),
    ],
)
def test_haplotypes_combine_the_same_in_either_order(how, expected):
    for pair in ([FIRST, SECOND], [SECOND, FIRST]):
        np.testing.assert_array_equal(combine(np.stack(pair), how), expected)
    assert combined_width(3, how) == len(expected)
    assert check_combination(how, n_haplotypes=2) == how


def test_a_homozygote_differs_from_a_heterozygote_of_the_same_mean():
    mean = (FIRST + SECOND) / 2
    same, mixed = np.stack([mean, mean]), np.stack([FIRST, SECOND])
    np.testing.assert_array_equal(combine(same, "mean"), combine(mixed, "mean"))
    assert not np.array_equal(combine(same, "mean-absdiff"), combine(mixed, "mean-absdiff"))


def test_merged_haplotypes_have_a_mean_only():
    np.testing.assert_array_equal(combine(FIRST[None], "mean"), FIRST)
    for how in ("sum", "mean-absdiff"):
        with pytest.raises(UserError, match="needs both haplotypes"):
            check_combination(how, n_haplotypes=1)


def test_dictionary_numbers_distinct_rows_in_the_order_in_which_they_come():
    rng = np.random.default_rng(0)
    distinct = rng.normal(size=(30, 4)).astype(np.float32)
    choice = rng.integers(30, size=500)
    dictionary, kept, numbers = Dictionary(), [], []
    for start in range(0, 500, 64):
        rows = distinct[choice[start : start + 64]]
        found, new = dictionary.add(rows)
        numbers.append(found)
        kept.append(rows[new])
    kept = np.concatenate(kept)
    assert len(kept) == len(dictionary) == len(np.unique(choice))
    np.testing.assert_array_equal(kept[np.concatenate(numbers)], distinct[choice])


def test_rows_that_differ_in_one_bit_are_two_rows():
    row = np.ones(8, dtype=np.float32)
    other = row.copy()
    other.view(np.uint32)[5] ^= 1
    numbers, new = Dictionary().add(np.stack([row, other, row, -0.0 * row, 0.0 * row]))
    assert (numbers.tolist(), new.tolist()) == ([0, 1, 0, 2, 3], [0, 1, 3, 4])
