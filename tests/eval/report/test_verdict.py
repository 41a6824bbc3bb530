"""The sentences of the verdict: what is found, not found, and not to be trusted."""

import copy
from pathlib import Path

import pytest

from brainfusion.eval.report.rows import (
    base_name,
    by_name,
    is_confounds,
    is_tied,
    p_text,
    rounded,
    with_interval,
)
from brainfusion.eval.report.verdict import (
    PRETRAINED,
    UNTRAINED,
    best_baseline,
    evidence,
    smallest_detectable,
    verdict,
)
from tests.eval.report.example_results import write_example


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


def test_a_found_alignment_is_said_with_auc_intervals_gallery_and_p():
    brain, dna = direction(0.831, 0.80, 0.861, 0.001), direction(0.78, 0.74, 0.82, 0.002)
    assert verdict(retrieval(brain, dna))[0] == (
        "A person's brain finds their own DNA better than chance, and their DNA their brain: "
        "AUC 0.83 [0.80, 0.86] and 0.78 [0.74, 0.82] in a gallery of 200 people, p = 0.001 and "
        "p = 0.002."
    )
    assert verdict(retrieval(brain, {}))[0] == (
        "The brain of a person finds their own DNA better than chance: AUC 0.83 [0.80, 0.86] in a "
        "gallery of 200 people, p = 0.001."
    )


def test_the_smallest_possible_p_is_said_to_be_where_the_permutations_are_known():
    row = direction(0.831, 0.80, 0.861, 0.001, n_permutations=999)
    end = "both p = 0.001 (smallest possible with 999 permutations)."
    assert verdict(retrieval(row, row))[0].endswith(end)
    assert "smallest" not in verdict(retrieval(*[{**row, "n_permutations": 9999}] * 2))[0]


def test_sentences_come_in_order_of_weight(found):
    words = ["A person's brain finds", "control is at chance", "Attainable is", "best baseline"]
    words += ["holds within strata", "1 component that brain", "probes predict", "is simulated"]
    sentences = verdict(found)
    assert len(sentences) == len(words)
    for word, text in zip(words, sentences, strict=True):
        assert word in text


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
    assert only(retrieval(row, row), "of the way") == (
        "Attainable is an AUC of 0.90 with a perfect model of perfectly measured people and 0.75 "
        "from these recordings: this run has come 50% and 80% of the way there from chance."
    )


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


def test_a_baseline_above_the_attainable_is_called_a_confound_and_no_standard():
    ours = direction(0.51, 0.47, 0.55, 0.36, attainable=0.5)
    row = direction(0.74, 0.71, 0.77, 0.001, name="ridge-CCA, connectome")
    text = only(retrieval(ours, ours, baselines=[row]), "ridge-CCA")
    assert "is above the attainable 0.50" in text
    assert "Prefer" not in text
    ours["attainable"] = 0.9
    assert "Prefer the baseline" in only(retrieval(ours, ours, baselines=[row]), "ridge-CCA")


def test_a_baseline_that_block_permutation_explains_is_no_standard_either():
    ours = direction(0.51, 0.47, 0.55, 0.36)
    row = direction(0.74, 0.71, 0.77, 0.28, name="ridge-CCA, connectome")
    text = only(retrieval(ours, ours, baselines=[row]), "ridge-CCA")
    assert "p = 0.28" in text
    assert "rests on what differs between those" in text


def test_features_that_block_permutation_explains_say_nothing_about_pretraining():
    ours = direction(0.51, 0.47, 0.55, 0.36)
    rows = [
        direction(0.57, 0.53, 0.61, 0.70, name=PRETRAINED),
        direction(0.56, 0.52, 0.60, 0.65, name=UNTRAINED),
    ]
    text = only(retrieval(ours, ours, baselines=rows), "untrained AUC")
    assert text.startswith("Neither pretrained nor untrained features find anything")


def test_covariates_that_find_partners_cast_doubt_on_a_better_baseline():
    ours = direction(0.60, 0.56, 0.64, 0.001)
    rows = [
        direction(0.74, 0.71, 0.77, 0.001, name="ridge-CCA, connectome"),
        direction(0.63, 0.59, 0.67, 0.001, name="covariates only"),
    ]
    text = only(retrieval(ours, ours, baselines=rows), "does not beat")
    assert text.endswith("covariates alone find partners too: the baseline may rest on them.")


def test_baselines_in_two_directions_are_averaged():
    ours = direction(0.80, 0.77, 0.83, 0.001)
    rows = [
        {"name": "cca", "direction": d, "auc": a, "ci_low": a - 0.01, "ci_high": a + 0.01}
        for d, a in (("query_to_gallery", 0.7), ("gallery_to_query", 0.6))
    ]
    assert "cca, with AUC 0.65 [0.64, 0.66]" in only(
        retrieval(ours, ours, baselines=rows), "baseline"
    )


def test_a_baseline_is_compared_in_the_direction_that_has_an_interval():
    # The other direction is far better on both sides; it has no interval, so it decides nothing.
    ours = direction(0.80, 0.77, 0.83, 0.001)
    row = {"name": "cca", "auc": 0.70, "ci_low": 0.67, "ci_high": 0.73, "auc_dna_to_brain": 0.99}
    results = retrieval(ours, direction(0.60, 0.57, 0.63, 0.001), baselines=[row])
    text = only(results, "baseline")
    assert text == (
        "The aligner (AUC 0.80 [0.77, 0.83]) beats the best baseline, cca, with AUC 0.70 "
        "[0.67, 0.73] from brain to DNA."
    )


def test_the_way_back_of_a_baseline_is_a_row_of_its_own():
    row = {"name": "cca", "auc": 0.7, "ci_low": 0.6, "ci_high": 0.8, "n_gallery": 50}
    brain, dna = by_name([{**row, "auc_dna_to_brain": 0.71, "p_value_dna_to_brain": 0.02}])["cca"]
    assert (brain["direction"], brain["auc"], brain["ci_low"]) == ("brain_to_dna", 0.7, 0.6)
    assert (dna["direction"], dna["auc"], dna["p_value"]) == ("dna_to_brain", 0.71, 0.02)
    assert "ci_low" not in dna
    assert by_name([row])["cca"] == [row]


@pytest.mark.parametrize(
    ("auc", "low", "high", "expected"),
    [
        (0.90, 0.87, 0.93, "Pretraining hurts"),
        (0.81, 0.78, 0.84, "Pretraining does not help here"),
        (0.78, 0.75, 0.81, "Pretraining may help, but the intervals overlap"),
        (0.60, 0.57, 0.63, "Pretraining helps"),
    ],
)
def test_pretrained_features_are_held_against_those_of_the_untrained_encoder(
    auc, low, high, expected
):
    ours = direction(0.80, 0.77, 0.83, 0.001)
    pretrained = {"name": PRETRAINED, **ours}
    untrained = {"name": UNTRAINED, "auc": auc, "ci_low": low, "ci_high": high}
    results = retrieval(ours, ours, baselines=[pretrained, untrained])
    text = only(results, "same encoder untrained")
    assert text.startswith(f"{expected}: with ridge-CCA on the encoder's features AUC 0.80")
    assert f"untrained AUC {auc:.2f} [{low:.2f}, {high:.2f}]" in text
    del results["retrieval"]["baselines"][0]
    assert not [text for text in verdict(results) if "untrained AUC" in text]


def test_neither_encoder_is_praised_at_chance():
    null = direction(0.51, 0.47, 0.55, 0.4)
    rows = [{"name": PRETRAINED, **null}, {"name": UNTRAINED, **null, "auc": 0.5}]
    assert "Neither pretrained" in only(retrieval(null, null, baselines=rows), "untrained AUC")


def test_covariates_that_find_the_partner_alone_warn():
    ours = direction(0.80, 0.77, 0.83, 0.001)
    row = {"name": "covariates only", "auc": 0.6, "ci_low": 0.56, "ci_high": 0.64}
    assert "0.60 [0.56, 0.64]" in only(retrieval(ours, ours, baselines=[row]), "Warning")
    row["ci_low"] = 0.49
    assert not [t for t in verdict(retrieval(ours, ours, baselines=[row])) if "Warning" in t]


def test_the_best_baseline_is_the_one_with_the_highest_auc():
    rows = [{"name": name, "auc": auc} for name, auc in (("a", 0.6), ("b", 0.7), ("c", None))]
    assert best_baseline({"baselines": rows}) == "b"
    assert best_baseline({}) is None


def test_tied_scores_are_no_certain_half():
    assert is_tied({"auc": 0.5, "standard_error": 0.0})
    assert not is_tied({"auc": 0.5, "standard_error": 0.02})
    assert not is_tied({"auc": 0.5})


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
    assert "Of 5 targets" in text
    assert "brain embedding 3 (cognition, trait_1, sex)" in text


def test_residualised_rows_decide_where_there_are_any():
    row = {"target": "x", "metric": "r2", "chance": 0.0, "p_value": 0.001}
    rows = [
        {**row, "features": "confounds only", "value": 0.3, "ci_low": 0.2},
        {**row, "features": "net", "value": 0.6, "ci_low": 0.5},
        {**row, "features": "net | confounds", "value": 0.01, "ci_low": -0.05},
    ]
    assert "none of 1 targets" in only({"probes": rows}, "Probes")
    rows[2]["ci_low"] = 0.005
    assert "net 1 (x)" in only({"probes": rows}, "probes")


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


def test_a_baseline_with_a_small_p_and_an_interval_over_chance_is_not_called_nothing():
    nothing = direction(0.49, 0.45, 0.53, 0.6)
    rows = [
        {"name": name, "direction": way, **direction(0.54, 0.499, 0.58, p)}
        for name, p in (("one", 0.018), ("two", 0.4))
        for way in ("brain_to_dna", "dna_to_brain")
    ]
    text = only(retrieval(nothing, nothing, baselines=rows), "baseline")
    assert "No baseline finds anything clearly: the best of 2 is one, with AUC 0.54" in text
    assert "p = 0.018, not corrected for their number" in text


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
        "p < 0.001",
        "p = 0.031",
    ]
    assert p_text(1 / 1000, 999) == "p = 0.001 (smallest possible with 999 permutations)"
    assert p_text(2 / 1000, 999) == "p = 0.002"
    assert p_text(1 / 10_000, 9999) == "p = 0.0001 (smallest possible with 9,999 permutations)"


def test_what_is_below_one_is_never_printed_as_one():
    assert [rounded(v) for v in (0.994, 0.9975, 0.99996, 1.0)] == [
        "0.99",
        "0.998",
        "0.99996",
        "1.00",
    ]
    assert [rounded(v) for v in (-0.001, -0.25, 1.004)] == ["0.00", "-0.25", "1.00"]
    assert with_interval({"auc": 0.99, "ci_low": 0.98, "ci_high": 0.997}) == "0.99 [0.98, 0.997]"
