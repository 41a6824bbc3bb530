import numpy as np
import polars as pl

from brainfusion.eval.retrieval.metrics import stratified_auc
from brainfusion.eval.retrieval.strata import sex_age_bands, standard_strata, unrelated


def test_bands_join_sex_and_five_years_and_leave_out_the_unknown() -> None:
    labels = sex_age_bands(["F", "M", "F", None, "M"], [45.0, 49.9, 50.0, 50.0, float("nan")])
    assert labels == ["F 45-49", "M 45-49", "F 50-54", None, None]


def test_one_random_person_stands_for_each_family() -> None:
    families = ["a", "a", "b", None, None, "b", "a"]
    chosen = [np.flatnonzero(unrelated(families, seed=seed)) for seed in range(40)]
    for people in chosen:
        assert sorted(str(families[i]) for i in people) == ["None", "None", "a", "b"]
    assert set(np.concatenate(chosen)) == set(range(7))


def test_strata_are_those_of_the_columns_there_are() -> None:
    people = pl.DataFrame({"site": ["x", None], "age": [40.0, None], "sex": ["F", "M"]})
    assert standard_strata(people) == {
        "same site": ["x", None],
        "same sex and age band": ["F 40-44", None],
    }
    assert list(standard_strata(people, ["a", "b"])) == [
        "same site",
        "same sex and age band",
        "unrelated only",
    ]
    with_group = people.with_columns(group=pl.Series(["g", "g"]), family=pl.Series(["f", "f"]))
    assert "same ancestry group" in standard_strata(with_group)
    assert sum(label is not None for label in standard_strata(with_group)["unrelated only"]) == 1


def test_retrieval_that_rests_on_age_disappears_within_its_bands() -> None:
    rng = np.random.default_rng(0)
    n = 400
    age = rng.uniform(40, 70, n)
    sex = rng.choice(["F", "M"], n)
    u, v = (
        np.stack([age / 4, 6.0 * (sex == "F")], axis=1) + rng.standard_normal((n, 2)) for _ in "uv"
    )
    u, v = u - u.mean(0), v - v.mean(0)
    # Minus half the squared distance, as an inner product.
    u = np.c_[u, np.ones(n)]
    v = np.c_[v, -(v**2).sum(1) / 2]
    everyone = stratified_auc(u, v, {"all": [0] * n})[0]
    strata = standard_strata(pl.DataFrame({"age": age, "sex": sex}))
    within = stratified_auc(u, v, strata, n_bootstrap=200)[0]
    assert everyone["auc"] > 0.75
    # What is left is age within five years.
    assert within["auc"] < 0.62
