import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from brainfusion.genetics.extraction.run import batches
from brainfusion.genetics.extraction.windows import Reading, cut, gather, window_bounds
from brainfusion.genetics.strands import reverse_complement
from brainfusion.runtime.errors import UserError
from tests.genetics.extraction.people import reference


def reading(**changes) -> Reading:
    values = {
        "unit_bp": 1, "window_bp": 100, "stride_bp": 100, "both_strands": True,
        "gene_orientation": True,
    }  # fmt: skip
    return Reading(**{**values, **changes})


@given(st.integers(1, 500), st.integers(1, 60), st.integers(1, 60))
@settings(max_examples=300, deadline=None)
def test_windows_cover_every_token_and_are_alike_in_length(n_tokens, window, stride):
    stride = min(window, stride)
    bounds = window_bounds(n_tokens, window=window, stride=stride)
    lengths = [stop - start for start, stop in bounds]
    covered = np.zeros(n_tokens, dtype=int)
    for start, stop in bounds:
        covered[start:stop] += 1
    assert covered.min() >= 1
    assert max(lengths) <= window
    assert max(lengths) - min(lengths) <= 1
    if stride == window:
        assert covered.max() == 1
        assert len(bounds) == -(-n_tokens // window)
    else:
        starts = [start for start, _ in bounds]
        assert max(np.diff(starts), default=0) <= stride


def test_six_mers_are_trimmed_on_the_left_before_the_reverse_complement_is_taken():
    sequence = reference(length_bp=76)  # 12 whole 6-mers and a rest of 4
    texts = cut([sequence], reading(unit_bp=6, window_bp=96, stride_bp=96), gene="g", strand="+")
    assert texts.texts == (sequence[4:], reverse_complement(sequence[4:]))
    forward = {sequence[4:][k : k + 6] for k in range(0, 72, 6)}
    other = {texts.texts[1][k : k + 6] for k in range(0, 72, 6)}
    assert {reverse_complement(token) for token in forward} == other
    wrong = reverse_complement(sequence)[4:]  # reversed first, trimmed second
    assert {wrong[k : k + 6] for k in range(0, 72, 6)} != other


def test_shared_windows_are_read_once():
    one = reference(length_bp=250)
    two = one[:240] + ("A" if one[240] != "A" else "C") + one[241:]
    texts = cut([one, two], reading(), gene="g", strand="+")
    assert texts.n_windows == 3
    assert len(texts.texts) == 2 * 4  # two windows shared, one of each own, and both strands
    assert texts.forward[0][:2] == texts.forward[1][:2]


def test_a_windowed_vector_is_the_mean_over_all_positions():
    sequence = reference(length_bp=251)
    made = reading(both_strands=False)
    texts = cut([sequence], made, gene="g", strand="+")
    values = {base: float(ord(base)) for base in "ACGT"}
    vectors = np.array([[np.mean([values[b] for b in text])] for text in texts.texts], np.float32)
    expected = np.mean([values[base] for base in sequence])
    np.testing.assert_allclose(gather(vectors, texts, made), [[expected]], rtol=1e-6)


def test_one_strand_is_the_genes_own_or_the_genomes():
    sequence = reference(length_bp=30)
    own = cut([sequence], reading(both_strands=False), gene="g", strand="-")
    genome = cut(
        [sequence], reading(both_strands=False, gene_orientation=False), gene="g", strand="-"
    )
    assert own.texts == (reverse_complement(sequence),)
    assert genome.texts == (sequence,)


def test_settings_that_leave_bases_out_are_refused():
    with pytest.raises(UserError, match=r"window-bp 100: expected a multiple of 6.* 96 will do"):
        reading(unit_bp=6)
    with pytest.raises(UserError, match="would be left out"):
        reading(stride_bp=101)
    with pytest.raises(UserError, match="trim-left 100"):
        reading(trim_left=100)
    with pytest.raises(UserError, match="5 bp has 0 whole tokens of 6 bp"):
        cut(["ACGTA"], reading(unit_bp=6, window_bp=96, stride_bp=96), gene="g", strand="+")


def test_batches_hold_one_length_and_the_last_of_many_is_filled_up():
    texts = ["A" * 5] * 7 + ["A" * 6] * 2
    made = list(batches(texts, 3))
    assert made == [[0, 1, 2], [3, 4, 5], [6, 0, 1], [7, 8]]
