import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from brainfusion.eval.probing import estimators, newton
from brainfusion.eval.probing.estimators import LogisticProbe
from brainfusion.eval.probing.logistic import log_loss, logistic_fit, one_hot, probabilities

COSTS = np.array([1e-6, 1e-2, 1.0, 1e2, 1e5])
"""C of scikit-learn, from models that say the shares to models of next to no penalty."""


def eigenbasis(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues and directions of centred features."""
    values, axes = np.linalg.eigh(x.T @ x)
    kept = values > 1e-11 * values[-1]
    return values[kept], axes[:, kept]


def case(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Centred features and labels that make logistic regression hard in one way."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((200, 12))
    score = x @ rng.standard_normal(12)
    noisy = score + rng.logistic(size=200)
    match name:
        case "separable":
            y = score > 0
        case "imbalanced":
            y = noisy > 7
        case "collinear":
            x = np.concatenate([x, 2 * x[:, :4], x[:, 4:6] + 1e-9], axis=1)
            y = noisy > 0
        case "wide":
            x = np.concatenate([x, rng.standard_normal((200, 300))], axis=1)
            y = noisy > 0
        case "heavy tails":
            x, y = x * rng.standard_t(2, (200, 1)), noisy > 0
        case "several classes":
            y = (x[:, :4] + rng.standard_normal((200, 4)) + [2, 1, 0, -1]).argmax(axis=1)
        case _:
            y = noisy > 0
    return x - x.mean(axis=0), y.astype(float)


def objective(x: np.ndarray, y: np.ndarray, found: tuple, penalties: np.ndarray) -> np.ndarray:
    """What scikit-learn minimises, for every model [c]."""
    level, weights, n_classes = found
    logits = (x @ weights + level).reshape(len(x), len(penalties), -1)
    size = (weights**2).reshape(len(weights), len(penalties), -1).sum(axis=(0, 2))
    assert logits.shape[2] == (1 if n_classes == 2 else n_classes)
    return log_loss(logits, np.repeat(y[:, None], len(penalties), 1)).sum(0) + penalties * size / 2


@pytest.mark.parametrize(
    "name", ["plain", "separable", "imbalanced", "collinear", "wide", "heavy tails",
             "several classes"],
)  # fmt: skip
def test_every_model_reaches_its_minimum_and_says_what_scikit_learn_says(name) -> None:
    x, y = case(name)
    n_classes = int(y.max()) + 1
    values, axes = eigenbasis(x)
    level, weights = logistic_fit(
        values, x @ axes, y[:, None], 1 / COSTS, n_classes=n_classes, tolerance=1e-13
    )
    weights = axes @ weights
    logits = (x @ weights + level).reshape(len(x), len(COSTS), -1)
    hot = one_hot(y, n_classes)
    for i, cost in enumerate(COSTS):
        p = probabilities(logits[:, i])
        mine = weights.reshape(len(weights), len(COSTS), -1)[:, i]
        gradient = x.T @ (p - hot) + mine / cost
        assert np.abs((p - hot).sum(axis=0)).max() < 1e-5 * len(x)
        # Of what it is without a model: the mean residual of a person is some 0.4.
        assert np.abs(gradient).max() < 3e-6 * np.abs(x).sum(axis=0).max()
        model = LogisticRegression(
            C=cost, tol=1e-10, max_iter=20000,
            solver="newton-cholesky" if n_classes == 2 else "lbfgs",
        ).fit(x, y)  # fmt: skip
        expected = probabilities(model.decision_function(x).reshape(len(x), -1))
        np.testing.assert_allclose(p, expected, atol=1e-5)


@pytest.mark.parametrize("name", ["plain", "imbalanced", "heavy tails", "several classes"])
def test_no_step_goes_up_even_where_the_quadratic_is_far_from_the_loss(name) -> None:
    x, y = case(name)
    n_classes, penalties = int(y.max()) + 1, 1 / COSTS
    values, axes = eigenbasis(x)
    losses = []
    for steps in range(12):
        level, weights = logistic_fit(
            values, x @ axes, y[:, None], penalties,
            n_classes=n_classes, tolerance=0.0, max_steps=steps,
        )  # fmt: skip
        losses.append(objective(x, y, (level, axes @ weights, n_classes), penalties))
    change = np.diff(losses, axis=0)
    assert change.max() < 1e-9
    assert change[0, 2:].max() < -0.1


def test_a_step_beyond_the_minimum_is_shortened(monkeypatch) -> None:
    x, y = case("imbalanced")
    values, axes = eigenbasis(x)
    lengths = []
    go = newton._Models._go

    def watched(models, length):
        lengths.append(length.copy())
        return go(models, length)

    monkeypatch.setattr(newton._Models, "_go", watched)
    logistic_fit(values, x @ axes, y[:, None], np.array([1e-5]), tolerance=1e-13)
    assert min(length.min() for length in lengths) < 0


@pytest.mark.parametrize("n_classes", [2, 4])
def test_the_number_of_steps_does_not_grow_with_the_spread_of_variances(n_classes) -> None:
    rng = np.random.default_rng(3)
    x = rng.standard_normal((1500, 60))
    scores = x[:, :n_classes] + rng.logistic(size=(1500, n_classes))
    y = scores.argmax(axis=1).astype(float)
    worst = []
    for power in (0, -1, -3):
        features = x * np.arange(1, 61.0) ** power
        features -= features.mean(axis=0)
        values, axes = eigenbasis(features)
        penalty = np.array([1e-3])
        fits = [
            logistic_fit(
                values, features, y[:, None], penalty,
                n_classes=n_classes, axes=axes, tolerance=0.0, max_steps=steps,
            )
            for steps in (7, 60)
        ]  # fmt: skip
        early, late = (objective(features, y, (*fit, n_classes), penalty) for fit in fits)
        worst.append(float((early - late).max() / len(y)))
    assert max(worst) < 1e-7


def test_models_of_some_people_are_those_that_never_saw_the_others() -> None:
    rng = np.random.default_rng(5)
    x, y = case("plain")
    folds, penalties = rng.integers(0, 3, len(x)), np.repeat([0.01, 1.0, 100.0], 3)
    # Folds are sites, whose people differ.
    x = x + 4 * (folds - 1)[:, None]
    x -= x.mean(axis=0)
    values, axes = eigenbasis(x)
    members = np.stack([folds != k for k in range(3)], axis=1)
    level, weights = logistic_fit(
        values, x, np.repeat(y[:, None], 3, axis=1), penalties,
        members=members, axes=axes, tolerance=1e-13, max_steps=25,
    )  # fmt: skip
    for i, penalty in enumerate(penalties):
        train = members[:, i % 3]
        model = LogisticRegression(C=1 / penalty, tol=1e-10, solver="newton-cholesky")
        expected = model.fit(x[train], y[train]).decision_function(x)
        np.testing.assert_allclose(x @ weights[:, i] + level[i], expected, atol=2e-5)


@pytest.mark.parametrize("n_classes", [2, 4])
def test_a_model_does_not_depend_on_its_company(n_classes) -> None:
    rng = np.random.default_rng(6)
    x, y = case("several classes")
    y = np.minimum(y, n_classes - 1)
    values, axes = eigenbasis(x)
    t = x @ axes
    labels = np.stack([y, *(rng.permutation(y) for _ in range(5))], axis=1)
    about = {"n_classes": n_classes, "tolerance": 1e-12}
    level, weights = logistic_fit(values, t, labels, 1 / np.repeat(COSTS, 6), **about)
    logits = (t @ weights + level).reshape(len(x), len(COSTS), 6, -1)
    for a, column in ((0, 2), (2, 0), (4, 5)):
        alone = logistic_fit(values, t, labels[:, [column]], 1 / COSTS[[a]], **about)
        expected = probabilities((t @ alone[1] + alone[0]).reshape(len(x), -1))
        np.testing.assert_allclose(probabilities(logits[:, a, column]), expected, atol=2e-6)


def test_tiles_of_people_change_nothing(monkeypatch) -> None:
    x, y = case("several classes")
    values, axes = eigenbasis(x)
    about = {"n_classes": 4, "tolerance": 1e-12, "members": (np.arange(len(x)) % 3 > 0)[:, None]}
    whole = logistic_fit(values, x @ axes, y[:, None], 1 / COSTS, **about)
    monkeypatch.setattr(newton, "_TILE", 1)
    monkeypatch.setattr(newton, "_FEWEST_ROWS", 33)
    tiled = logistic_fit(values, x @ axes, y[:, None], 1 / COSTS, **about)
    np.testing.assert_allclose(tiled[1], whole[1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["whitened", "falling", "collinear", "sizes", "wide"])
@pytest.mark.parametrize("n_classes", [2, 3])
def test_a_search_of_large_features_in_single_precision_finds_the_same(
    kind, n_classes, monkeypatch
) -> None:
    monkeypatch.setattr(estimators, "_SMALL", 0)
    rng = np.random.default_rng(7)
    dim = {"wide": 180}.get(kind, 16)
    x = rng.standard_normal((160, dim)) + 5
    y = (x[:, -n_classes:] + rng.standard_normal((160, n_classes))).argmax(axis=1)
    if kind == "falling":
        x *= np.arange(1, dim + 1) ** -0.75
    if kind == "sizes":
        x *= 10.0 ** -np.linspace(0, 5, dim)
    if kind == "collinear":
        x[:, -1] = x[:, 0] + x[:, 1]
    # Where classes are separable both stop well before the minimum while they search.
    costs = [1e-4, 1e-3, 1e-2, 1e-1] if kind == "wide" else [1e-4, 1e-2, 1.0, 1e2]
    probe = LogisticProbe([1 / c for c in costs], scaled=False).fit(x, y)
    expected = np.zeros(len(costs))
    for fold in range(5):
        train = probe.folds_ != fold
        for i, cost in enumerate(costs):
            model = LogisticRegression(C=cost, tol=1e-7, max_iter=20000).fit(x[train], y[train])
            logits = model.decision_function(x[~train]).reshape((~train).sum(), 1, -1)
            expected[i] += log_loss(logits, y[~train, None]).mean() / 5
    np.testing.assert_allclose(probe.losses_, expected, rtol=1e-4, atol=1e-4)
    assert 1 / probe.penalty_ == pytest.approx(costs[int(expected.argmin())])
    best = LogisticRegression(C=1 / probe.penalty_, tol=1e-10, max_iter=20000).fit(x, y)
    np.testing.assert_allclose(probe.predict_proba(x), best.predict_proba(x), atol=1e-5)
