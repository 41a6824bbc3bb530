import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from brainfusion.alignment import AlignConfig, GeneArray, GeneVectors, load, train
from brainfusion.alignment.train import pair_auc
from brainfusion.runtime.errors import CheckpointError, UserError
from tests.alignment.genes.gene_cohort import GeneCohort, gene_cohort, roc_area

TINY = AlignConfig(
    dim_hidden=32, dim_out=16, gene_width=16, gene_components=5, n_components=16, max_steps=6,
    eval_every=3, warmup_steps=2, dna_pool="attention",
    shrinkage=0.3, dropout=0.1,
)  # fmt: skip
FINDS = replace(TINY, dim_hidden=128, dim_out=64, gene_width=64, max_steps=60, eval_every=5)
POOLS = ("concat", "mean", "max", "attention")


def trained(cohort: GeneCohort, config: AlignConfig, run_dir: Path, **more: Any):
    return train(cohort.features, cohort.labels, config=config, run_dir=run_dir, **more).alignment


@pytest.mark.slow
def test_attention_puts_the_causal_genes_first_and_none_on_shuffled_pairs(tmp_path):
    planted, null = [], []
    for seed in range(3):
        cohort = gene_cohort(seed)
        alignment = trained(cohort, FINDS, tmp_path / "planted")
        rows = cohort.test
        found = alignment.gene_weights(cohort.genes.take(rows))
        planted.append(
            [roc_area(found.share, cohort.causal), roc_area(found.attention.mean(0), cohort.causal)]
        )
        brain, dna = alignment.embed_brain(cohort.brain[rows]), cohort.genes.take(rows)
        auc = pair_auc(torch.from_numpy(brain), torch.from_numpy(alignment.embed_dna(dna)))
        assert auc > 0.7
        for shuffle in range(4):
            control = cohort.with_pairs_shuffled(shuffle)
            looked = trained(control, FINDS, tmp_path / "null").gene_weights(control.genes)
            null.append(roc_area(looked.share, cohort.causal))
    assert np.min(planted) > 0.8
    # 12 runs of an area from 3 genes against 9, whose variance under chance is 13 / (12 * 27)
    assert abs(np.mean(null) - 0.5) < 3 * np.sqrt(13 / (12 * 27) / len(null))


@pytest.mark.parametrize("pool", POOLS)
def test_every_pool_finds_the_pairs_of_people_it_has_not_seen(tmp_path, pool):
    cohort = gene_cohort(1, missing=0.1)
    # A mean has to silence the genes that are not linked one by one.
    config = replace(FINDS, dna_pool=pool, lr=3e-3)
    opened = trained(cohort, config, tmp_path)
    rows = cohort.test
    brain = torch.from_numpy(opened.embed_brain(cohort.brain[rows]))
    dna = torch.from_numpy(opened.embed_dna(cohort.genes.take(rows)))
    assert pair_auc(brain, dna) > (0.55 if pool == "max" else 0.65)


@pytest.mark.parametrize("pool", POOLS)
def test_a_saved_run_embeds_the_same_and_hides_genes_the_same(tmp_path, pool):
    cohort = gene_cohort(n=120, models=("evo2", "caduceus"), missing=0.1)
    alignment = trained(cohort, replace(TINY, dna_pool=pool), tmp_path)
    opened, genes = load(tmp_path), cohort.genes
    rows = opened.embed_dna(genes)
    np.testing.assert_array_equal(rows, alignment.embed_dna(genes))
    assert opened.conditioners["dna"].genes == genes.genes
    shown = np.ones(24, bool)
    shown[[3, 17]] = False
    hidden = opened.embed_dna(genes, mask=shown)
    np.testing.assert_array_equal(hidden, alignment.embed_dna(genes, mask=shown))
    has = genes.mask[:, 3] | genes.mask[:, 17]
    np.testing.assert_allclose(hidden[~has], rows[~has], atol=1e-6)
    moved = np.abs(hidden[has] - rows[has]).max(axis=1) > 1e-7
    # A gene that is nowhere the greatest of a person adds nothing to a maximum.
    assert moved.mean() > 0.8 if pool == "max" else moved.all()
    summary = json.loads((tmp_path / "summary.json").read_text())["dna_genes"]
    assert summary == {
        "pool": pool, "models": ["evo2", "caduceus"], "given": 24, "used": 24
    }  # fmt: skip


def test_a_hidden_gene_may_hold_anything(tmp_path):
    cohort = gene_cohort(n=120)
    opened = trained(cohort, TINY, tmp_path)
    source = cohort.genes.sources["evo2"]
    assert isinstance(source, GeneArray)
    spoilt, shown = source.vectors.copy(), np.arange(12) != 4
    spoilt[:, 4] = np.nan
    other = GeneVectors.of({"evo2": replace(source, vectors=spoilt)})
    np.testing.assert_array_equal(
        opened.embed_dna(other, mask=shown), opened.embed_dna(cohort.genes, mask=shown)
    )
    with pytest.raises(UserError, match="evo2 vectors of G04 hold NaN"):
        opened.embed_dna(other)


@pytest.mark.parametrize("pool", POOLS)
def test_people_who_are_not_trained_on_change_nothing_that_is_fitted(tmp_path, pool):
    cohort = gene_cohort(n=120)
    source = cohort.genes.sources["evo2"]
    assert isinstance(source, GeneArray)
    spoilt = source.vectors.copy()
    spoilt[cohort.test] = 100 * spoilt[cohort.test] + 7
    genes = GeneVectors.of({"evo2": replace(source, vectors=spoilt)})
    config = replace(TINY, dna_pool=pool)
    for run, dna in (("a", cohort.genes), ("b", genes)):
        features = {"brain": cohort.brain, "dna": dna}
        train(features, cohort.labels, config=config, run_dir=tmp_path / run)
    for file in ("model.safetensors", "conditioners.safetensors"):
        a, b = ((tmp_path / run / "model" / file).read_bytes() for run in "ab")
        assert a == b


def test_the_same_seed_gives_the_same_weights_of_genes(tmp_path):
    cohort = gene_cohort(n=120)
    config = replace(TINY, batch_size=24)
    runs = []
    for run, seed in (("a", 1), ("b", 1), ("c", 2)):
        torch.manual_seed(ord(run))
        alignment = trained(cohort, replace(config, seed=seed), tmp_path / run)
        runs.append(alignment.gene_weights(cohort.genes).share)
    np.testing.assert_array_equal(runs[0], runs[1])
    assert not np.array_equal(runs[0], runs[2])


def test_what_a_caller_has_at_hand_will_do(tmp_path):
    cohort = gene_cohort(n=120)
    opened = trained(cohort, TINY, tmp_path)
    source = cohort.genes.sources["evo2"]
    assert isinstance(source, GeneArray)
    rows = opened.embed_dna(cohort.genes)
    for features in (source, {"evo2": source}, source.vectors, source.vectors.reshape(120, -1)):
        np.testing.assert_array_equal(opened.embed_dna(features), rows)


def test_two_models_are_not_confused_with_one(tmp_path):
    cohort = gene_cohort(n=120, models=("evo2", "caduceus"))
    opened = trained(cohort, TINY, tmp_path)
    with pytest.raises(UserError, match="one table of DNA vectors, but the model was trained"):
        opened.embed_dna(cohort.genes.sources["evo2"])
    swapped = dict(reversed(cohort.genes.sources.items()))
    rows = opened.embed_dna(GeneVectors.of(swapped))
    np.testing.assert_array_equal(rows, opened.embed_dna(cohort.genes))


def test_settings_that_do_nothing_are_said(tmp_path, capsys):
    cohort = gene_cohort(n=120)
    trained(cohort, replace(TINY, dna_pool="concat", attention_lr=0.2), tmp_path)
    said = capsys.readouterr().err
    for name in ("gene_components", "gene_width", "attention_lr"):
        assert f"warning: {name} has no effect with dna_pool='concat'" in said
    trained(cohort, TINY, tmp_path)
    assert "no effect" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: f.update(dna=np.ones((120, 3))), "dna_pool='attention' pools genes, but no"),
        (lambda f: f.update(dna=f["dna"].take(np.arange(9))), "gene vectors are those of 9 people"),
    ],
)
def test_genes_that_do_not_fit_are_refused_in_one_line(tmp_path, spoil, message):
    cohort = gene_cohort(n=120)
    features = cohort.features
    spoil(features)
    with pytest.raises(UserError, match=message) as caught:
        train(features, cohort.labels, config=TINY, run_dir=tmp_path)
    assert "\n" not in str(caught.value)


def test_settings_of_genes_out_of_range_are_refused():
    for wrong in ({"gene_components": -1}, {"gene_width": 0}, {"attention_lr": 0.0}):
        with pytest.raises(UserError, match=next(iter(wrong))):
            AlignConfig(**wrong)


def old_folder(tmp_path: Path) -> tuple[GeneCohort, np.ndarray, np.ndarray]:
    """A run as it was written before genes had towers: one table of all, and no word of genes."""
    cohort = gene_cohort(n=120)
    table = cohort.genes.concatenated(known_from=np.arange(120))
    features = {"brain": cohort.brain, "dna": table}
    result = train(
        features, cohort.labels, config=replace(TINY, dna_pool="concat"), run_dir=tmp_path
    )
    path = tmp_path / "model" / "state.json"
    state = json.loads(path.read_text())
    assert state["model"].pop("genes") == {}
    for name in ("dna_pool", "gene_components", "gene_width", "attention_lr"):
        del state["config"][name]
    path.write_text(json.dumps(state))
    return cohort, table, result.alignment.embed_dna(table)


def test_a_run_of_before_genes_had_towers_still_opens(tmp_path):
    cohort, table, rows = old_folder(tmp_path)
    opened = load(tmp_path)
    np.testing.assert_array_equal(opened.embed_dna(table), rows)
    own = cohort.genes.sources["evo2"]
    for features, mask in ((cohort.genes, None), (own, None), (table, np.ones(12, bool))):
        with pytest.raises(UserError, match="'dna' does not come as genes in this model") as caught:
            opened.embed_dna(features, mask=mask)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="has no pool of genes, so it weighs none"):
        opened.gene_weights(table)


@pytest.mark.parametrize("change", ["pool", "genes", "component", "unknown"])
def test_a_folder_whose_parts_do_not_fit_is_refused_in_one_line(tmp_path, change):
    trained(gene_cohort(n=120), TINY, tmp_path)
    path = tmp_path / "model" / "state.json"
    state = json.loads(path.read_text())
    genes = state["model"]["genes"]["dna"]
    if change == "pool":
        genes["pool"] = "mean"
    elif change == "genes":
        genes["n_components"].pop()
    elif change == "component":
        state["conditioners"]["dna"]["parts"].append({"covariates": []})
    else:
        state["model"]["heads"] = 2
    path.write_text(json.dumps(state))
    with pytest.raises(CheckpointError, match="do not fit each other") as caught:
        load(tmp_path)
    assert "\n" not in str(caught.value)
