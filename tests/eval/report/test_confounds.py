"""What the verdict says of confounds, hidden relatives and the best linear model."""

import pytest

from tests.eval.report.test_verdict import direction, only, retrieval, verdict


def test_a_finding_of_the_naive_test_alone_warns_in_one_sentence():
    row = direction(
        0.71, 0.67, 0.75, 0.31, p_value_freely_exchanged=0.001, exchanged_within=["site", "group"]
    )
    assert only(retrieval(row, row), "exchanging everybody") == (
        "Warning: exchanging everybody with everybody would call this an alignment (p = 0.001), "
        "exchanging people within their site and ancestry group does not (p = 0.31). What people "
        "of one site or ancestry group have in common explains it, not a link within the person."
    )
    row["exchanged_within"] = ["family"]
    text = only(retrieval(row, row), "exchanging everybody")
    assert "exchanging whole families does not" in text
    assert "What people of one family have in common" in text


@pytest.mark.parametrize(
    ("within", "free"), [(0.31, 0.2), (0.001, 0.001), (0.31, None), (0.001, None)]
)
def test_two_tests_that_agree_warn_of_nothing(within, free):
    row = direction(0.6, 0.49, 0.71, within, p_value_freely_exchanged=free)
    assert not [t for t in verdict(retrieval(row, row)) if "exchanging" in t]


def test_hidden_relatives_are_counted_and_the_way_out_is_said():
    row = direction(0.6, 0.56, 0.64, 0.001)
    known = {"n_test": 200, "n_alike": 172, "n_by_chance": 2, "warns": True}
    text = only(retrieval(row, row, relatives=known), "as alike as a sibling's")
    assert text.startswith("Warning: 172 of 200 test people have somebody in training")
    assert "name the families in subjects.parquet, delete splits.json" in text
    known["warns"] = False
    assert not [t for t in verdict(retrieval(row, row, relatives=known)) if "sibling" in t]


def test_a_stratum_warns_of_a_weak_finding_too():
    row = direction(0.71, 0.67, 0.75, 0.31)
    strata = [{"name": "same site", "auc": 0.51, "ci_low": 0.46, "ci_high": 0.56}]
    assert "(same site)" in only(retrieval(row, row, strata=strata), "no longer told apart")


def linear(auc: float, low: float, high: float) -> dict:
    return {"auc": auc, "ci_low": low, "ci_high": high, "n_pairs": 1000, "p_value": 0.001}


def test_the_share_of_the_best_linear_model_is_said():
    row = direction(0.61, 0.57, 0.65, 0.001)
    text = only(retrieval(row, row, attainable_linear=linear(0.62, 0.58, 0.66)), "linear-Gaussian")
    assert text == (
        "The aligner reaches 0.92 of the best linear-Gaussian model's AUC above chance, 0.62 "
        "[0.58, 0.66] learnt from as many people."
    )
    text = only(retrieval(row, row, attainable_linear=linear(0.53, 0.52, 0.55)), "linear-Gaussian")
    assert text.endswith("learnt from as many people: it finds what no linear model does.")


def test_a_linear_model_that_finds_nothing_is_said_to():
    null = direction(0.51, 0.47, 0.55, 0.4)
    nothing = linear(0.5, 0.5, 0.534)
    text = only(retrieval(null, null, attainable_linear=nothing), "linear-Gaussian")
    assert text == (
        "Nor does a linear-Gaussian model learnt from as many people: its AUC is 0.50, at most "
        "0.53."
    )
    row = direction(0.61, 0.57, 0.65, 0.001)
    text = only(retrieval(row, row, attainable_linear=nothing), "linear-Gaussian")
    assert text.startswith("A linear-Gaussian model learnt from as many people finds nothing")


def test_a_linear_model_is_no_measure_of_a_run_that_finds_nothing():
    null = direction(0.51, 0.47, 0.55, 0.4)
    found = retrieval(null, null, attainable_linear=linear(0.62, 0.58, 0.66))
    assert not [text for text in verdict(found) if "linear-Gaussian" in text]
