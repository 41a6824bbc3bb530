"""An encoder in the graph: a trait that its features hide is found, and shuffled pairs are not."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn as nn

from brainfusion.alignment import AlignConfig, Alignment, GeneArray, GeneVectors, load, train
from brainfusion.alignment.conditioning import Conditioner
from brainfusion.alignment.density_ratio import DensityRatio
from brainfusion.alignment.finetuning.affine import Affine
from brainfusion.alignment.finetuning.config import FinetuneConfig
from brainfusion.alignment.finetuning.finetune import check_alignment, finetune
from brainfusion.alignment.finetuning.tower import batch_of
from brainfusion.alignment.losses.pair_ids import PairIds
from brainfusion.alignment.validation import pair_auc
from brainfusion.runtime import config as configs
from brainfusion.runtime.distributed import Ranks
from brainfusion.runtime.errors import UserError
from brainfusion.runtime.files import read_json
from brainfusion.runtime.logs import read_metrics
from tests.ranks import run_ranks

N, N_SOURCES, N_OTHERS, N_TOKENS, PATCH, WIDTH = 360, 3, 9, 24, 12, 12
ALIGN = AlignConfig(
    n_components=0, dim_hidden=32, dim_out=16, dropout=0.0, max_steps=100, init="random",
    score="cosine",
)  # fmt: skip
QUICK = FinetuneConfig(
    how="all", lr=1e-2, encoder_lr_scale=1.0, max_steps=30, eval_every=3, patience=4,
    warmup_steps=2, micro_batch=90, encoder_weight_decay=0.0, rank=4,
    adapt=("patch", "blocks.*"),
)  # fmt: skip


class Encoder(nn.Module):
    """Tokens of a recording through residual blocks to their mean: a transformer's outline."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.randn(N_TOKENS, WIDTH) * 0.02)
        self.patch = nn.Linear(PATCH, WIDTH)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, 32), nn.GELU(), nn.Linear(32, WIDTH)) for _ in range(2)
        )
        self.norm = nn.LayerNorm(WIDTH)
        with torch.no_grad():
            for parameter in self.parameters():
                if parameter.ndim > 1:
                    parameter.mul_(scale)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.patch(tokens) + self.position
        for block in self.blocks:
            x = x + block(x)
        return self.norm(x).mean(1)


class TinyTower:
    blocks, after, fixed = "blocks", ("norm.*",), ("position",)

    def __init__(self, tokens: torch.Tensor, scale: float = 0.2) -> None:
        torch.manual_seed(1)
        self.module = Encoder(scale).eval()
        self.tokens = tokens

    def load(self, people: np.ndarray, step: int | None) -> torch.Tensor:
        return self.tokens[people]

    def features(self, loaded: torch.Tensor) -> torch.Tensor:
        return self.module(loaded)

    def frozen(self) -> np.ndarray:
        with torch.no_grad():
            return self.module(self.tokens).numpy()


def cohort(n: int = N) -> tuple[torch.Tensor, np.ndarray, list[str]]:
    """Recordings in which a trait is the amplitude of some sources, below louder ones that vary
    as much between people; DNA that knows the trait; labels (60, 20, 20%).
    """
    random = np.random.default_rng(0)
    trait = random.normal(size=(n, N_SOURCES))
    dna = trait + 0.3 * random.normal(size=trait.shape)
    dna = np.concatenate([dna, random.normal(size=(n, 4))], axis=1)
    loud = 1.5 * np.exp(0.7 * random.normal(size=(n, N_OTHERS)))
    amplitude = np.concatenate([np.exp(0.7 * trait), loud], axis=1)
    waves = np.linalg.qr(random.normal(size=(PATCH, PATCH)))[0][: N_SOURCES + N_OTHERS]
    tokens = (random.normal(size=(n, N_TOKENS, len(waves))) * amplitude[:, None]) @ waves
    labels = ["train"] * (n * 3 // 5) + ["validation"] * (n // 5)
    return torch.from_numpy(tokens).float(), dna, labels + ["test"] * (n - len(labels))


def shuffled_within(labels: list[str], dna: np.ndarray) -> np.ndarray:
    rng, order = np.random.default_rng(7), np.arange(N)
    for side in ("train", "validation", "test"):
        rows = np.flatnonzero(np.asarray(labels) == side)
        order[rows] = rng.permutation(rows)
    return dna[order]


@pytest.fixture(scope="module")
def starts(tmp_path_factory) -> Path:
    """Alignments of the frozen features, trained once: true, dropout, shuffled."""
    folder = tmp_path_factory.mktemp("starts")
    tokens, dna, labels = cohort()
    features = TinyTower(tokens).frozen()
    for name, genes, dropout in (
        ("true", dna, 0.0),
        ("dropout", dna, 0.3),
        ("shuffled", shuffled_within(labels, dna), 0.0),
    ):
        config = replace(ALIGN, dropout=dropout)
        train({"brain": features, "dna": genes}, labels, config=config, run_dir=folder / name)
    return folder


def run(start: Path, folder: Path, config: FinetuneConfig, **how: Any):
    """Fine-tune from a start; returns tower, alignment, result, DNA and labels."""
    tokens, dna, labels = cohort()
    if start.name == "shuffled":
        dna = shuffled_within(labels, dna)
    tower, align = TinyTower(tokens), load(start)
    result = finetune(align, tower, dna, labels, config=config, run_dir=folder, **how)
    return tower, align, result, dna, labels


def auc(embeddings: dict[str, np.ndarray], labels: list[str], split: str) -> float:
    rows = np.asarray(labels) == split
    return pair_auc(*(torch.from_numpy(embeddings[side][rows]) for side in ("brain", "dna")))


def frozen_auc(tower: TinyTower, align: Alignment, dna: np.ndarray, labels: list[str]) -> float:
    """Test AUC of the alignment on the features of an encoder that was never tuned."""
    features = {"brain": TinyTower(tower.tokens).frozen(), "dna": dna}
    return auc({side: align.embed(side, x) for side, x in features.items()}, labels, "test")


# -- what it finds ---------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["all", "lora"])
def test_a_trait_that_the_frozen_features_hide_is_found_by_tuning(starts, tmp_path, how):
    """Against the frozen start, and against projectors that go on without the encoder."""
    config = replace(QUICK, how=how)
    tower, align, result, dna, labels = run(starts / "true", tmp_path / "a", config)
    summary, test = result.summary, auc(result.embeddings, labels, "test")
    before = frozen_auc(tower, align, dna, labels)
    assert summary["validation_auc"] > summary["finetune"]["frozen_validation_auc"] + 0.05
    assert test > before + 0.05, (test, before)
    control = run(starts / "true", tmp_path / "b", replace(QUICK, how="none"))[2]
    assert test > auc(control.embeddings, labels, "test") + 0.03


def test_shuffled_pairs_stay_at_chance_on_test_people(starts, tmp_path):
    _, _, result, _, labels = run(starts / "shuffled", tmp_path, QUICK)
    # A uniform rank has variance 1/12; both directions of 72 people, taken as one.
    assert abs(auc(result.embeddings, labels, "test") - 0.5) < 3 * np.sqrt(1 / 12 / 72)


def test_validation_is_never_worse_than_the_frozen_start(starts, tmp_path):
    """A learning rate that spoils everything at once: the start is kept, to the bit."""
    tower, align, result, dna, labels = run(
        starts / "true", tmp_path, replace(QUICK, lr=5.0, patience=2)
    )
    assert result.summary["best_step"] == 0
    assert result.summary["validation_auc"] == result.summary["finetune"]["frozen_validation_auc"]
    start = TinyTower(tower.tokens).module.state_dict()
    for name, value in tower.module.state_dict().items():
        assert torch.equal(value, start[name]), name
    assert auc(result.embeddings, labels, "test") == frozen_auc(tower, align, dna, labels)


# -- what it does not touch ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "moved"),
    [
        ("lora", {"patch.weight", *(f"blocks.{i}.{j}.weight" for i in (0, 1) for j in (0, 2))}),
        ("last-1", {*(f"blocks.1.{j}.{x}" for j in (0, 2) for x in ("weight", "bias")),
                    "norm.weight", "norm.bias"}),
    ],
)  # fmt: skip
def test_only_what_was_chosen_has_moved_and_the_weights_are_plain(starts, tmp_path, how, moved):
    tower, align, result, dna, _ = run(starts / "true", tmp_path, replace(QUICK, how=how))
    assert result.summary["best_step"] > 0
    start = TinyTower(tower.tokens).module.state_dict()
    found = tower.module.state_dict()
    assert found.keys() == start.keys()
    assert {name for name, value in found.items() if not torch.equal(value, start[name])} == moved
    # The alignment that was given is as it was; the new one is another.
    assert not np.allclose(align.embed_dna(dna), result.alignment.embed_dna(dna))
    np.testing.assert_array_equal(align.embed_dna(dna), load(starts / "true").embed_dna(dna))


def test_the_tuned_encoder_and_the_saved_model_give_the_embeddings_of_the_run(starts, tmp_path):
    tower, _, result, dna, _ = run(starts / "true", tmp_path, replace(QUICK, how="lora"))
    opened = load(tmp_path)
    # Batches of another size round differently.
    np.testing.assert_allclose(
        opened.embed_brain(tower.frozen()), result.embeddings["brain"], atol=1e-5
    )
    np.testing.assert_allclose(opened.embed_dna(dna), result.embeddings["dna"], atol=1e-5)
    assert opened.info["finetune"]["how"] == "lora"


def test_the_score_of_pairs_is_fitted_anew_where_the_alignment_has_one(tmp_path):
    tokens, dna, labels = cohort()
    tower, config = TinyTower(tokens), replace(ALIGN, max_steps=40, score="density-ratio")
    sides = {"brain": tower.frozen(), "dna": dna}
    align = train(sides, labels, config=config, run_dir=tmp_path / "a").alignment
    result = finetune(align, tower, dna, labels, config=QUICK, run_dir=tmp_path / "b")
    parts = (
        {side: rows[np.asarray(labels) == split] for side, rows in result.embeddings.items()}
        for split in ("train", "validation")
    )
    expected = DensityRatio.fit(*parts)
    found = load(tmp_path / "b").head
    assert found is not None
    for side, rows in result.embeddings.items():
        np.testing.assert_array_equal(found.vectors(side, rows), expected.vectors(side, rows))
    assert align.head is not None
    assert found.information > align.head.information


def test_test_people_change_nothing(tmp_path):
    tokens, dna, labels = cohort()
    test = np.asarray(labels) == "test"
    spoilt = torch.where(torch.from_numpy(test)[:, None, None], 5 * tokens + 1, tokens)
    weights = []
    for name, values, genes in (("a", tokens, dna), ("b", spoilt, np.where(test[:, None], 9, dna))):
        tower = TinyTower(values)
        align = train(
            {"brain": tower.frozen(), "dna": genes}, labels, config=ALIGN, run_dir=tmp_path / name
        ).alignment
        finetune(
            align, tower, genes, labels, config=replace(QUICK, max_steps=4),
            run_dir=tmp_path / f"{name}-tuned",
        )  # fmt: skip
        weights.append(tower.module.state_dict())
    for key, value in weights[0].items():
        assert torch.equal(value, weights[1][key]), key


# -- the run folder --------------------------------------------------------------------------------


def test_a_run_folder_holds_config_metrics_summary_and_model(starts, tmp_path):
    config = replace(QUICK, max_steps=7, how="last-1")
    folder = tmp_path / "tuned"
    _, _, result, _, _ = run(starts / "true", folder, config, meta={"cohort_hash": "abc"})
    assert {path.name for path in folder.iterdir()} == {
        *("config.yaml", "metrics.jsonl", "summary.json", "model")
    }
    assert configs.from_dict(FinetuneConfig, configs.read_yaml(folder / "config.yaml")) == config
    rows = read_metrics(folder / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(8))
    looks = [row for row in rows if "validation_auc" in row]
    assert [row["step"] for row in looks] == [0, 3, 6, 7]
    assert rows[0]["frozen"]
    summary = read_json(folder / "summary.json")
    assert summary["validation_auc"] == max(row["validation_auc"] for row in looks)
    assert (summary["n_train"], summary["n_validation"], summary["n_test"]) == (216, 72, 72)
    assert summary["meta"] == {"cohort_hash": "abc"}
    assert summary["finetune"]["n_trained"] == result.trained.n_trained


# -- one result, however it is computed ------------------------------------------------------------


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(folder / "metrics.jsonl")[1:]]


def short(starts: Path, folder: Path, **changes: Any) -> tuple[list[float], dict[str, Any]]:
    """Five steps with dropout in the projectors and batches of 100 people."""
    config = replace(QUICK, max_steps=5, batch_size=100, **changes)
    tower = run(starts / "dropout", folder, config)[0]
    return losses(folder), tower.module.state_dict()


def close(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    for name, value in expected.items():
        # Adam makes the same step of gradients that differ by float32's rounding, but for those
        # that are nearly 0.
        torch.testing.assert_close(got[name], value, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("how", ["all", "lora"])
def test_micro_batches_decide_memory_and_nothing_else(starts, tmp_path, how):
    whole = short(starts, tmp_path / "whole", micro_batch=100, how=how)
    small = short(starts, tmp_path / "small", micro_batch=7, how=how)
    np.testing.assert_allclose(small[0], whole[0], rtol=1e-5)
    close(small[1], whole[1])


def on_rank(rank: int, world_size: int, start: Path, folder: Path) -> tuple[list[float], Any]:
    config = replace(QUICK, max_steps=5, batch_size=101, how="lora")
    tower = run(start, folder, config, ranks=Ranks(rank=rank, world_size=world_size))[0]
    return losses(folder), tower.module.state_dict()


@pytest.mark.slow
def test_two_processes_train_what_one_does(starts, tmp_path):
    """An odd batch of people, dropout on: shares of 51 and 50."""
    alone = on_rank(0, 1, starts / "dropout", tmp_path / "alone")
    first, second = run_ranks(on_rank, starts / "dropout", tmp_path / "two")
    np.testing.assert_allclose(first[0], alone[0], rtol=1e-5)
    close(first[1], alone[1])
    for name, value in first[1].items():
        assert torch.equal(value, second[1][name]), name


def test_the_same_seed_gives_the_same_encoder_and_another_does_not(starts, tmp_path):
    a, b = (short(starts, tmp_path / name) for name in "ab")
    assert a[0] == b[0]
    for name, value in a[1].items():
        assert torch.equal(value, b[1][name])
    assert short(starts, tmp_path / "c", seed=1)[0] != a[0]


def test_batches_are_functions_of_the_step_and_cover_everybody():
    config = replace(QUICK, batch_size=10)
    seen = np.concatenate([batch_of(30, step, config) for step in (1, 2, 3)])
    assert sorted(seen) == list(range(30))
    np.testing.assert_array_equal(batch_of(30, 2, config), batch_of(30, 2, config))
    assert not np.array_equal(batch_of(30, 4, config), batch_of(30, 1, config))
    np.testing.assert_array_equal(batch_of(30, 1, replace(config, batch_size=99)), np.arange(30))


def test_relatives_are_no_negatives_where_ids_say_so(starts, tmp_path):
    """With everybody of one family there is nobody to be told from: the loss is 0."""
    family = torch.zeros(N, 1, dtype=torch.int64)
    run(starts / "true", tmp_path, replace(QUICK, max_steps=2), ids=PairIds(excluded=family))
    assert losses(tmp_path) == pytest.approx([0.0, 0.0], abs=1e-6)


# -- the conditioner in the graph ------------------------------------------------------------------


@pytest.mark.parametrize("n_components", [0, 5])
@pytest.mark.parametrize("n_covariates", [0, 2])
def test_the_affine_map_is_the_conditioners_and_has_its_gradient(n_components, n_covariates):
    random = np.random.default_rng(0)
    x = random.normal(size=(40, 9)) * 3 + 5
    x[:, 4] = 1.0  # a constant column
    covariates = random.normal(size=(40, n_covariates)) if n_covariates else None
    names = [str(i) for i in range(n_covariates)]
    fitted = Conditioner.fit(
        x, n_components=n_components, covariates=covariates, covariate_names=names
    )
    affine = Affine(fitted)
    features = torch.from_numpy(x).requires_grad_()
    out = affine(features, affine.offset(covariates, 40))
    np.testing.assert_allclose(out.detach().numpy(), fitted.transform(x, covariates), atol=1e-6)
    # Linear: the gradient of a sum of outputs is what a unit of a column adds to them.
    weight = torch.from_numpy(random.normal(size=tuple(out.shape))).float()
    (out * weight).sum().backward()
    for column in (0, 4, 8):
        moved = x.copy()
        moved[:, column] += 1.0
        change = fitted.transform(moved, covariates) - fitted.transform(x, covariates)
        expected = (change * weight.numpy()).sum(1)
        np.testing.assert_allclose(features.grad[:, column].numpy(), expected, atol=1e-4)


# -- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"how": "lorra"}, "how='lorra' is unknown. Did you mean 'lora'?"),
        ({"how": "last-x"}, "expected last-K with a number of blocks"),
        ({"micro_batch": 0}, "micro_batch=0: expected more than 0"),
        ({"windows": -1}, "windows=-1: expected 0 or more"),
        ({"batch_size": 1}, "one pair has nothing to be told from"),
    ],
)
def test_settings_that_cannot_be_are_one_line(changes, says):
    with pytest.raises(UserError) as error:
        replace(QUICK, **changes)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_alignments_that_are_not_covered_are_refused_in_one_line(tmp_path):
    tokens, dna, labels = cohort()
    features = TinyTower(tokens).frozen()

    def refused(run_dir: Path, **sides: Any) -> str:
        config = sides.pop("config", replace(ALIGN, max_steps=1))
        align = train(sides, labels, config=config, run_dir=run_dir).alignment
        with pytest.raises(UserError) as error:
            check_alignment(align)
        return str(error.value)

    said = refused(tmp_path / "several", brain=features, dna_evo2=dna, dna_caduceus=dna[:, ::-1])
    assert "has the modalities brain, dna_evo2, dna_caduceus: fine-tuning takes one" in said
    genes = GeneVectors.of(
        {
            "evo2": GeneArray(
                genes=("g",), vectors=dna[:, None].astype("f4"), mask=np.ones((N, 1), bool)
            )
        }
    )
    said = refused(
        tmp_path / "genes", brain=features, dna=genes,
        config=replace(ALIGN, max_steps=1, dna_pool="mean", gene_components=2),
    )  # fmt: skip
    assert "this alignment pools genes" in said
    assert "--dna-pool concat" in said


def test_a_batch_smaller_than_the_processes_is_refused(starts, tmp_path):
    with pytest.raises(UserError, match="a batch of 2 people does not give each of 3 processes"):
        run(
            starts / "true", tmp_path, replace(QUICK, batch_size=2),
            ranks=Ranks(rank=0, world_size=3),
        )  # fmt: skip
