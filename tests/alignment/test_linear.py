"""Closed-form alignments: equal to the libraries' methods, and files as training leaves them."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from brainfusion.alignment import AlignConfig, load
from brainfusion.alignment.linear import METHODS, fit_linear
from brainfusion.alignment.linear_maps import pls_maps, rcca_maps, ridge_maps
from brainfusion.alignment.validation import pair_auc
from brainfusion.data.cca import fit_cca
from brainfusion.data.oracle import attainable, pmi_scores
from brainfusion.runtime import config as configs
from brainfusion.runtime.distributed import Ranks
from brainfusion.runtime.errors import UserError
from tests.alignment.genes.gene_cohort import gene_cohort
from tests.alignment.test_train import cohort, held_out_auc
from tests.oracles.cca_zoo_golden import GOLDEN, SHRINKAGE, views
from tests.ranks import run_ranks

PLAIN = AlignConfig(n_components=0)


def same_up_to_sign(found: np.ndarray, expected: np.ndarray, tolerance: float = 1e-8) -> None:
    """Columns [d, k] that agree but for their sign and length."""
    found, expected = (w / np.linalg.norm(w, axis=0) for w in (found, expected))
    np.testing.assert_allclose(
        np.abs((found * expected).sum(axis=0)), 1.0, atol=tolerance, err_msg="directions differ"
    )


# -- against the libraries -----------------------------------------------------------------------


@pytest.mark.parametrize("case", SHRINKAGE)
def test_ridge_cca_equals_that_of_cca_zoo(case):
    golden = np.load(GOLDEN)
    x, y = views(case)
    ridges = []
    for view, shrinkage in zip((x, y), SHRINKAGE[case], strict=True):
        # cca-zoo: (1 - c) S + c I, S over n - 1. Ours: S + ridge * mean variance * I.
        mean_variance = view.var(axis=0, ddof=1).mean()
        ridges.append(shrinkage / (1 - shrinkage) / mean_variance)
    cca = fit_cca(x, y, n_components=3, ridge_x=ridges[0], ridge_y=ridges[1])
    same_up_to_sign(cca.weights_x, golden[f"{case}.x"])
    same_up_to_sign(cca.weights_y, golden[f"{case}.y"])
    np.testing.assert_allclose(cca.correlations, golden[f"{case}.correlations"], atol=1e-8)


@pytest.mark.parametrize("n", [200, 30])
def test_pls_equals_scikit_learns_singular_vectors(n):
    from sklearn.cross_decomposition import PLSSVD

    features, _ = cohort(n, n_nuisance=40)
    x, y = features["brain"], features["dna"]
    maps = pls_maps(x, y, n_components=3)
    expected = PLSSVD(n_components=3, scale=False).fit(x, y)
    same_up_to_sign(maps.weights[0], expected.x_weights_)
    same_up_to_sign(maps.weights[1], expected.y_weights_)
    # Partners have the same sign, which is what makes their inner product a covariance.
    for u, v in zip(
        *(((z - z.mean(0)) @ w).T for z, w in zip((x, y), maps.weights, strict=True)), strict=True
    ):
        assert np.corrcoef(u, v)[0, 1] > 0


@pytest.mark.parametrize("n", [200, 30])
def test_ridge_equals_scikit_learns_prediction_of_whitened_dna(n):
    from sklearn.decomposition import PCA
    from sklearn.linear_model import Ridge

    features, _ = cohort(n, n_nuisance=40)
    x, y = features["brain"], features["dna"]
    penalties = (0.1, 3.0)
    for maps, penalty in zip(
        ridge_maps(x, y, n_components=5, penalties=penalties), penalties, strict=True
    ):
        centred = x - x.mean(axis=0)
        target = (y - y.mean(axis=0)) @ maps.weights[1]
        np.testing.assert_allclose(target.T @ target / n, np.eye(5), atol=1e-8)
        white = PCA(5, whiten=True, svd_solver="full").fit(y)
        same_up_to_sign(maps.weights[1], white.components_.T)
        alpha = penalty * (centred**2).sum() / x.shape[1]
        expected = Ridge(alpha=alpha, fit_intercept=False).fit(centred, target)
        np.testing.assert_allclose(maps.weights[0], expected.coef_.T, atol=1e-8)


def test_rcca_embeddings_rank_nearly_as_well_as_the_density_ratio_of_the_true_variates():
    rng = np.random.default_rng(0)
    rho = np.linspace(0.85, 0.15, 16)
    u = rng.standard_normal((4000, 16))
    v = rho * u + np.sqrt(1 - rho**2) * rng.standard_normal(u.shape)
    turn = np.linalg.qr(rng.standard_normal((16, 16)))[0]
    maps = rcca_maps(u[:2500] @ turn, v[:2500], u[2500:3000] @ turn, v[2500:3000])
    rows = []
    sides = (u[3000:] @ turn, v[3000:])
    for values, mean, weight in zip(sides, maps.means, maps.weights, strict=True):
        z = np.column_stack([(values - mean) @ weight, np.full(1000, maps.spare)])
        rows.append(torch.from_numpy(z / np.linalg.norm(z, axis=1, keepdims=True)))
    best = pmi_scores(u[3000:], v[3000:], rho)
    oracle = (best < np.diag(best)[:, None]).mean()
    plain = [torch.nn.functional.normalize(torch.from_numpy(z[3000:]), dim=1) for z in (u, v)]
    auc = pair_auc(*rows)
    assert oracle - 0.004 < auc < oracle + 0.004
    # The cosine of the very variates, all alike, leaves much more on the table.
    assert pair_auc(*plain) < auc - 0.008


# -- the interface -------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_a_planted_signal_is_found_and_shuffled_pairs_are_not(tmp_path, method):
    features, labels = cohort(n=1000)
    fit_linear(features, labels, method=method, config=PLAIN, run_dir=tmp_path / "true")
    auc = held_out_auc(tmp_path / "true", features, labels)
    assert 0.8 < auc < attainable([0.8] * 4, n_gallery=400)["auc"] + 0.02

    order = np.random.default_rng(5).permutation(1000)
    shuffled = {**features, "dna": features["dna"][order]}
    result = fit_linear(shuffled, labels, method=method, config=PLAIN, run_dir=tmp_path / "null")
    standard_error = np.sqrt(1 / 12 / 400)
    assert abs(held_out_auc(tmp_path / "null", shuffled, labels) - 0.5) < 3 * standard_error
    assert result.summary["loss_over_log_n"] < 1.2


@pytest.mark.parametrize("method", METHODS)
def test_a_run_folder_is_that_of_training_and_opens_in_one_call(tmp_path, method):
    features, labels = cohort()
    config = AlignConfig(n_components=12)
    result = fit_linear(
        features, labels, method=method, config=config, run_dir=tmp_path, meta={"hash": "abc"}
    )
    assert configs.from_dict(AlignConfig, configs.read_yaml(tmp_path / "config.yaml")) == config
    assert {path.name for path in tmp_path.iterdir()} == {
        *("config.yaml", "metrics.jsonl", "summary.json", "model")
    }
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["method"] == method
    assert summary["meta"] == {"hash": "abc"}
    assert [row["step"] for row in rows] == list(range(1, summary["n_steps"] + 1))
    kept = rows[summary["best_step"] - 1]
    assert kept["validation_auc"] == max(row["validation_auc"] for row in rows)
    assert kept["validation_auc"] == summary["validation_auc"]
    assert {k: kept[k] for k in summary["chosen"]} == summary["chosen"]
    opened = load(tmp_path)
    assert (opened.head is not None) == (method == "rcca")
    for name, x in features.items():
        rows = opened.embed(name, x)
        assert rows.dtype == np.float32
        np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1.0, rtol=1e-5)
        np.testing.assert_array_equal(rows, result.alignment.embed(name, x))
    assert opened.embed_brain(features["brain"]).shape == opened.embed_dna(features["dna"]).shape


def test_the_head_of_rcca_is_above_its_cosine_and_below_the_oracle(tmp_path):
    features, labels = cohort(n=2000, n_latents=8)
    fit_linear(features, labels, method="rcca", config=PLAIN, run_dir=tmp_path)
    opened, test = load(tmp_path), np.asarray(labels) == "test"
    brain, dna = (opened.score_vectors(name, x[test]) for name, x in features.items())
    scores = brain @ dna.T
    auc = (scores < np.diag(scores)[:, None]).mean()
    oracle = attainable([0.8] * 8, n_gallery=800)["auc"]
    assert held_out_auc(tmp_path, features, labels) - 0.005 < auc < oracle + 0.01
    assert auc > oracle - 0.02
    # In nats: its mean over pairs is the information, which is little less than the true one.
    assert 0.75 < np.diag(scores).mean() / (-4 * np.log(1 - 0.64)) < 1.1


def test_without_a_density_ratio_rcca_has_no_head(tmp_path):
    features, labels = cohort()
    config = replace(PLAIN, score="cosine")
    result = fit_linear(features, labels, method="rcca", config=config, run_dir=tmp_path)
    assert result.alignment.head is None


def test_test_people_change_nothing_and_validation_people_only_what_is_chosen(tmp_path):
    features, labels = cohort()
    test = np.asarray(labels) == "test"
    spoilt = {name: np.where(test[:, None], 100 * x + 7, x) for name, x in features.items()}
    for run, values in (("a", features), ("b", spoilt)):
        fit_linear(values, labels, method="rcca", config=PLAIN, run_dir=tmp_path / run)
    for file in ("model.safetensors", "conditioners.safetensors", "head.safetensors"):
        a, b = (tmp_path / run / "model" / file for run in "ab")
        assert a.read_bytes() == b.read_bytes()


def test_covariates_are_taken_out_and_needed_again(tmp_path):
    features, labels = cohort()
    age = np.random.default_rng(1).normal(50, 8, (400, 1))
    confounded = {name: x + 2 * (age - 50) for name, x in features.items()}
    aucs = []
    for residualise in ((), ("age",)):
        run_dir = tmp_path / str(len(residualise))
        config = replace(PLAIN, residualise=residualise)
        given = age if residualise else None
        result = fit_linear(
            confounded, labels, method="rcca", config=config, run_dir=run_dir,
            covariates=given, covariate_names=residualise,
        )  # fmt: skip
        rows = np.asarray(labels) == "test"
        a, b = (
            result.alignment.embed(name, x[rows], None if given is None else given[rows])
            for name, x in confounded.items()
        )
        aucs.append(np.abs(np.corrcoef(np.column_stack([a, age[rows]]).T)[-1, :-1]).max())
        assert b.shape == a.shape
    assert aucs[0] > 0.5 > 0.3 > aucs[1]
    assert result.summary["residualised_on"] == ["age"]


def test_genes_stand_side_by_side(tmp_path):
    people = gene_cohort()
    features = {"brain": people.brain, "dna": people.genes}
    config = AlignConfig(n_components=32)
    result = fit_linear(features, people.labels, method="rcca", config=config, run_dir=tmp_path)
    assert result.summary["dna_genes"]["pool"] == "concat"
    embedded = load(tmp_path).embed_dna(people.genes)
    np.testing.assert_array_equal(embedded, result.alignment.embed_dna(people.genes))


def _fit_on_a_rank(rank: int, world_size: int, folder: str) -> tuple[bytes, dict]:
    features, labels = cohort()
    result = fit_linear(
        features, labels, method="rcca", config=PLAIN, run_dir=Path(folder),
        ranks=Ranks(rank=rank, local_rank=rank, world_size=world_size),
    )  # fmt: skip
    return result.alignment.embed_brain(features["brain"]).tobytes(), result.summary


@pytest.mark.slow
def test_every_rank_has_what_one_process_finds(tmp_path):
    (one, summary), (other, _) = run_ranks(_fit_on_a_rank, str(tmp_path / "two"))
    features, labels = cohort()
    alone = fit_linear(features, labels, method="rcca", config=PLAIN, run_dir=tmp_path / "one")
    assert one == other == alone.alignment.embed_brain(features["brain"]).tobytes()
    assert summary == {**alone.summary, "n_processes": 2}
    for file in ("model.safetensors", "head.safetensors"):
        a, b = (tmp_path / run / "model" / file for run in ("one", "two"))
        assert a.read_bytes() == b.read_bytes()


# -- bad input -----------------------------------------------------------------------------------


def test_what_the_methods_cannot_do_is_refused_in_one_line(tmp_path):
    features, labels = cohort()

    def refused(word: str, *, method: str = "rcca", config: AlignConfig = PLAIN, **more) -> None:
        values = more.get("features", features)
        with pytest.raises(UserError, match=word) as error:
            fit_linear(values, labels, method=method, config=config, run_dir=tmp_path)  # type: ignore[arg-type]
        assert "\n" not in str(error.value)

    refused("unknown method 'cca'. Did you mean 'rcca'", method="cca")
    refused("two modalities, not 3", features={**features, "dna_more": features["dna"]})
    refused("takes genes side by side", config=replace(PLAIN, dna_pool="attention"))
    few = {name: x[:20] for name, x in features.items()}
    with pytest.raises(UserError, match="expected at least"):
        fit_linear(few, labels[:20], method="pls", config=PLAIN, run_dir=tmp_path)


def test_settings_without_effect_are_named(tmp_path, capsys):
    features, labels = cohort()
    config = replace(PLAIN, lr=0.5, dim_out=32)
    fit_linear(features, labels, method="pls", config=config, run_dir=tmp_path)
    assert "no effect with --method pls: dim_out, lr." in capsys.readouterr().err
