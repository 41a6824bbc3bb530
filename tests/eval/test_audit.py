import numpy as np
import polars as pl
import pytest

from brainfusion.eval.audit import fingerprint, id_order, predictions, similarities
from brainfusion.runtime.errors import UserError


def two_sessions(n=40, d=300, seed=0, noise=1.0):
    """Rows that know who they are: a person's own pattern, and noise of each session."""
    rng = np.random.default_rng(seed)
    own = rng.standard_normal((n, d))
    return [own + noise * rng.standard_normal((n, d)) for _ in range(2)]


def people_with_age(n, seed=0):
    age = np.random.default_rng([seed, 1]).normal(50, 10, n)
    return pl.DataFrame({"subject": [f"{i:04d}" for i in range(n)], "age": age})


def test_ids_are_ordered_as_people_do():
    ids = ["sub-10", "sub-2", "sub-1", "a", "sub-2b"]
    assert [ids[i] for i in id_order(ids)] == ["a", "sub-1", "sub-2", "sub-2b", "sub-10"]


def test_sessions_of_the_same_people_are_aligned():
    first, second = two_sessions()
    places = np.arange(40)
    check = fingerprint(first, second, (places, places), what="two sessions")
    assert (check.verdict, check.best) == ("aligned", 0)
    assert check.recall_at_1[check.shifts.index(0)] == 1.0
    expected = np.mean([np.corrcoef(a, b)[0, 1] for a, b in zip(first, second, strict=True)])
    assert check.agreement[check.shifts.index(0)] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("shift", [-3, -1, 1, 4])
def test_a_shifted_session_is_found_with_its_shift(shift):
    first, second = two_sessions()
    check = fingerprint(
        first, np.roll(second, shift, axis=0), (np.arange(40), np.arange(40)), what="sessions"
    )
    assert (check.verdict, check.best) == ("shifted", shift)
    assert "SHIFTED" in check.sentence()


def test_a_session_that_some_people_lack_is_compared_by_place_not_by_row():
    first, second = two_sessions()
    there = np.delete(np.arange(40), [3, 17, 18])
    check = fingerprint(first, second[there], (np.arange(40), there), what="sessions")
    assert (check.verdict, check.best, check.n_people) == ("aligned", 0, 37)


def test_random_pairings_are_never_called_shifted():
    verdicts = set()
    for seed in range(60):
        first, second = two_sessions(n=30, d=40, seed=seed)
        order = np.random.default_rng([seed, 2]).permutation(30)
        places = (np.arange(30), np.arange(30))
        verdicts.add(fingerprint(first, second[order], places, what="s", seed=seed).verdict)
    assert "shifted" not in verdicts
    assert "unclear" in verdicts


@pytest.mark.parametrize("shift", [0, -1, 2])
def test_features_predict_the_people_that_they_belong_to(shift):
    n = 200
    people = people_with_age(n)
    rng = np.random.default_rng(3)
    features = rng.standard_normal((n, 50))
    features[:, 0] += 2 * (people["age"].to_numpy() - 50) / 10
    (check,) = predictions(np.roll(features, shift, axis=0), people, ["age"], what="features")
    # Row i holds the features of person i - shift.
    assert check.best == -shift
    assert check.verdict == ("shifted" if shift else "aligned")


def test_features_that_know_nothing_are_unclear():
    people = people_with_age(150)
    features = np.random.default_rng(4).standard_normal((150, 30))
    (check,) = predictions(features, people, ["age"], what="features")
    assert check.verdict == "unclear"
    assert "cannot tell" in check.sentence()


def test_sorting_people_by_site_does_not_look_like_a_shift():
    # Neighbours share a site that features show, so every small shift predicts nearly as well.
    n = 200
    site = np.repeat(np.arange(10), 20) * 1.0
    people = people_with_age(n).with_columns(age=pl.Series(site))
    features = np.random.default_rng(5).standard_normal((n, 20)) + site[:, None]
    (check,) = predictions(features, people, ["age"], what="features")
    assert check.verdict == "aligned"


def test_labels_are_predicted_and_constants_are_left_out():
    n = 120
    sex = ["F" if i % 2 else "M" for i in range(n)]
    people = people_with_age(n).with_columns(sex=pl.Series(sex), motion=pl.lit(0.1))
    features = np.random.default_rng(6).standard_normal((n, 10))
    features[:, 0] += np.array([2.0 if label == "F" else -2.0 for label in sex])
    found = predictions(features, people, ["sex", "motion"], what="features")
    assert [check.what for check in found] == ["features and sex"]
    assert found[0].verdict == "aligned"


@pytest.mark.parametrize("shift", [0, 1, -4])
def test_two_tables_of_features_are_compared_by_who_is_like_whom(shift):
    rng = np.random.default_rng(7)
    latent = rng.standard_normal((100, 5))
    first = latent @ rng.standard_normal((5, 60)) + 0.5 * rng.standard_normal((100, 60))
    second = latent @ rng.standard_normal((5, 30)) + 0.5 * rng.standard_normal((100, 30))
    check = similarities(first, np.roll(second, shift, axis=0), what="two tables")
    assert (check.verdict, check.best) == ("shifted" if shift else "aligned", shift)


def test_too_few_people_are_refused():
    first, second = two_sessions(n=8)
    with pytest.raises(UserError, match="fewer than 12"):
        fingerprint(first, second, (np.arange(8), np.arange(8)), what="sessions")
