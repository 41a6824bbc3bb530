"""Metrics, fusion, neighbours, principal components and learning curves of the probes."""

import numpy as np
import polars as pl
import pytest
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import (
    average_precision_score,
    balanced_accuracy_score,
    brier_score_loss,
    mean_absolute_error,
    r2_score,
    roc_auc_score,
)
from sklearn.metrics import log_loss as reference_log_loss
from sklearn.neighbors import KNeighborsClassifier, KNeighborsRegressor

from brainfusion.eval.probing.jobs import People
from brainfusion.eval.probing.knn import Neighbours, NeighbourSearch
from brainfusion.eval.probing.learning_curve import learners_of
from brainfusion.eval.probing.linear import FeatureSpace, RidgeSearch
from brainfusion.eval.probing.logistic import probabilities
from brainfusion.eval.probing.metrics import (
    class_metrics,
    continuous_metrics,
    cox_calibration,
    fold_average_precision,
    reliability,
)
from brainfusion.eval.probing.probes import Extras, probe, tidy
from brainfusion.eval.probing.stacking import stacked
from brainfusion.runtime.errors import UserError

RNG = np.random.default_rng


def metrics_of(row: dict) -> dict[str, dict]:
    return {one["metric"]: one for one in row["metrics"]}


def by_name(table: pl.DataFrame) -> dict[tuple[str, str], dict]:
    return {(r["target"], r["features"]): r for r in table.iter_rows(named=True)}


# -- metrics -----------------------------------------------------------------------------------


@pytest.mark.parametrize("n_classes", [2, 3])
def test_class_metrics_are_those_of_scikit_learn(n_classes) -> None:
    rng = RNG(0)
    labels = rng.integers(0, n_classes, 200).astype(float)
    g = 1 if n_classes == 2 else n_classes
    # Rounded, so that there are ties; one fold, as scikit-learn knows no folds.
    logits = np.round(rng.standard_normal((200, 1, g)) + (labels[:, None, None] == 1), 1)
    prior = np.zeros((200, 1, g))
    folds = np.zeros(200, int)
    found = {k: v[0] for k, v in class_metrics(labels[:, None], logits, prior, folds).items()}
    p = probabilities(logits)[:, 0]
    if n_classes == 2:
        p = p[:, 0]
        expected = {
            "auroc": roc_auc_score(labels, p),
            "auprc": average_precision_score(labels, p),
            "brier": brier_score_loss(labels, p),
            "balanced_accuracy": balanced_accuracy_score(labels, p > 0.5),
        }
    else:
        hot = labels[:, None] == np.arange(n_classes)
        expected = {
            "auroc": roc_auc_score(labels, p, multi_class="ovr", average="macro"),
            "auprc": average_precision_score(hot, p, average="macro"),
            "brier": ((p - hot) ** 2).sum(axis=1).mean(),
            "balanced_accuracy": balanced_accuracy_score(labels, p.argmax(axis=1)),
        }
    expected["log_loss"] = reference_log_loss(labels, p)
    assert found == pytest.approx(expected, abs=1e-6)


def test_continuous_metrics_are_those_of_scikit_learn() -> None:
    rng = RNG(1)
    y = rng.standard_normal((90, 1))
    predicted = 0.4 * y + 0.5 * rng.standard_normal((90, 1))
    found = continuous_metrics(y, predicted, np.full((90, 1), y.mean()), np.zeros(90, int))
    assert found["r2"][0] == pytest.approx(r2_score(y, predicted))
    assert found["mae"][0] == pytest.approx(mean_absolute_error(y, predicted))
    assert found["r"][0] == pytest.approx(np.corrcoef(y.T, predicted.T)[0, 1])
    assert found["calibration_slope"][0] == pytest.approx(np.polyfit(predicted[:, 0], y, 1)[0, 0])


@pytest.mark.parametrize("n_classes", [None, 2, 3])
def test_a_bootstrap_weight_is_so_many_copies_of_a_person(n_classes) -> None:
    rng = RNG(2)
    weights = rng.integers(0, 3, (4, 60)).astype(float)
    folds = np.arange(60) % 3
    if n_classes is None:
        compute, arrays = continuous_metrics, [rng.standard_normal((60, 1)) for _ in range(3)]
    else:
        g = 1 if n_classes == 2 else n_classes
        labels = rng.integers(0, n_classes, (60, 1)).astype(float)
        arrays = [labels, rng.standard_normal((60, 1, g)), 0.1 * rng.standard_normal((60, 1, g))]
        compute = class_metrics
    found = compute(*arrays, folds, weights)
    for i, weight in enumerate(weights.astype(int)):
        rows = np.repeat(np.arange(60), weight)
        expected = compute(*(a[rows] for a in arrays), folds[rows])
        for name, values in found.items():
            assert values[i] == pytest.approx(expected[name][0], abs=1e-6), name


def test_columns_are_judged_each_by_itself() -> None:
    rng = RNG(3)
    scores, labels = np.round(rng.standard_normal((50, 6)), 1), rng.random((50, 6)) < 0.4
    folds = np.arange(50) % 2
    together = fold_average_precision(scores, labels, folds)
    for j in range(6):
        alone = fold_average_precision(scores[:, [j]], labels[:, [j]], folds)
        assert together[j] == pytest.approx(alone[0])


def test_calibration_slope_and_intercept_are_those_of_a_logistic_regression() -> None:
    rng = RNG(4)
    logits = 2 * rng.standard_normal(3000) - 1
    labels = (rng.random(3000) < 1 / (1 + np.exp(-(0.5 * logits + 0.3)))).astype(float)
    found = cox_calibration(labels, logits)
    model = LogisticRegression(C=np.inf, tol=1e-10).fit(logits[:, None], labels)
    assert found["calibration_slope"][0] == pytest.approx(model.coef_[0, 0], abs=1e-4)
    assert found["calibration_slope"][0] == pytest.approx(0.5, abs=0.08)
    shifted = 1 / (1 + np.exp(-(logits + found["calibration_intercept"][0])))
    assert shifted.mean() == pytest.approx(labels.mean(), abs=1e-6)
    assert np.isnan(cox_calibration(labels, np.zeros(3000))["calibration_slope"][0])


def test_reliability_bins_hold_everyone_and_their_gaps_are_the_calibration_error() -> None:
    rng = RNG(5)
    logits = rng.standard_normal((5000, 1))
    labels = (rng.random(5000) < 1 / (1 + np.exp(-logits[:, 0]))).astype(float)
    error, bins = reliability(labels, logits, np.ones((0, 5000)))
    assert error < 0.03
    assert sum(one["n"] for one in bins) == 5000
    assert len(bins) == 10
    worse, bins = reliability(labels, 4 * logits, rng.integers(0, 3, (50, 5000)).astype(float))
    assert worse > 0.1
    gaps = [one["n"] * abs(one["predicted"] - one["observed"]) for one in bins]
    assert worse == pytest.approx(sum(gaps) / 5000)
    assert all(one["ci_low"] <= one["observed"] <= one["ci_high"] for one in bins)


# -- neighbours, principal components ------------------------------------------------------------


@pytest.mark.parametrize("n_classes", [None, 2, 3])
def test_neighbours_equal_scikit_learn_with_the_best_count_of_the_inner_folds(n_classes) -> None:
    rng = RNG(6)
    x, folds = rng.standard_normal((90, 4)), np.arange(90) % 3
    y = x[:, 0] + 0.3 * rng.standard_normal(90)
    if n_classes:
        y = np.digitize(y, np.quantile(y, np.arange(1, n_classes) / n_classes)).astype(float)
    space = FeatureSpace(x, folds)
    counts = (1, 3, 8)
    search = NeighbourSearch(Neighbours(space, counts), y[:, None], n_classes=n_classes)
    for pair in ((0, 1), (0, 2), (1, 2)):
        search.inner(pair)
    for fold in range(3):
        search.outer(fold)
        train, rows = folds != fold, folds == fold
        count = counts[search.chosen[fold, 0]]
        if n_classes is None:
            model = KNeighborsRegressor(count).fit(space.x[train], y[train])
            expected = model.predict(space.x[rows])
            np.testing.assert_allclose(search.predictions[rows, 0], expected, atol=1e-6)
            errors = [
                np.mean([
                    ((KNeighborsRegressor(k).fit(space.x[t], y[t]).predict(space.x[v]) - y[v]) ** 2)
                    .mean()
                    for t, v in (
                        (train & (folds != held), folds == held)
                        for held in range(3) if held != fold
                    )
                ])
                for k in counts
            ]  # fmt: skip
            assert np.argmin(errors) == search.chosen[fold, 0]
        else:
            model = KNeighborsClassifier(count).fit(space.x[train], y[train])
            share = np.bincount(y[train].astype(int)) / train.sum()
            expected = (count * model.predict_proba(space.x[rows]) + share) / (count + 1)
            found = search.predictions[rows, 0]
            # Two classes are log odds; several are logs of what does not quite add up to 1 alike.
            p = 1 / (1 + np.exp(-found)) if n_classes == 2 else np.exp(found)
            np.testing.assert_allclose(p, expected[:, -p.shape[1] :], atol=1e-5)


@pytest.mark.parametrize("dim", [12, 80])
def test_principal_components_are_those_of_the_training_people(dim) -> None:
    rng = RNG(7)
    x = rng.standard_normal((60, dim)) * np.arange(1, dim + 1) ** -0.7 + 2
    folds = np.arange(60) % 3
    space = FeatureSpace(x, folds).narrowed(4)
    values, found = space.basis((1,))
    train = folds != 1
    reference = PCA(4, svd_solver="full").fit(space.x[train])
    expected = reference.transform(space.x)[:, ::-1]
    np.testing.assert_allclose(np.abs(found), np.abs(expected), atol=1e-8)
    np.testing.assert_allclose(values / (train.sum() - 1), reference.explained_variance_[::-1])


# -- fusion --------------------------------------------------------------------------------------


def finished(x: np.ndarray, y: np.ndarray, folds: np.ndarray) -> RidgeSearch:
    space = FeatureSpace(x, folds)
    search = RidgeSearch(folds, np.ones((len(x), 1)), y, np.array([1.0, 10.0, 100.0]))
    pairs = [(i, j) for i in range(4) for j in range(i + 1, 4)]
    for pair in pairs:
        search.inner(pair, space.basis(pair))
    for pair in pairs:
        search.again(pair, space.basis(pair))
    for fold in range(4):
        search.outer(fold, space.basis((fold,)))
    return search


def test_inner_predictions_come_from_models_that_have_not_seen_the_person() -> None:
    rng = RNG(8)
    x, folds = rng.standard_normal((80, 5)), np.arange(80) % 4
    y = rng.standard_normal((80, 1))
    before = finished(x, y, folds).inner_predictions
    assert before is not None
    # Whoever is in folds 0 and 1 changes nothing of what fold 0's models say of fold 1.
    changed = y.copy()
    changed[(folds == 0)] += 100
    after = finished(x, changed, folds).inner_predictions
    assert after is not None
    rows = folds == 1
    # The penalty is chosen from folds 1 to 3, which are as they were.
    np.testing.assert_allclose(before[0, rows], after[0, rows])
    assert not np.allclose(before[2, rows], after[2, rows])


def test_weights_of_a_stack_are_those_of_nonnegative_least_squares() -> None:
    from scipy.optimize import nnls

    rng = RNG(9)
    folds = np.arange(120) % 4
    x, other, noise = (rng.standard_normal((120, 6)) for _ in range(3))
    y = x[:, :1] + other[:, :1] + rng.standard_normal((120, 1))
    parts = [finished(v, y, folds) for v in (x, other, noise)]
    joined, weights = stacked(parts, folds, n_classes=None)
    for fold in range(4):
        train = folds != fold
        base = parts[0].inner_baseline[fold, train, 0]
        a = np.stack([p.inner_predictions[fold, train, 0] - base for p in parts], axis=1)
        np.testing.assert_allclose(weights[fold, :, 0], nnls(a, y[train, 0] - base)[0], atol=1e-4)
    assert (weights >= 0).all()
    error = [((p - y) ** 2).mean() for p in (joined, parts[0].predictions, parts[1].predictions)]
    assert error[0] < 0.7 * min(error[1:])


def cohort(n: int = 300, seed: int = 0) -> tuple[dict[str, np.ndarray], pl.DataFrame]:
    """Two kinds of features; traits that both know a part of."""
    rng = RNG(seed)
    brain, dna = rng.standard_normal((n, 8)), rng.standard_normal((n, 10))
    score = brain[:, 0] + dna[:, 0]
    subjects = pl.DataFrame(
        {
            "family": [f"f{i // 2}" if i < n // 2 else None for i in range(n)],
            "age": rng.normal(50, 10, n),
            "trait": score + rng.standard_normal(n),
            "case": score + rng.standard_normal(n) > 1,
            "group": np.array(["low", "mid", "top"])[
                np.digitize(score + rng.standard_normal(n), [-1, 1])
            ],
        }
    )
    return {"brain": brain, "dna": dna}, subjects


def test_fusion_of_what_differs_beats_either_part_for_each_kind_of_target() -> None:
    features, subjects = cohort()
    table = probe(
        features, subjects, ["trait", "case", "group"], confounds=["age"],
        penalties=[1.0, 10.0, 100.0], n_permutations=19, n_bootstrap=100,
        extras=Extras(fusion=[("brain", "dna")]),
    )  # fmt: skip
    row = by_name(table)
    for target in ("trait", "case", "group"):
        both = row[target, "brain + dna"]
        assert both["value"] > max(row[target, name]["value"] for name in features)
        gain = metrics_of(both)["gain_over_best_part"]
        assert gain["ci_low"] > 0
        assert both["p_value"] == 0.05
        assert both["model"] == "stacked"
        assert row[target, "brain + dna | confounds"]["confounds"] == "age"


def test_fusion_with_noise_is_no_worse_than_the_part_that_knows() -> None:
    features, subjects = cohort()
    features["noise"] = RNG(1).standard_normal((300, 50))
    table = probe(
        features, subjects, ["trait", "case"], confounds=[], n_permutations=0, n_bootstrap=0,
        extras=Extras(fusion=[("brain", "noise")]),
    )  # fmt: skip
    row = by_name(table)
    for target in ("trait", "case"):
        assert row[target, "brain + noise"]["value"] > row[target, "brain"]["value"] - 0.02


@pytest.mark.slow
def test_p_values_of_several_classes_fusion_and_neighbours_are_uniform_under_the_null() -> None:
    p = []
    for seed in range(40):
        rng = RNG(seed)
        subjects = pl.DataFrame(
            {"a": rng.standard_normal(60), "b": rng.choice(["x", "y", "z"], 60)}
        )
        features = {"one": rng.standard_normal((60, 4)), "two": rng.standard_normal((60, 3))}
        table = probe(
            features, subjects, ["a", "b"], confounds=[], n_folds=3, penalties=[1.0, 100.0],
            n_permutations=19, n_bootstrap=0, seed=seed,
            extras=Extras(fusion=[("one", "two")], neighbours=True),
        )  # fmt: skip
        wanted = table.filter(pl.col("features").is_in(["one", "one, kNN", "one + two"]))
        p.append(wanted.sort("target", "features")["p_value"].to_list())
    for column in np.array(p).T:
        # 40 draws of 20 equal steps: the distance stays below 0.28 with probability 0.99.
        assert np.abs(np.sort(column) - np.arange(1, 41) / 40).max() < 0.28


# -- the whole -----------------------------------------------------------------------------------


def test_every_row_has_every_metric_of_its_kind_with_interval_and_p() -> None:
    features, subjects = cohort()
    table = probe(
        features, subjects, ["trait", "case", "group"], n_permutations=19, n_bootstrap=50,
        penalties=[1.0, 10.0, 100.0],
        extras=Extras(neighbours=True, pca=["dna"], n_pcs=3),
    )  # fmt: skip
    rows = by_name(table)
    assert {name for _, name in rows} >= {"dna, 3 PCs", "dna, 3 PCs | confounds", "brain, kNN"}
    assert {r["model"] for r in rows.values()} == {"linear", "kNN"}
    kinds = {"trait": "continuous", "case": "binary", "group": "multi-class"}
    for (target, _), row in rows.items():
        assert row["kind"] == kinds[target]
        found = metrics_of(row)
        tested = ["r2", "r", "mae"]
        if target != "trait":
            tested = ["auroc", "auprc", "balanced_accuracy", "log_loss", "brier"]
            assert found["expected_calibration_error"]["value"] >= 0
            assert sum(one["n"] for one in row["reliability"]) == 300
        for name in tested:
            assert found[name]["ci_low"] <= found[name]["value"] <= found[name]["ci_high"]
            assert 0.05 <= found[name]["p_value"] <= 1
            assert np.isfinite(found[name]["chance"])
        assert row["metrics"][0] | {"chance": 0} == {key: row[key] for key in found["r2" if
            target == "trait" else "auroc"]} | {"chance": 0}  # fmt: skip
    assert rows["group", "brain"]["n_classes"] == 3
    assert metrics_of(rows["trait", "brain"])["mae"]["p_value"] == 0.05
    assert metrics_of(rows["case", "brain"])["brier"]["p_value"] == 0.05
    assert metrics_of(rows["case", "brain"])["brier"]["value"] < 0.24
    long = tidy(table)
    assert long.height == sum(len(row["metrics"]) for row in rows.values())
    assert {"target", "features", "metric", "value", "ci_low", "p_value"} <= set(long.columns)


def test_p_values_are_adjusted_for_all_targets_of_a_representation() -> None:
    features, subjects = cohort()
    rng = RNG(3)
    noise = [pl.Series(f"noise_{i}", rng.standard_normal(300)) for i in range(4)]
    targets = ["trait", *(one.name for one in noise)]
    table = probe(
        features, subjects.with_columns(noise), targets, confounds=[], n_permutations=99,
        n_bootstrap=0,
    )  # fmt: skip
    for name in features:
        mine = table.filter(features=name)
        assert mine["q_value"][0] == pytest.approx(0.05)
        assert (mine["q_value"] >= mine["p_value"]).all()


def test_choosing_the_penalty_again_for_permuted_labels_changes_only_p_values() -> None:
    features, subjects = cohort(120)
    about = {"confounds": (), "n_permutations": 19, "n_bootstrap": 0}
    plain = probe(features, subjects, ["case", "group"], **about)
    again = probe(features, subjects, ["case", "group"], **about, extras=Extras(rechoose=True))
    assert plain["value"].to_list() == again["value"].to_list()
    assert (again["p_value"] == 0.05).all()


def test_a_learning_curve_rises_to_the_whole_and_keeps_families_together() -> None:
    features, subjects = cohort(400)
    table = probe(
        features["brain"], subjects, ["trait", "case"], confounds=[], n_permutations=0,
        n_bootstrap=50, extras=Extras(learning_curve=(0.5, 0.1)),
    )  # fmt: skip
    for row in table.iter_rows(named=True):
        curve = row["learning_curve"]
        sizes = [point["n_train"] for point in curve]
        assert sizes == sorted(sizes)
        assert sizes[-1] == 320
        assert 20 < sizes[0] < 45
        assert curve[-1]["value"] == row["value"]
        assert curve[0]["value"] < curve[-1]["value"]
        assert all(one["ci_low"] < one["value"] < one["ci_high"] for one in curve)
    family = np.repeat(np.arange(50), 3)
    people = People(subjects, family, family % 5, np.empty((0, 150), int), np.empty((0, 150)))
    half, fifth = (learners_of(people, share, 0) for share in (0.5, 0.2))
    assert all(len(set(half[family == code])) == 1 for code in range(50))
    assert (half | ~fifth).all()
    assert fifth.sum() == 30


def test_a_site_is_predicted_with_families_swapping_between_sites() -> None:
    rng = RNG(4)
    site = np.repeat(["A", "B", "C"], 40)
    x = rng.standard_normal((120, 5)) + 2 * (site == "B")[:, None]
    table = probe(
        x, pl.DataFrame({"site": site}), ["site"], confounds=[], n_permutations=19, n_bootstrap=0
    )
    assert table["p_value"][0] == 0.05
    assert table["value"][0] > 0.7


@pytest.mark.parametrize(
    ("extras", "message"),
    [
        (Extras(fusion=[("brain", "dan")]), "'dan' is no name of features. Did you mean 'dna'"),
        (Extras(fusion=[("brain",)]), "expected 2 to 6 different ones"),
        (Extras(pca=["dan"]), "Did you mean 'dna'"),
        (Extras(pca=["dna"], n_pcs=0), "n_pcs=0"),
        (Extras(learning_curve=[1.5]), "shares above 0 and below 1"),
    ],
)
def test_wrong_extras_are_one_clear_line(extras, message) -> None:
    features, subjects = cohort(60)
    with pytest.raises(UserError, match=message) as caught:
        probe(features, subjects, ["trait"], extras=extras)
    assert "\n" not in str(caught.value)
