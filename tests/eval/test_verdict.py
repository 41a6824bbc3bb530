"""The sentences of the verdict: what is found, not found, and not to be trusted."""

import copy
from pathlib import Path

import pytest

from brainfusion.eval.verdict import (
    base_name,
    evidence,
    is_confounds,
    p_text,
    smallest_detectable,
    verdict,
    with_interval,
)
from tests.eval.example_results import write_example


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict:
    return write_example(tmp_path_factory.mktemp("found"))


def only(results: dict, word: str) -> str:
    sentences = [text for text in verdict(results) if word in text]
    assert len(sentences) == 1, verdict(results)
    return sentences[0]


def direction(auc: float, low: float, high: float, p: float, **more) -> dict:
    row = {"auc": auc, "ci_low": low, "ci_high": high, "p_value": p, "chance": 0.5}
    return {**row, "n_gallery": 200, **more}


def retrieval(brain: dict, dna: dict, **more) -> dict:
    return {"retrieval": {"brain_to_dna": brain, "dna_to_brain": dna, **more}}


def test_a_found_alignment_is_said_with_auc_interval_gallery_p_and_ceiling():
    row = direction(0.831, 0.80, 0.861, 0.001, attainable=0.99)
    assert verdict(retrieval(row, row))[0] == (
        "The brain of a person finds their own DNA better than chance: AUC 0.83 [0.80, 0.86] in a "
        "gallery of 200 people, p = 0.001; attainable 0.99."
    )


def test_no_alignment_is_said_in_one_sentence_with_what_could_have_been_seen():
    row = direction(0.51, 0.47, 0.54, 0.31)
    first = verdict(retrieval(row, row))[0]
    assert first.startswith("No evidence of alignment: AUC 0.51 [0.47, 0.54], p = 0.31 from brain")
    # 0.5 + (1.645 + 0.842) sqrt(1 / (12 * 200)): the null's own spread is the larger of the two.
    assert "with n = 200 the smallest AUC that would be detected in 4 of 5 cohorts is 0.55" in first


def test_one_direction_alone_is_not_called_found_in_both():
    sentences = verdict(
        retrieval(direction(0.6, 0.56, 0.64, 0.001), direction(0.51, 0.47, 0.55, 0.4))
    )
    assert sentences[0].startswith("The brain of a person finds their own DNA")
    assert sentences[1].startswith("No evidence of alignment from DNA to brain")


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (direction(0.60, 0.55, 0.65, 0.001), "found"),
        (direction(0.54, 0.49, 0.59, 0.001), "weak"),
        (direction(0.54, 0.51, 0.57, 0.03), "weak"),
        (direction(0.52, 0.48, 0.56, 0.2), "none"),
        (direction(0.40, 0.35, 0.45, 1.0), "below"),
        ({"auc": 0.6, "ci_low": None, "ci_high": None, "p_value": 0.001}, "found"),
        ({"auc": 0.6, "ci_low": 0.55, "ci_high": 0.65, "p_value": None}, "found"),
    ],
)
def test_evidence_needs_both_a_small_p_and_an_interval_above_chance(row, expected):
    assert evidence(row) == expected


def test_smallest_detectable_auc_grows_with_the_interval_and_shrinks_with_people():
    wide, narrow = direction(0.5, 0.4, 0.6, 0.5), direction(0.5, 0.49, 0.51, 0.5)
    assert smallest_detectable(wide) == pytest.approx(0.5 + 2.487 * 0.2 / 3.92, abs=1e-4)
    assert smallest_detectable(narrow) == pytest.approx(0.5 + 2.487 / 2400**0.5, abs=1e-4)


def test_a_failed_control_comes_first_and_loudly(found):
    results = copy.deepcopy(found)
    results["retrieval"]["shuffled_control"] |= {"auc": 0.5 + 3.5 * 0.02, "standard_error": 0.02}
    first = verdict(results)[0]
    assert first.startswith("CONTROL FAILED")
    assert "3.5 standard errors" in first


def test_a_control_at_chance_is_said_to_be_and_a_missing_one_is_missed(found):
    assert "0.3 standard errors from 0.5" in only(found, "at chance, as it must be")
    results = copy.deepcopy(found)
    del results["retrieval"]["shuffled_control"]
    assert only(results, "No shuffled-pairs control")


def test_control_below_chance_fails_as_well(found):
    results = copy.deepcopy(found)
    results["retrieval"]["shuffled_control"] |= {"auc": 0.40, "standard_error": 0.02}
    assert verdict(results)[0].startswith("CONTROL FAILED")


def test_auc_above_the_attainable_is_called_a_leak():
    row = direction(0.9, 0.87, 0.93, 0.001, attainable=0.8)
    sentences = verdict(retrieval(row, row))
    assert sum(text.startswith("TOO GOOD") for text in sentences) == 2


def test_share_of_the_way_to_the_ceiling():
    row = direction(0.7, 0.67, 0.73, 0.001, attainable=0.9, attainable_from_bold=0.75)
    text = only(retrieval(row, row), "of the way")
    assert "50% of the way" in text
    assert "80% of the way" in text


@pytest.mark.parametrize(
    ("auc", "low", "high", "expected"),
    [
        (0.90, 0.88, 0.92, "clearly lower"),
        (0.82, 0.79, 0.85, "the simpler method is enough"),
        (0.78, 0.75, 0.81, "the difference may be chance"),
        (0.60, 0.57, 0.63, "beats the best baseline, ridge-CCA"),
    ],
)
def test_the_aligner_is_compared_honestly_with_the_best_baseline(auc, low, high, expected):
    ours = direction(0.80, 0.77, 0.83, 0.001)
    rows = [
        {"name": "ridge-CCA", "auc": auc, "ci_low": low, "ci_high": high},
        {"name": "worse", "auc": 0.51, "ci_low": 0.48, "ci_high": 0.54},
    ]
    assert expected in only(retrieval(ours, ours, baselines=rows), "baseline")


def test_baselines_in_two_directions_are_averaged():
    ours = direction(0.80, 0.77, 0.83, 0.001)
    rows = [
        {"name": "cca", "direction": d, "auc": a, "ci_low": a - 0.01, "ci_high": a + 0.01}
        for d, a in (("query_to_gallery", 0.7), ("gallery_to_query", 0.6))
    ]
    assert "cca (AUC 0.65 [0.64, 0.66])" in only(retrieval(ours, ours, baselines=rows), "baseline")


def test_a_stratum_in_which_the_alignment_goes_warns_of_confounding():
    ours = direction(0.80, 0.77, 0.83, 0.001)
    strata = [
        {"name": "same site", "auc": 0.53, "ci_low": 0.48, "ci_high": 0.58},
        {"name": "same sex", "auc": 0.79, "ci_low": 0.74, "ci_high": 0.84},
        {"name": "nobody", "auc": None},
    ]
    results = retrieval(ours, ours, strata=strata)
    warning = only(results, "Warning")
    assert "(same site)" in warning
    assert "no longer told apart from chance" in warning
    assert "(same sex)" in only(results, "holds within strata")


def test_probes_are_counted_beyond_the_confounds_not_beyond_chance(found):
    text = only(found, "beyond the confounds")
    # Age is above chance from every representation, and never above what the confounds give.
    assert "age" not in text
    assert "brain embedding 3 of 5 (cognition, trait_1, sex)" in text


def test_residualised_rows_decide_where_there_are_any():
    row = {"target": "x", "metric": "r2", "chance": 0.0, "p_value": 0.001}
    rows = [
        {**row, "features": "confounds only", "value": 0.3, "ci_low": 0.2},
        {**row, "features": "net", "value": 0.6, "ci_low": 0.5},
        {**row, "features": "net | confounds", "value": 0.01, "ci_low": -0.05},
    ]
    assert "none of 1 targets" in only({"probes": rows}, "Probes")
    rows[2]["ci_low"] = 0.005
    assert "net 1 of 1 (x)" in only({"probes": rows}, "probes")


def test_names_of_representations():
    assert base_name("brainjepa features, residualised") == "brainjepa features"
    assert base_name("connectome (residualised for confounds)") == "connectome"
    assert base_name("brainjepa features | confounds") == "brainjepa features"
    assert is_confounds("confounds only")
    assert not is_confounds("features + confounds")


def test_a_null_run_finds_nothing_anywhere(tmp_path: Path):
    sentences = verdict(write_example(tmp_path, effect=0.0))
    assert sentences[0].startswith("No evidence of alignment")
    assert any("baselines find nothing either" in text for text in sentences)
    assert any("none of 5 targets" in text for text in sentences)


def test_nothing_run_is_said_and_nothing_crashes():
    assert verdict({}) == ["Nothing can be said about the alignment yet: no retrieval was run."]


def test_simulated_cohorts_are_said_to_be(found):
    assert only(found, "simulated")


def test_numbers_read_as_numbers():
    assert with_interval({"auc": 0.834, "ci_low": 0.8, "ci_high": 0.86}) == "0.83 [0.80, 0.86]"
    assert with_interval({"auc": 0.834, "ci_low": None}) == "0.83"
    assert [p_text(p) for p in (0.3125, 0.001, 0.00001, 0.0312)] == [
        "p = 0.31",
        "p = 0.001",
        "p < 0.0001",
        "p = 0.031",
    ]
