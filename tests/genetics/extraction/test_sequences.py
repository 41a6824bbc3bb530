import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from brainfusion.genetics.extraction.sequences import (
    Change,
    build_haplotypes,
    change_of,
    patch,
)

REFERENCE = "ACGTTGCAACGTGGCATTAC"
ALLELE = st.text("ACGT", min_size=0, max_size=4)


@st.composite
def changes(draw) -> list[Change]:
    found = []
    for _ in range(draw(st.integers(0, 6))):
        start = draw(st.integers(0, len(REFERENCE)))
        end = draw(st.integers(start, min(start + 3, len(REFERENCE))))
        bases = draw(ALLELE)
        if start == end and not bases:
            continue
        found.append(Change(start=start, end=end, bases=bases))
    return found


def brute_force(reference: str, changes: list[Change]) -> str:
    """Base by base: what stands at each place and before it; the first to touch a base wins."""
    at, before = list(reference), [""] * (len(reference) + 1)
    touched, starts = set(), set()
    for change in sorted(changes, key=lambda c: c.start):
        mine = set(range(change.start, change.end))
        # What would begin inside a stretch that is replaced has no place any more.
        inside = any(c - 1 in touched and c in touched for c in (change.start,))
        if mine & touched or change.start in starts or (inside and change.start == change.end):
            continue
        starts.add(change.start)
        touched |= mine
        for place in mine:
            at[place] = ""
        before[change.start] += change.bases
    return "".join(b + a for b, a in zip(before, [*at, ""], strict=True))


@given(changes())
@settings(max_examples=300, deadline=None)
def test_patching_equals_a_brute_force_over_bases(found):
    assert patch(REFERENCE, found)[0] == brute_force(REFERENCE, found)


def test_an_allele_is_cut_down_to_the_bases_that_differ():
    assert change_of(5, "CA", "TA") == Change(start=5, end=6, bases="T")
    assert change_of(5, "CAA", "CA") == Change(start=6, end=7, bases="")
    assert change_of(5, "C", "CTT") == Change(start=6, end=6, bases="TT")
    assert change_of(5, "CT", "CT").start == change_of(5, "CT", "CT").end
    assert not change_of(5, "AC", "GT").is_indel
    assert change_of(5, "C", "CTT").is_indel


def test_a_substitution_and_an_insertion_written_at_the_same_position_are_both_applied():
    both = [change_of(0, "A", "G"), change_of(0, "A", "ATT")]
    assert patch("ACC", both) == ("GTTCC", 0)


def test_of_two_changes_on_one_base_the_first_wins_and_the_other_is_counted():
    assert patch("ACGT", [change_of(1, "C", "A"), change_of(1, "C", "T")]) == ("AAGT", 1)
    deletion, inside = change_of(0, "ACGT", "A"), change_of(2, "G", "C")
    assert patch("ACGTA", [inside, deletion]) == ("AA", 1)


def test_distinct_sequences_are_built_once_and_equal_every_persons_own_patch():
    rng = np.random.default_rng(0)
    sites = sorted(rng.choice(len(REFERENCE) - 2, 6, replace=False).tolist())
    alternatives = []
    for site in sites:
        ref = REFERENCE[site]
        others = [base for base in "ACGT" if base != ref]
        alternatives.append([change_of(site, ref, others[0]), change_of(site, ref, ref + "GG")])
    alternatives[2][1] = None  # not applied
    alleles = rng.integers(0, 3, size=(40, 2, 6)).astype(np.uint8)
    sequences, index, indels, n_skipped = build_haplotypes(REFERENCE, alleles, alternatives)
    assert len(set(sequences)) == len(sequences)
    total = 0
    for person in range(40):
        for haplotype in range(2):
            carried = alleles[person, haplotype]
            mine = [alternatives[s][carried[s] - 1] for s in range(6) if carried[s]]
            expected, skipped = patch(REFERENCE, [change for change in mine if change])
            total += skipped
            assert sequences[index[person, haplotype]] == expected
            assert indels[index[person, haplotype]] == (len(expected) != len(REFERENCE))
    assert n_skipped == total


def test_people_without_any_variant_all_have_the_reference():
    sequences, index, indels, _ = build_haplotypes("ACGT", np.zeros((3, 2, 0), np.uint8), [])
    assert sequences == ("ACGT",)
    assert not index.any()
    assert not indels.any()
