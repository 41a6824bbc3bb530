import numpy as np
import polars as pl
import pytest
from sklearn.linear_model import LinearRegression, LogisticRegression, Ridge
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import GridSearchCV, PredefinedSplit

from brainfusion.eval.design import covariate_matrix, group_folds
from brainfusion.eval.probing.linear import FeatureSpace, RidgeSearch, ridge_out_of_fold
from brainfusion.eval.probing.logistic import LogisticSearch, logistic_fit, residualised
from brainfusion.eval.probing.metrics import fold_auroc
from brainfusion.eval.probing.probes import SCHEMA, probe
from brainfusion.runtime.errors import UserError

GRID = np.array([0.1, 1.0, 10.0, 100.0, 1000.0])


def cohort(n: int = 240, dim: int = 12, seed: int = 0) -> tuple[np.ndarray, pl.DataFrame]:
    """Features that hold cognition, diagnosis and age; everything else is noise."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, dim))
    subjects = pl.DataFrame(
        {
            "family": [f"f{i // 2}" if i < n // 2 else None for i in range(n)],
            "site": rng.choice(["A", "B", "C"], n),
            "age": 50 + 5 * x[:, 3] + 5 * rng.standard_normal(n),
            "sex": rng.choice(["F", "M"], n),
            "motion": rng.random(n),
            "cognition": x[:, 0] + rng.standard_normal(n),
            "mdd": x[:, 1] + rng.standard_normal(n) > 1,
        }
    )
    return x, subjects


def metric(row: dict, name: str) -> dict:
    return next(one for one in row["metrics"] if one["metric"] == name)


@pytest.mark.parametrize("dim", [20, 150])
def test_ridge_equals_sklearn_and_its_grid_search_on_the_same_folds(dim) -> None:
    # dim 150 of 100 people takes the kernel route.
    rng = np.random.default_rng(1)
    x = rng.standard_normal((100, dim)) * np.arange(1, dim + 1) ** -0.5 + 3
    y = x[:, :3] @ rng.standard_normal((3, 4)) + rng.standard_normal((100, 4)) * [0.1, 1, 5, 50]
    folds = rng.integers(0, 5, 100)
    space = FeatureSpace(x, folds)
    predicted, chosen = ridge_out_of_fold(space, np.ones((100, 1)), y, GRID)
    for fold in range(5):
        train = folds != fold
        for column in range(4):
            search = GridSearchCV(
                Ridge(), {"alpha": GRID}, cv=PredefinedSplit(folds[train]),
                scoring="neg_mean_squared_error",
            ).fit(space.x[train], y[train, column])  # fmt: skip
            assert search.best_params_["alpha"] == GRID[chosen[fold, column]]
            expected = search.predict(space.x[~train])
            np.testing.assert_allclose(predicted[~train, column], expected, rtol=1e-5, atol=1e-7)
    assert len(np.unique(chosen)) > 2


@pytest.mark.parametrize("dim", [10, 90])
def test_unpenalised_confounds_equal_residualising_in_the_fold(dim) -> None:
    rng = np.random.default_rng(2)
    z = rng.standard_normal((80, 3))
    x = rng.standard_normal((80, dim)) + 2 * z[:, :1]
    y = x[:, :1] + z[:, 1:2] + rng.standard_normal((80, 1))
    folds = np.arange(80) % 4
    space = FeatureSpace(x, folds)
    fixed = np.concatenate([np.ones((80, 1)), z], axis=1)
    predicted, chosen = ridge_out_of_fold(space, fixed, y, GRID)
    for fold in range(4):
        train = folds != fold
        of_x, of_y = (LinearRegression().fit(z[train], v[train]) for v in (space.x, y))
        clean = space.x - of_x.predict(z)
        ridge = Ridge(alpha=GRID[chosen[fold, 0]], fit_intercept=False)
        ridge.fit(clean[train], (y - of_y.predict(z))[train])
        expected = ridge.predict(clean[~train]).reshape(-1, 1) + of_y.predict(z[~train])
        np.testing.assert_allclose(predicted[~train], expected, rtol=1e-5, atol=1e-7)


def test_single_precision_of_permutations_does_not_change_what_they_say() -> None:
    rng = np.random.default_rng(3)
    x, y = rng.standard_normal((60, 70)), rng.standard_normal((60, 5))
    space = FeatureSpace(x, np.arange(60) % 3)
    exact = ridge_out_of_fold(space, np.ones((60, 1)), y, GRID[1:])[0]
    search = RidgeSearch(space.folds, np.ones((60, 1)), y.astype("f4"), GRID[1:])
    for pair in ((0, 1), (0, 2), (1, 2)):
        search.inner(pair, space.basis(pair))
    for fold in range(3):
        search.outer(fold, space.basis((fold,)))
    np.testing.assert_allclose(search.predictions, exact, atol=1e-4)


@pytest.mark.parametrize("dim", [8, 120])
def test_logistic_equals_sklearn_at_every_penalty(dim) -> None:
    rng = np.random.default_rng(4)
    x = rng.standard_normal((150, dim)) * np.arange(1, dim + 1) ** -0.7
    labels = (x[:, 0] + 0.5 * rng.standard_normal(150) > 0.4).astype(float)
    folds = np.arange(150) % 3
    space, train = FeatureSpace(x, folds), folds != 0
    values, coordinates = space.basis((0,))
    t = residualised(coordinates, np.ones((150, 1)), train)
    penalties = np.array([0.1, 1.0, 30.0])
    intercept, weights = logistic_fit(
        values, t[train], np.repeat(labels[train, None], 3, axis=1), penalties, tolerance=1e-13
    )
    logits = t @ weights + intercept
    for column, penalty in enumerate(penalties):
        model = LogisticRegression(C=1 / penalty, tol=1e-10, max_iter=5000)
        model.fit(space.x[train], labels[train])
        expected = model.decision_function(space.x)
        np.testing.assert_allclose(logits[:, column], expected, atol=1e-4 * np.abs(expected).max())


def test_logistic_search_chooses_what_grid_search_chooses() -> None:
    rng = np.random.default_rng(5)
    x = rng.standard_normal((120, 30))
    labels = (x[:, 0] + rng.standard_normal(120) > 0).astype(float)[:, None]
    folds, grid = np.arange(120) % 4, np.array([0.3, 3.0, 30.0, 300.0])
    space = FeatureSpace(x, folds)
    search = LogisticSearch(folds, np.ones((120, 1)), labels, grid)
    for i in range(4):
        for j in range(i + 1, 4):
            search.inner((i, j), space.basis((i, j)))
    for fold in range(4):
        search.outer(fold, space.basis((fold,)))
        train = folds != fold
        expected = GridSearchCV(
            LogisticRegression(tol=1e-8, max_iter=2000), {"C": 1 / grid},
            cv=PredefinedSplit(folds[train]), scoring="neg_log_loss",
        ).fit(space.x[train], labels[train, 0])  # fmt: skip
        assert 1 / grid[search.chosen[fold, 0]] == expected.best_params_["C"]


def test_planted_traits_are_found_and_shuffled_ones_are_not() -> None:
    x, subjects = cohort()
    rng = np.random.default_rng(9)
    subjects = subjects.with_columns(
        pl.Series("shuffled", rng.permutation(subjects["cognition"].to_numpy())),
        pl.Series("coin", rng.random(len(x)) < 0.3),
    )
    table = probe(
        {"brain": x, "noise": rng.standard_normal((len(x), 300))},
        subjects,
        ["cognition", "mdd", "age", "shuffled", "coin"],
        n_permutations=99,
        n_bootstrap=200,
    )
    assert dict(table.schema) == SCHEMA
    assert table.height == 5 * 5
    row = {(r["target"], r["features"]): r for r in table.iter_rows(named=True)}
    for target in ("cognition", "mdd", "age"):
        for name in ("brain", "brain | confounds"):
            found = row[target, name]
            assert found["p_value"] == 0.01
            assert found["chance"] < found["ci_low"] < found["value"] < found["ci_high"]
        assert row[target, "noise"]["p_value"] > 0.02
        assert row[target, "confounds only"]["value"] < row[target, "brain"]["value"]
    for target in ("shuffled", "coin"):
        assert row[target, "brain"]["p_value"] > 0.02
    assert row["age", "brain | confounds"]["confounds"] == "sex, site, motion"
    assert row["mdd", "brain"]["n_positive"] == subjects["mdd"].sum()
    # Half of the variance of cognition is in the features.
    assert 0.35 < row["cognition", "brain"]["value"] < 0.6
    assert 0.6 < metric(row["cognition", "brain"], "r")["value"] < 0.8
    losses = [metric(row["mdd", name], "log_loss")["value"] for name in ("brain", "noise")]
    assert losses[0] < losses[1]


def test_what_features_know_only_through_a_confound_disappears() -> None:
    rng = np.random.default_rng(11)
    age = rng.uniform(20, 80, 200)
    x = rng.standard_normal((200, 10)) + 0.1 * (age[:, None] - 50)
    subjects = pl.DataFrame(
        {"age": age, "memory": -age + 5 * rng.standard_normal(200), "old": age > 60}
    )
    table = probe(x, subjects, ["memory"], confounds=["age"], n_permutations=99, n_bootstrap=0)
    row = {r["features"]: r for r in table.iter_rows(named=True)}
    assert row["features"]["value"] > 0.7
    assert row["confounds only"]["value"] > 0.9
    assert row["features | confounds"]["value"] < 0.05
    assert row["features | confounds"]["p_value"] > 0.05
    assert row["features"]["ci_low"] is None


def test_p_values_of_noise_are_uniform_with_families_and_sites() -> None:
    p = []
    for seed in range(40):
        rng = np.random.default_rng(seed)
        family = rng.integers(0, 40, 60)
        subjects = pl.DataFrame(
            {
                "family": [f"f{i}" for i in family],
                "site": rng.choice(["A", "B"], 60),
                "trait": rng.standard_normal(40)[family] + 0.5 * rng.standard_normal(60),
                "label": rng.random(60) < 0.4,
            }
        )
        x = rng.standard_normal((40, 6))[family] + 0.5 * rng.standard_normal((60, 6))
        table = probe(
            x, subjects, ["trait", "label"], confounds=[], n_folds=4,
            penalties=[1.0, 10.0, 100.0], n_permutations=39, n_bootstrap=0, seed=seed,
        )  # fmt: skip
        p.append(table["p_value"].to_list())
    # 40 uniform draws: the Kolmogorov distance stays below 0.26 with probability 0.99.
    for column in np.array(p).T:
        assert np.abs(np.sort(column) - np.arange(1, 41) / 40).max() < 0.26


def test_folds_keep_families_whole_and_classes_even() -> None:
    rng = np.random.default_rng(0)
    family = np.repeat(np.arange(60), rng.integers(1, 5, 60))
    rare = (rng.random(len(family)) < 0.15).astype(float)
    folds = group_folds(family, 5, balance=rare[:, None], seed=3)
    for code in range(60):
        assert len(set(folds[family == code])) == 1
    sizes, positives = np.bincount(folds), np.bincount(folds, rare)
    assert sizes.max() - sizes.min() <= 4
    assert positives.max() - positives.min() <= 3
    np.testing.assert_array_equal(folds, group_folds(family, 5, balance=rare[:, None], seed=3))


def test_fold_auroc_compares_people_of_one_fold_only() -> None:
    rng = np.random.default_rng(0)
    folds, labels = np.arange(60) % 3, (rng.random(60) < 0.4).astype(float)
    scores = np.round(rng.standard_normal(60), 1) + 100 * folds
    parts = [(labels[folds == k], scores[folds == k]) for k in range(3)]
    n_pairs = [y.sum() * (1 - y).sum() for y, _ in parts]
    expected = np.average([roc_auc_score(*part) for part in parts], weights=n_pairs)
    assert fold_auroc(scores[:, None], labels[:, None], folds)[0] == pytest.approx(expected)


def test_design_matrix_gives_missing_values_their_own_column() -> None:
    table = pl.DataFrame({"age": [1.0, 2.0, None, 3.0], "site": ["A", "B", None, "A"]})
    design = covariate_matrix(table, ["age", "site"])
    assert design.shape == (4, 4)
    np.testing.assert_array_equal(design[:, 1], [0, 0, 1, 0])
    assert design[2, 0] == 0
    np.testing.assert_array_equal(design[:, 2:], [[1, 0], [0, 1], [0, 0], [1, 0]])


def test_missing_targets_are_left_out_and_counted() -> None:
    x, subjects = cohort(120)
    holes = subjects["cognition"].to_list()
    holes[:15] = [None] * 14 + [float("nan")]
    subjects = subjects.with_columns(pl.Series("cognition", holes))
    table = probe(x, subjects, ["cognition"], n_permutations=0, n_bootstrap=0)
    assert set(table["n"]) == {105}
    assert set(table["n_missing"]) == {15}
    again = probe(x[15:], subjects[15:], ["cognition"], n_permutations=0, n_bootstrap=0)
    assert table["value"].to_list() == again["value"].to_list()


def test_the_seed_decides_everything() -> None:
    x, subjects = cohort(100)
    runs = [probe(x, subjects, ["mdd"], n_permutations=9, n_bootstrap=9, seed=s) for s in (1, 1, 2)]
    assert runs[0].equals(runs[1])
    assert not runs[0].equals(runs[2])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"targets": ["cogniton"]}, "Did you mean 'cognition'"),
        ({"targets": ["name"]}, "60 labels"),
        ({"targets": ["odd"]}, "3 labels, the rarest of 1 people"),
        ({"targets": ["constant"]}, "1 different values"),
        ({"targets": ["once"]}, "1 positive of 60 people"),
        ({"confounds": ["ages"]}, "Did you mean 'age'"),
        ({"features": np.zeros((5, 2))}, "for 60 people"),
        ({"features": np.full((60, 2), np.nan)}, "NaN"),
        ({"n_folds": 2}, "3 folds or more"),
        ({"n_folds": 59}, "families for 59 folds"),
    ],
)
def test_wrong_input_is_one_clear_line(change, message) -> None:
    x, subjects = cohort(60)
    subjects = subjects.with_columns(
        pl.lit(1.0).alias("constant"),
        pl.Series("once", [1] + [0] * 59),
        pl.Series("name", [str(i) for i in range(60)]),
        pl.Series("odd", ["a"] + ["b", "c"] * 29 + ["b"]),
    )
    given = {"features": x, "subjects": subjects, "targets": ["cognition"]} | change
    with pytest.raises(UserError, match=message) as caught:
        probe(given.pop("features"), given.pop("subjects"), given.pop("targets"), **given)
    assert "\n" not in str(caught.value)


def test_a_pandas_table_of_people_gives_the_same_rows() -> None:
    rng = np.random.default_rng(8)
    table = pl.DataFrame({"subject": [f"{i:03d}" for i in range(90)], "y": rng.standard_normal(90)})
    x = rng.standard_normal((90, 4)) + table["y"].to_numpy()[:, None]
    about = {"targets": ["y"], "confounds": (), "n_permutations": 9, "n_bootstrap": 9}
    ours, theirs = probe(x, table, **about), probe(x, table.to_pandas(), **about)
    assert ours.equals(theirs)
    assert ours["value"][0] > 0.5
