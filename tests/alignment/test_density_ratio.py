"""The density ratio head against the oracle's closed form, and where nothing is shared."""

import json
from functools import cache

import numpy as np
import pytest

from brainfusion.alignment.density_ratio import DensityRatio
from brainfusion.data.oracle import both_directions, mutual_information, pmi_scores
from brainfusion.runtime.errors import UserError

RHO = np.array([0.9, 0.8, 0.6, 0.4, 0.3])


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def variates(n: int, rho: np.ndarray = RHO, *, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    u = rng.standard_normal((n, len(rho)))
    return u, rho * u + np.sqrt(1 - rho**2) * rng.standard_normal(u.shape)


def embeddings(
    n: int, rho: np.ndarray = RHO, *, seed: int = 0, o: int = 16
) -> tuple[dict[str, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Rows of two sides: variates among unshared directions, turned; and the variates."""
    u, v = variates(n, rho, seed=seed)
    rng = np.random.default_rng(99)
    sides = {}
    for name, shared in (("brain", u), ("dna", v)):
        turn = np.linalg.qr(rng.standard_normal((o, o)))[0]
        own = np.random.default_rng(seed + 7).standard_normal((n, o - len(rho)))
        sides[name] = np.concatenate([0.7 * shared, own if name == "dna" else own[::-1]], 1) @ turn
    return sides, (u, v)


@cache
def fitted(n_validation: int = 1000) -> DensityRatio:
    return DensityRatio.fit(embeddings(3000, seed=1)[0], embeddings(n_validation, seed=2)[0])


def test_inner_products_of_vectors_are_the_oracles_scores_in_both_directions():
    head = fitted()
    assert head.kind == "normal"
    rows = embeddings(150, seed=3)[0]
    brain, dna = head.vectors("brain", rows["brain"]), head.vectors("dna", rows["dna"][:90])
    assert brain.dtype == dna.dtype == np.float32
    k = len(head.correlations)
    assert brain.shape == (150, k + 2)
    expected = pmi_scores(
        head.variates("brain", rows["brain"]),
        head.variates("dna", rows["dna"][:90]),
        head.correlations,
    )
    # Vectors are float32, scores up to some ten nats.
    np.testing.assert_allclose(brain @ dna.T, expected, atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(dna @ brain.T, expected.T, atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(head.scores(rows["brain"], rows["dna"][:90]), expected, atol=1e-12)


def test_it_finds_the_population_score():
    head = fitted(n_validation=1000)
    rows, (u, v) = embeddings(1000, seed=4)
    best = pmi_scores(u, v, RHO)
    got = head.scores(rows["brain"], rows["dna"])
    oracle, own = both_directions(best), both_directions(got)
    assert own["auc"] == pytest.approx(oracle["auc"], abs=0.003)
    assert own["recall_at_10"] > 0.9 * oracle["recall_at_10"]
    np.testing.assert_allclose(head.correlations[:5], RHO, atol=0.06)
    assert np.diag(got).mean() == pytest.approx(mutual_information(RHO), abs=0.15)


def test_it_beats_the_cosine_of_the_same_embeddings():
    head = fitted()
    rows = embeddings(800, seed=5)[0]
    own = both_directions(head.scores(rows["brain"], rows["dna"]))
    cosine = both_directions(unit(rows["brain"]) @ unit(rows["dna"]).T)
    assert own["auc"] > cosine["auc"] + 0.02


def test_a_good_cosine_of_variates_that_are_not_normal_is_kept_and_scaled():
    # On a circle, where a person's partner is the nearest: the cosine is all there is to know.
    def circle(n: int, seed: int) -> dict[str, np.ndarray]:
        rng = np.random.default_rng(seed)
        angle = rng.uniform(0, 2 * np.pi, n)
        noisy = angle + 0.05 * rng.standard_normal(n)
        return {"brain": np.stack([np.cos(angle), np.sin(angle)], 1),
                "dna": np.stack([np.cos(noisy), np.sin(noisy)], 1)}  # fmt: skip

    head = DensityRatio.fit(circle(1000, 0), circle(500, 1))
    assert head.kind == "cosine"
    rows = circle(300, 2)
    got = head.scores(rows["brain"], rows["dna"])
    np.testing.assert_allclose(
        got, head.gain[0] * (rows["brain"] @ rows["dna"].T) + head.constant, atol=1e-9
    )
    vectors = head.vectors("brain", rows["brain"]) @ head.vectors("dna", rows["dna"]).T
    # float32 with a scale of some hundred.
    np.testing.assert_allclose(vectors, got, atol=2e-4)
    away = got[~np.eye(300, dtype=bool)]
    assert np.exp(away).mean() == pytest.approx(1, abs=0.15)
    # The information of von Mises noise of this width: log(2 pi) - log(0.05 sqrt(2 pi e)).
    truth = np.log(2 * np.pi) - np.log(0.05 * np.sqrt(2 * np.pi * np.e))
    assert head.information == pytest.approx(truth, abs=0.3)


def test_shuffled_pairs_score_at_chance():
    aucs = []
    for seed in range(4):
        rng = np.random.default_rng(seed)
        parts = []
        for n, part in ((300, 10), (60, 20), (400, 30)):
            rows = embeddings(n, seed=seed + part)[0]
            parts.append({"brain": rows["brain"], "dna": rows["dna"][rng.permutation(n)]})
        head = DensityRatio.fit(parts[0], parts[1])
        assert head.information < 0.1
        aucs.append(both_directions(head.scores(parts[2]["brain"], parts[2]["dna"]))["auc"])
    # A uniform rank has variance 1/12; four cohorts of 400 people.
    assert abs(np.mean(aucs) - 0.5) < 3 * np.sqrt(1 / 12 / 400 / 4)


def test_it_can_be_written_and_read_again_exactly():
    head = fitted()
    values = head.to_dict()
    arrays = values.pop("arrays")
    again = DensityRatio.from_dict({**json.loads(json.dumps(values)), "arrays": arrays})
    rows = embeddings(20, seed=3)[0]["dna"]
    np.testing.assert_array_equal(again.vectors("dna", rows), head.vectors("dna", rows))
    assert (again.first, again.second, again.n_people) == ("brain", "dna", 1000)


def test_few_validation_people_are_enough_to_go_on():
    head = fitted(n_validation=4)
    assert np.isfinite(head.vectors("brain", embeddings(5)[0]["brain"])).all()


def test_what_does_not_fit_is_said():
    head = fitted()
    rows = embeddings(20)[0]
    with pytest.raises(UserError, match=r"expected 'brain' or 'dna'"):
        head.vectors("brian", rows["brain"])
    with pytest.raises(UserError, match=r"expected \(people, 16\)"):
        head.vectors("brain", rows["brain"][:, :5])
    with pytest.raises(UserError, match="expected the same two sides"):
        DensityRatio.fit(rows, {"brain": rows["brain"]})
