import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from brainfusion.alignment import AlignConfig, AlignmentModel, load, train
from brainfusion.alignment.batches import batch_rows
from brainfusion.alignment.validation import effective_rank, pair_auc
from brainfusion.runtime import config as configs
from brainfusion.runtime.distributed import Ranks
from brainfusion.runtime.errors import CheckpointError, UserError
from tests.alignment.genes.gene_cohort import gene_cohort
from tests.ranks import run_ranks

TINY = AlignConfig(
    dim_hidden=32, dim_out=16, n_components=0, max_steps=12, eval_every=3, warmup_steps=2,
    init="random", score="cosine",
)  # fmt: skip
CLOSED = replace(TINY, init="rcca", score="density-ratio")


def cohort(
    n: int = 400, *, n_latents: int = 4, rho: float = 0.8, n_nuisance: int = 12, seed: int = 0
) -> tuple[dict[str, np.ndarray], list[str]]:
    """Linear-Gaussian features of both sides, and labels: 50% train, 10% validation, 40% test."""
    random = np.random.default_rng(seed)
    u = random.normal(size=(n, n_latents))
    v = rho * u + np.sqrt(1 - rho**2) * random.normal(size=(n, n_latents))
    sides = {}
    for name, latents in (("brain", u), ("dna", v)):
        columns = np.column_stack([latents, random.normal(size=(n, n_nuisance))])
        rotation = np.linalg.qr(random.normal(size=(columns.shape[1],) * 2))[0]
        sides[name] = columns @ rotation
    n_train, n_validation = n // 2, n // 10
    n_test = n - n_train - n_validation
    return sides, ["train"] * n_train + ["validation"] * n_validation + ["test"] * n_test


def held_out_auc(run_dir: Path, features: dict[str, np.ndarray], labels: list[str]) -> float:
    """Brute force: every pair against every non-pair of its row and column."""
    test = np.asarray(labels) == "test"
    opened = load(run_dir)
    s = opened.embed_brain(features["brain"][test]) @ opened.embed_dna(features["dna"][test]).T
    pairs, n = np.diag(s), len(s)
    wins = (s < pairs[:, None]).sum() + (s < pairs[None]).sum()
    return wins / (2 * n * (n - 1))


def test_a_planted_signal_is_found_and_shuffled_pairs_are_not(tmp_path):
    features, labels = cohort(n=1000)
    config = replace(TINY, dim_hidden=64, dim_out=32, max_steps=60)
    train(features, labels, config=config, run_dir=tmp_path / "true")
    assert held_out_auc(tmp_path / "true", features, labels) > 0.7

    order = np.random.default_rng(5).permutation(1000)
    shuffled = {**features, "dna": features["dna"][order]}
    train(shuffled, labels, config=config, run_dir=tmp_path / "shuffled")
    # A uniform rank has variance 1/12; both directions of 400 people, taken as one.
    standard_error = np.sqrt(1 / 12 / 400)
    assert abs(held_out_auc(tmp_path / "shuffled", shuffled, labels) - 0.5) < 3 * standard_error


def test_a_run_folder_holds_config_metrics_summary_and_model(tmp_path):
    features, labels = cohort()
    result = train(features, labels, config=TINY, run_dir=tmp_path, meta={"cohort_hash": "abc"})
    assert configs.from_dict(AlignConfig, configs.read_yaml(tmp_path / "config.yaml")) == TINY
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 13))
    looks = [row for row in rows if "validation_auc" in row]
    assert [row["step"] for row in looks] == [3, 6, 9, 12]
    for row in rows:
        assert row["loss_over_log_n"] == pytest.approx(row["loss"] / np.log(200))
        assert 1.0 <= row["logit_scale"] <= 100.0
        assert row["logit_scale_bounds"] == [1.0, 100.0]
        assert row["pairs_per_s"] > 0
        assert 0 <= row["lr"] <= 1e-3  # from a random start
    for row in looks:
        assert 0 < row["validation_alignment"] < 4
        assert -8 < row["validation_uniformity"] < 0
        assert row["validation_information"] < np.log(40)
        assert 1 <= row["effective_rank"] <= 16
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["validation_auc"] == max(row["validation_auc"] for row in looks)
    assert (summary["n_train"], summary["n_validation"], summary["n_test"]) == (200, 40, 160)
    assert summary["meta"] == {"cohort_hash": "abc"}
    assert {p.name for p in tmp_path.iterdir()} == {
        *("config.yaml", "metrics.jsonl", "summary.json", "model")
    }
    assert result.alignment.info["meta"] == {"cohort_hash": "abc"}


def test_the_kept_weights_are_those_of_the_best_look(tmp_path):
    features, labels = cohort()
    config = replace(TINY, lr=0.05, max_steps=40, patience=3)
    result = train(features, labels, config=config, run_dir=tmp_path)
    rows = np.asarray(labels) == "validation"
    a, b = (load(tmp_path).embed(name, x[rows]) for name, x in features.items())
    auc = pair_auc(torch.from_numpy(a), torch.from_numpy(b))
    assert auc == pytest.approx(result.summary["validation_auc"], abs=1e-4)
    assert result.summary["best_step"] < result.summary["n_steps"] <= 40


def test_embeddings_are_unit_rows_and_survive_saving_exactly(tmp_path):
    features, labels = cohort()
    result = train(features, labels, config=replace(TINY, n_components=8), run_dir=tmp_path)
    for name, x in features.items():
        rows = load(tmp_path / "model").embed(name, x)
        assert rows.dtype == np.float32
        assert rows.shape == (400, 16)
        np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1.0, rtol=1e-5)
        np.testing.assert_array_equal(rows, result.alignment.embed(name, x))


def test_validation_and_test_people_change_nothing_that_is_fitted(tmp_path):
    features, labels = cohort()
    config = replace(TINY, max_steps=3, n_components=8)
    train(features, labels, config=config, run_dir=tmp_path / "a")
    test = np.asarray(labels) == "test"
    spoilt = {name: np.where(test[:, None], 100 * x + 7, x) for name, x in features.items()}
    train(spoilt, labels, config=config, run_dir=tmp_path / "b")
    for file in ("model.safetensors", "conditioners.safetensors"):
        a, b = (tmp_path / run / "model" / file for run in "ab")
        assert a.read_bytes() == b.read_bytes()


def test_the_same_seed_gives_the_same_model_and_another_does_not(tmp_path):
    features, labels = cohort()
    config = replace(TINY, batch_size=64, dropout=0.3)
    for run, seed in (("a", 1), ("b", 1), ("c", 2)):
        torch.manual_seed(ord(run))
        train(features, labels, config=replace(config, seed=seed), run_dir=tmp_path / run)
    a, b, c = ((tmp_path / run / "model/model.safetensors").read_bytes() for run in "abc")
    assert a == b
    assert a != c


@pytest.mark.parametrize("loss", ["clip", "siglip"])
def test_open_clip_losses_train_too(tmp_path, loss):
    features, labels = cohort()
    config = replace(TINY, loss=loss, max_steps=40, lr=0.01, init_scale=5.0)
    result = train(features, labels, config=config, run_dir=tmp_path)
    assert result.summary["validation_auc"] > 0.7


def test_residualised_features_ask_for_covariates_again(tmp_path):
    features, labels = cohort()
    age = np.random.default_rng(2).normal(50, 9, size=(400, 1))
    features = {name: x + 3 * age for name, x in features.items()}
    config = replace(TINY, residualise=("age",))
    with pytest.raises(UserError, match="no covariates were given"):
        train(features, labels, config=config, run_dir=tmp_path)
    train(
        features, labels, config=config, run_dir=tmp_path, covariates=age, covariate_names=["age"]
    )
    opened = load(tmp_path)
    assert opened.conditioners["dna"].covariates == ("age",)
    with pytest.raises(UserError, match="covariates have shape None"):
        opened.embed_dna(features["dna"])
    # What age added is taken out again, so that adding it changes nothing.
    older = opened.embed_brain(features["brain"] + 3.0, age + 1.0)
    np.testing.assert_allclose(older, opened.embed_brain(features["brain"], age), atol=1e-3)


def test_a_loss_that_never_leaves_log_n_is_said_plainly(tmp_path, capsys):
    features, labels = cohort()
    train(features, labels, config=replace(TINY, lr=1e-9, max_steps=3), run_dir=tmp_path / "a")
    assert "No pairing signal yet" in capsys.readouterr().err
    train(features, labels, config=replace(TINY, max_steps=40), run_dir=tmp_path / "b")
    assert "No pairing signal yet" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f, y: f["dna"].__setitem__((3, 2), np.nan), "NaN or infinite values in 1 of 400"),
        (lambda f, y: f.update(dna=f["dna"][:-1]), "expected one row for each of the 400 labels"),
        (lambda f, y: f.pop("dna"), "1 modalities: expected two or more"),
        (lambda f, y: y.__setitem__(0, "trian"), "label 'trian'"),
        (lambda f, y: y.__setitem__(slice(200, 240), ["test"] * 40), "0 validation people"),
        (lambda f, y: f["dna"].fill(1.0), "columns are constant"),
    ],
)
def test_input_that_does_not_fit_is_refused_in_one_line(tmp_path, spoil, message):
    features, labels = cohort()
    spoil(features, labels)
    with pytest.raises(UserError, match=message) as caught:
        train(features, labels, config=TINY, run_dir=tmp_path)
    assert "\n" not in str(caught.value)


def test_settings_out_of_range_are_refused():
    for wrong in ({"lr": -1.0}, {"dropout": 1.0}, {"init_scale": 200.0}, {"batch_size": -1}):
        with pytest.raises(UserError, match=next(iter(wrong))):
            AlignConfig(**wrong)


@pytest.mark.parametrize("file", ["model.safetensors", "conditioners.safetensors", "state.json"])
def test_a_folder_with_a_missing_or_cut_off_file_is_refused(tmp_path, file):
    features, labels = cohort()
    train(features, labels, config=replace(TINY, max_steps=1), run_dir=tmp_path)
    path = tmp_path / "model" / file
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=file):
        load(tmp_path)
    path.unlink()
    with pytest.raises(CheckpointError, match=file):
        load(tmp_path)


def test_an_unknown_modality_names_the_known_ones():
    model = AlignmentModel({"brain": 3, "dna": 4})
    with pytest.raises(UserError, match="Known: brain, dna"):
        model.embed("brian", torch.zeros(1, 3))


def test_the_logit_scale_starts_where_clip_does_and_is_clamped():
    model = AlignmentModel({"brain": 3, "dna": 4})
    assert model.logit_scale.item() == pytest.approx(1 / 0.07)
    for value, clamped in ((9.0, 100.0), (-3.0, 1.0)):
        torch.nn.init.constant_(model.log_scale, value)
        model.clamp_scale_()
        assert model.logit_scale.item() == pytest.approx(clamped)


def test_pair_auc_counts_by_hand_and_by_tiles():
    a = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
    # s = [[1, 0, 0], [0, 1, 1], [.6, .8, .8]]: rows win 1, .75, .75; columns 1, 1, .5
    b = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    assert pair_auc(a, b) == pytest.approx((1 + 0.75 + 0.75 + 1 + 1 + 0.5) / 6)
    x, y = torch.randn(2, 50, 4, generator=torch.Generator().manual_seed(0))
    assert pair_auc(x, y, tile=7) == pair_auc(x, y)
    same = torch.ones(9, 2)
    assert pair_auc(same, same) == 0.5


def test_effective_rank_of_known_spectra():
    assert effective_rank(torch.ones(8, 3)) == 1.0
    line = torch.linspace(-1, 1, 9)[:, None] * torch.ones(1, 5)
    assert effective_rank(line) == pytest.approx(1.0, abs=1e-6)
    corners = torch.cat([torch.eye(4), -torch.eye(4)])
    assert effective_rank(corners) == pytest.approx(4.0)


@pytest.mark.parametrize("size", [0, 10, 64])
def test_ranks_share_a_batch_without_overlap_and_each_epoch_sees_everyone_once(size):
    config = replace(TINY, batch_size=size)
    seen = []
    for step in range(1, 1 + 40 // (size or 40) if size < 40 else 2):
        np.testing.assert_array_equal(
            batch_rows(40, step, config), batch_rows(40, step, config, world_size=3)
        )
        seen += list(batch_rows(40, step, config))
    assert sorted(seen) == list(range(40))


def test_open_clip_batches_are_equal_on_all_ranks():
    config = replace(TINY, loss="clip")
    assert len(batch_rows(41, 3, config, world_size=4)) == 40


def two_process_runs() -> dict[str, tuple[dict[str, Any], list[str], AlignConfig]]:
    """What two processes have to train like one: features, labels and config."""
    features, labels = cohort(n=90)
    config = replace(TINY, dropout=0.3, patience=50)
    genes = gene_cohort(n=150, models=("evo2", "caduceus"), missing=0.1)
    pooled = replace(config, dna_pool="attention", gene_components=5, gene_width=16)
    return {
        "whole": (features, labels, config),
        "batches": (features, labels, replace(config, batch_size=15, exchange="ring")),
        "closed form": (features, labels, replace(config, init="rcca", batch_size=15)),
        "members": (
            features,
            labels,
            replace(
                config,
                init="rcca",
                score="density-ratio",
                batch_size=15,
                max_steps=8,
                lr=0.01,
                average_decay=0.8,
                choose_dropout=(0.5, 0.0),
                n_seeds=2,
            ),
        ),
        "genes": (genes.features, genes.labels, replace(pooled, batch_size=15)),
        "three": (lacking(features), labels, replace(config, batch_size=15)),
    }


def lacking(features: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Two DNA modalities, of which a third of the people lack one, with rows of NaN."""
    other = features["dna"] * np.where(np.arange(len(features["dna"])) % 3, 1.0, np.nan)[:, None]
    return {"brain": features["brain"], "dna_one": features["dna"], "dna_other": other}


def who_has(features: dict[str, Any]) -> dict[str, np.ndarray]:
    return {
        name: np.isfinite(x).all(axis=1)
        for name, x in features.items()
        if isinstance(x, np.ndarray)
    }


def two_process_run(rank: int, world_size: int, folder: str) -> list[dict[str, Any]]:
    ranks = Ranks(rank=rank, world_size=world_size)
    for name, (features, labels, config) in two_process_runs().items():
        run_dir, has = Path(folder) / f"{name}-{world_size}", who_has(features)
        train(features, labels, config=config, run_dir=run_dir, ranks=ranks, present=has)
    return []


def test_two_processes_train_the_same_model_as_one(tmp_path):
    two_process_run(0, 1, str(tmp_path))
    run_ranks(two_process_run, str(tmp_path))
    for name, (features, _, _) in two_process_runs().items():
        one, two = (
            [
                json.loads(line)
                for line in (tmp_path / f"{name}-{n}/metrics.jsonl").read_text().splitlines()
            ]
            for n in (1, 2)
        )
        assert len(one) == len(two) >= 12
        assert [row["step"] for row in one] == [row["step"] for row in two]
        for a, b in zip(one, two, strict=True):
            # float32 sums in another order
            assert b["loss"] == pytest.approx(a["loss"], rel=1e-4)
            assert b["logit_scale"] == pytest.approx(a["logit_scale"], rel=1e-4)
        if name == "members":
            kept = [
                json.loads((tmp_path / f"members-{n}/summary.json").read_text()) for n in (1, 2)
            ]
            assert kept[0]["kept"] == kept[1]["kept"]
            assert kept[0]["chosen"] == kept[1]["chosen"]
            assert len(kept[0]["members"]) == 3
        for side, x in features.items():
            own = x[who_has(features)[side]] if isinstance(x, np.ndarray) else x
            rows = [load(tmp_path / f"{name}-{n}").embed(side, own) for n in (1, 2)]
            np.testing.assert_allclose(rows[0], rows[1], atol=1e-4)
    genes = gene_cohort(n=150, models=("evo2", "caduceus"), missing=0.1).genes
    shares = [load(tmp_path / f"genes-{n}").gene_weights(genes).share for n in (1, 2)]
    np.testing.assert_allclose(shares[0], shares[1], atol=1e-4)
    assert shares[0].std() > 1e-3  # it has moved
