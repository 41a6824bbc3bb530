"""Paired comparisons of probes: against DeLong of one fold, the bootstrap, and known truths."""

from dataclasses import replace

import numpy as np
import polars as pl
import pytest
from scipy.stats import kstest

from brainfusion.eval.paired import compare_auroc
from brainfusion.eval.probing.differences import differences
from brainfusion.eval.probing.jobs import Found, People, main_draws
from brainfusion.eval.probing.probes import Extras, probe
from brainfusion.eval.probing.targets import Target
from brainfusion.eval.statistics import bootstrap_weights
from brainfusion.runtime.errors import UserError


def people(n: int, *, n_folds: int, n_families: int, n_draws: int = 0) -> People:
    family = np.arange(n) % n_families
    weights = bootstrap_weights(n_families, n_draws, 0)[:, family].astype(float)
    folds = family % n_folds
    return People(pl.DataFrame(), family, folds, np.empty((0, n), int), weights)


def predictions(name: str, y: np.ndarray, values: np.ndarray, n_classes: int | None) -> Found:
    classes = tuple(str(k) for k in range(n_classes or 0))
    target = Target("t", np.ones(len(y), bool), y, classes)
    true = y[:, None], values, np.zeros_like(values)
    return Found(
        target=target, name=name, model="", confounds="", true=true, null=None, penalty=None
    )


def compared(one: Found, other: Found, who: People) -> dict:
    found = {(f.name, "t"): f for f in (one, other)}
    [[row]] = differences(found, [(one.name, other.name)], who, seed=0).values()
    return row


def two_class(n: int, rng: np.random.Generator) -> tuple[Found, Found]:
    y = (rng.random(n) < 0.4).astype(float)
    shared = rng.standard_normal(n)
    first, second = (
        predictions(name, y, (shared + effect * y + rng.standard_normal(n))[:, None, None], 2)
        for name, effect in (("a", 1.5), ("b", 0.8))
    )
    return first, second


@pytest.mark.parametrize("n_families", [150, 60])
def test_of_one_fold_it_is_delong(n_families: int):
    one, other = two_class(150, np.random.default_rng(0))
    who = people(150, n_folds=1, n_families=n_families)
    row = compared(one, other, who)
    expected = compare_auroc(
        one.true[0][:, 0] > 0,
        one.true[1][:, 0, 0],
        other.true[1][:, 0, 0],
        families=who.family,
        n_permutations=1,
    )
    for name in ("difference", "ci_low", "ci_high", "p_value"):
        assert row[name] == pytest.approx(expected[name], rel=1e-9), name
    assert row["test"] == "DeLong"


@pytest.mark.parametrize("n_classes", [2, 3])
def test_over_folds_and_classes_it_is_the_difference_of_the_rows_with_the_bootstraps_spread(
    n_classes: int,
):
    rng = np.random.default_rng(1)
    n = 600
    who = people(n, n_folds=4, n_families=400, n_draws=2000)
    if n_classes == 2:
        one, other = two_class(n, rng)
    else:
        y = rng.integers(0, 3, n).astype(float)
        hot = (y[:, None] == np.arange(3)) * 1.0
        one, other = (
            predictions(name, y, (e * hot + rng.standard_normal((n, 3)))[:, None], 3)
            for name, e in (("a", 1.2), ("b", 0.9))
        )
    row = compared(one, other, who)
    (a, draws_a), (b, draws_b) = main_draws(one, who), main_draws(other, who)
    assert row["difference"] == pytest.approx(a - b, abs=1e-9)
    half = (row["ci_high"] - row["ci_low"]) / 2
    assert half == pytest.approx(1.96 * (draws_a - draws_b).std(), rel=0.1)


def test_numbers_get_the_difference_of_r2_and_the_intervals_bootstrap():
    rng = np.random.default_rng(2)
    y = rng.standard_normal(200)
    one, other = (
        predictions(name, y, (s * y + 0.3 * rng.standard_normal(200))[:, None], None)
        for name, s in (("a", 0.6), ("b", 0.3))
    )
    who = people(200, n_folds=4, n_families=120, n_draws=500)
    row = compared(one, other, who)
    (a, draws_a), (b, draws_b) = main_draws(one, who), main_draws(other, who)
    assert row["difference"] == pytest.approx(a - b)
    assert row["ci_low"] == pytest.approx(np.quantile(draws_a - draws_b, 0.025), abs=1e-9)
    assert row["p_value"] == pytest.approx(1 / 5000)
    turned = compared(other, one, who)
    assert turned["difference"] == pytest.approx(b - a)
    assert turned["p_value"] == row["p_value"]
    same = compared(one, replace(one, name="c"), who)
    assert (same["difference"], same["p_value"]) == (0.0, 1.0)


def cohort(n: int, seed: int) -> tuple[dict[str, np.ndarray], pl.DataFrame]:
    """Two equally good views of a number, and of a label, and one that knows more."""
    rng = np.random.default_rng(seed)
    number = rng.standard_normal(n)
    label = (number + 0.5 * rng.standard_normal(n) > 0).astype(int)
    views = {
        name: np.stack([number + noise * rng.standard_normal(n), rng.standard_normal(n)], axis=1)
        for name, noise in (("a", 1.0), ("b", 1.0), ("good", 0.3))
    }
    return views, pl.DataFrame({"subject": [str(i) for i in range(n)], "x": number, "mdd": label})


def test_equally_good_features_get_uniform_p_values_and_better_ones_are_found():
    equal: dict[str, list[float]] = {"x": [], "mdd": []}
    for seed in range(40):
        views, subjects = cohort(90, seed)
        extras = Extras(compare=[("a", "b"), ("good", "a")])
        table = probe(
            views, subjects, ["x", "mdd"], confounds=[], n_permutations=0, n_bootstrap=0,
            n_folds=3, penalties=[1.0], seed=seed, extras=extras,
        )  # fmt: skip
        for row in table.iter_rows(named=True):
            for one in row["comparisons"]:
                if row["features"] == "a":
                    equal[row["target"]].append(one["p_value"])
                elif row["target"] == "x":
                    assert one["p_value"] < 0.01
                    assert one["difference"] > 0.1
    for name, p in equal.items():
        assert len(p) == 40
        assert kstest(p, "uniform").pvalue > 0.01, name


def test_comparisons_stand_in_the_row_of_the_first_with_q_values_over_targets():
    views, subjects = cohort(150, 0)
    extras = Extras(
        compare=[("good", "b"), ("good + a", "good"), ("good", "confounds only")],
        fusion=[("good", "a")],
    )
    subjects = subjects.with_columns(pl.col("x").round(0).alias("age"))
    table = probe(
        views, subjects, ["x", "mdd"], confounds=["age"], n_permutations=0, n_bootstrap=50,
        seed=0, extras=extras,
    )  # fmt: skip
    rows = {(r["target"], r["features"]): r["comparisons"] for r in table.iter_rows(named=True)}
    assert [one["against"] for one in rows["x", "good"]] == ["b", "confounds only"]
    assert [one["against"] for one in rows["mdd", "good + a"]] == ["good"]
    assert rows["x", "b"] == []
    p = sorted(rows[target, "good"][0]["p_value"] for target in ("x", "mdd"))
    q = sorted(rows[target, "good"][0]["q_value"] for target in ("x", "mdd"))
    assert q == pytest.approx([min(2 * p[0], p[1]), p[1]])


def test_comparisons_that_cannot_be_made_are_refused_before_any_work():
    views, subjects = cohort(150, 0)
    subjects = subjects.with_columns(pl.lit(1.0).alias("age") + pl.col("x").round(0))
    for pair, text in (
        (("good", "bb"), r"comparison with 'bb', which has no row\. .*Known"),
        (("good", "good"), "compared with itself"),
    ):
        with pytest.raises(UserError, match=text):
            probe(views, subjects, ["x"], confounds=["age"], extras=Extras(compare=[pair]))
    with pytest.raises(UserError, match="is not of the same part of x"):
        probe(
            views, subjects, ["x"], confounds=["age"], n_permutations=0, n_bootstrap=0,
            extras=Extras(compare=[("good | confounds", "good")]),
        )  # fmt: skip
