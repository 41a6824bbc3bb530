import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.model_selection import GridSearchCV, PredefinedSplit
from sklearn.utils.estimator_checks import parametrize_with_checks

from brainfusion.eval.probing.estimators import LogisticProbe, RidgeProbe

GRID = (0.1, 1.0, 10.0, 100.0, 1000.0)


@parametrize_with_checks([RidgeProbe(GRID), LogisticProbe(GRID)])
def test_scikit_learn_accepts_the_estimator(estimator, check) -> None:
    check(estimator)


def data(n: int, dim: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, dim)) * np.arange(1, dim + 1) ** -0.5 + 3
    return x, x[:, :2] + rng.standard_normal((n, 2)) * [0.3, 5]


@pytest.mark.parametrize("dim", [15, 160])
def test_ridge_probe_chooses_and_predicts_as_a_grid_search_of_each_target(dim) -> None:
    x, y = data(120, dim, 0)
    probe = RidgeProbe(GRID, scaled=False).fit(x[:100], y[:100])
    for column in range(2):
        search = GridSearchCV(
            Ridge(), {"alpha": GRID}, cv=PredefinedSplit(probe.folds_),
            scoring="neg_mean_squared_error",
        ).fit(x[:100], y[:100, column])  # fmt: skip
        assert probe.penalty_[column] == search.best_params_["alpha"]
        expected = search.predict(x[100:])
        np.testing.assert_allclose(probe.predict(x[100:])[:, column], expected, rtol=1e-5)
        np.testing.assert_allclose(
            -probe.errors_[:, column], search.cv_results_["mean_test_score"], rtol=1e-7
        )


@pytest.mark.parametrize("n_classes", [2, 3, 5])
@pytest.mark.parametrize("dim", [10, 150])
def test_logistic_probe_gives_the_probabilities_of_scikit_learn_at_every_penalty(
    dim, n_classes
) -> None:
    rng = np.random.default_rng(1)
    x = rng.standard_normal((140, dim)) * np.arange(1, dim + 1) ** -0.5
    scores = x[:, :n_classes] + 0.7 * rng.standard_normal((140, n_classes))
    labels = np.array(list("abcde"))[scores.argmax(axis=1)]
    for penalty in (0.1, 1.0, 30.0):
        probe = LogisticProbe([penalty], scaled=False).fit(x[:120], labels[:120])
        model = LogisticRegression(C=1 / penalty, tol=1e-10, max_iter=10000)
        model.fit(x[:120], labels[:120])
        np.testing.assert_array_equal(probe.classes_, model.classes_)
        np.testing.assert_allclose(
            probe.predict_proba(x[120:]), model.predict_proba(x[120:]), atol=1e-5
        )
        np.testing.assert_array_equal(probe.predict(x[120:]), model.predict(x[120:]))


@pytest.mark.parametrize("n_classes", [2, 3])
def test_logistic_probe_chooses_what_a_grid_search_chooses(n_classes) -> None:
    rng = np.random.default_rng(2)
    x = rng.standard_normal((150, 20))
    labels = (x[:, :n_classes] + rng.standard_normal((150, n_classes))).argmax(axis=1)
    probe = LogisticProbe(GRID, scaled=False).fit(x, labels)
    search = GridSearchCV(
        LogisticRegression(tol=1e-8, max_iter=3000), {"C": [1 / value for value in GRID]},
        cv=PredefinedSplit(probe.folds_), scoring="neg_log_loss",
    ).fit(x, labels)  # fmt: skip
    assert 1 / probe.penalty_ == search.best_params_["C"]
    # Both stop short of the minimum while they search.
    np.testing.assert_allclose(probe.losses_, -search.cv_results_["mean_test_score"], atol=2e-4)
    np.testing.assert_allclose(probe.predict_proba(x), search.predict_proba(x), atol=1e-5)


def test_families_stay_in_one_fold_and_the_scale_of_features_does_not_matter() -> None:
    x, y = data(90, 12, 3)
    families = [f"f{i // 3}" for i in range(90)]
    probe = RidgeProbe().fit(x, y[:, 0], groups=families)
    assert all(len(set(probe.folds_[i : i + 3])) == 1 for i in range(0, 90, 3))
    again = RidgeProbe().fit(1000 * x, y[:, 0], groups=families)
    assert again.penalty_ == probe.penalty_
    np.testing.assert_allclose(again.predict(1000 * x), probe.predict(x), rtol=1e-8)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda x: RidgeProbe([]).fit(x, x[:, 0]), "expected one or more above 0"),
        (lambda x: RidgeProbe([0.0]).fit(x, x[:, 0]), "expected one or more above 0"),
        (lambda x: LogisticProbe().fit(x, np.ones(len(x))), "one class"),
    ],
)
def test_wrong_settings_are_one_clear_line(make, message) -> None:
    with pytest.raises(ValueError, match=message):
        make(np.random.default_rng(0).standard_normal((20, 3)))
