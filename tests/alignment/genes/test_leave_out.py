from dataclasses import replace

import numpy as np
import pytest

from brainfusion.alignment import AlignConfig, train
from brainfusion.alignment.genes.leave_out import without_each_gene
from brainfusion.eval.attribution import contributions, found
from brainfusion.runtime.errors import UserError
from tests.alignment.genes.gene_cohort import GeneCohort, gene_cohort, roc_area

TINY = AlignConfig(
    dim_hidden=32, dim_out=16, gene_width=16, gene_components=5, n_components=16, max_steps=6,
    eval_every=3, warmup_steps=2,
)  # fmt: skip
FINDS = replace(TINY, dim_hidden=128, dim_out=64, n_components=64, max_steps=40, eval_every=5)


@pytest.mark.parametrize("pool", ["concat", "mean", "attention"])
@pytest.mark.parametrize("models", [("evo2",), ("evo2", "caduceus")])
@pytest.mark.parametrize("n_components", [16, 0])
def test_hiding_in_closed_form_equals_masking_the_gene(tmp_path, pool, models, n_components):
    cohort = gene_cohort(0, n=120, n_genes=5, models=models, missing=0.1)
    config = replace(TINY, dna_pool=pool, n_components=n_components)
    alignment = train(cohort.features, cohort.labels, config=config, run_dir=tmp_path).alignment
    people = cohort.genes.take(cohort.test)
    genes = alignment.conditioners["dna"].genes
    seen = []
    for gene, vectors in without_each_gene(alignment, people):
        mask = np.array([other != gene for other in genes])
        np.testing.assert_allclose(vectors, alignment.embed_dna(people, mask=mask), atol=2e-5)
        assert np.abs(vectors - alignment.embed_dna(people)).max() > 1e-4
        seen.append(gene)
    assert tuple(seen) == alignment.conditioners["dna"].used


def attribution(cohort: GeneCohort, tmp_path):
    alignment = train(cohort.features, cohort.labels, config=FINDS, run_dir=tmp_path).alignment
    rows = cohort.test
    people = cohort.genes.take(rows)
    brain = alignment.embed_brain(cohort.brain[rows])
    table = contributions(
        (brain, alignment.embed_dna(people)),
        ((gene.name, brain, dna) for gene, dna in without_each_gene(alignment, people)),
        n_bootstrap=100,
    )
    return table, cohort.causal[[int(name[1:]) for name in table["unit"]]]


@pytest.mark.slow
def test_planted_genes_come_first_and_none_is_found_on_shuffled_pairs(tmp_path):
    n_null = 0
    for seed in range(3):
        cohort = gene_cohort(seed, n=700)
        table, causal = attribution(cohort, tmp_path / "planted")
        assert roc_area(table["drop"].to_numpy(), causal) > 0.8
        assert len(found(table)) >= 1
        null, _ = attribution(cohort.with_pairs_shuffled(seed), tmp_path / "null")
        n_null += len(found(null)) > 0
    assert n_null <= 1  # of one null cohort in twenty something is found, by the FDR of 5%


def test_a_modality_without_genes_and_a_person_with_one_gene_are_refused(tmp_path):
    cohort = gene_cohort(0, n=120, n_genes=5)
    alignment = train(cohort.features, cohort.labels, config=TINY, run_dir=tmp_path).alignment
    with pytest.raises(UserError, match="does not come as genes"):
        next(without_each_gene(alignment, cohort.brain, name="brain"))
    source = cohort.genes.sources["evo2"]
    mask = source.mask.copy()
    mask[3, 1:] = False
    bare = type(source)(genes=source.genes, vectors=source.vectors, mask=mask)
    with pytest.raises(UserError, match="1 of 120 people have only one of the genes"):
        next(without_each_gene(alignment, {"evo2": bare}))
