from dataclasses import replace

import numpy as np
import pytest

from brainfusion.alignment import AlignConfig, GeneVectors, train
from brainfusion.alignment.folder import model_hash
from brainfusion.alignment.genes.alone import each_gene_alone, known_genes, nothing_shown
from brainfusion.alignment.genes.vectors import Gene
from brainfusion.runtime.errors import UserError
from tests.alignment.genes.gene_cohort import GeneCohort, gene_cohort

TINY = AlignConfig(
    dim_hidden=32, dim_out=16, gene_width=16, gene_components=5, n_components=16, max_steps=6,
    eval_every=3, warmup_steps=2,
)  # fmt: skip
FINDS = replace(TINY, dim_hidden=128, dim_out=64, n_components=64, max_steps=20, eval_every=5)


def trained(cohort: GeneCohort, path, config=TINY, **how):
    return train(cohort.features, cohort.labels, config=config, run_dir=path, **how).alignment


@pytest.mark.parametrize(
    ("pool", "n_components"), [("concat", 16), ("concat", 0), ("max", 16), ("attention", 0)]
)
def test_a_gene_alone_equals_masking_all_others(tmp_path, pool, n_components):
    cohort = gene_cohort(0, n=120, n_genes=5, models=("evo2", "caduceus"), missing=0.1)
    config = replace(TINY, dna_pool=pool, n_components=n_components)
    alignment = trained(cohort, tmp_path, config)
    people = cohort.genes.take(cohort.test)
    genes = alignment.conditioners["dna"].genes
    seen = []
    for gene, rows, shown in each_gene_alone(alignment, people):
        column = people.genes.index(gene)
        assert rows.tolist() == np.flatnonzero(people.mask[:, column]).tolist()
        mask = np.array([other == gene for other in genes])
        masked = alignment.embed_dna(people.take(rows), mask=mask)
        np.testing.assert_allclose(shown, masked, atol=2e-5)
        seen.append(gene)
    assert tuple(seen) == alignment.conditioners["dna"].used == known_genes(alignment)


def test_covariates_are_taken_out_of_a_gene_alone_too(tmp_path):
    cohort = gene_cohort(1, n=120, n_genes=4)
    age = np.random.default_rng(0).normal(size=(len(cohort.labels), 1))
    alignment = trained(
        cohort, tmp_path, replace(TINY, residualise=("age",)), covariates=age,
        covariate_names=("age",),
    )  # fmt: skip
    people, own = cohort.genes.take(cohort.test), age[cohort.test]
    only = known_genes(alignment)[1:2]
    [(gene, rows, shown)] = each_gene_alone(alignment, people, own, only=only)
    mask = np.array([other == gene for other in alignment.conditioners["dna"].genes])
    masked = alignment.embed_dna(people.take(rows), own[rows], mask=mask)
    np.testing.assert_allclose(shown, masked, atol=2e-5)
    with pytest.raises(UserError, match="covariates"):
        next(each_gene_alone(alignment, people))


@pytest.mark.parametrize("pool", ["concat", "attention"])
def test_nothing_shown_is_one_point_and_a_gene_at_its_mean_is_near_it(tmp_path, pool):
    cohort = gene_cohort(2, n=160, n_genes=4)
    alignment = trained(cohort, tmp_path, replace(TINY, dna_pool=pool))
    nothing = nothing_shown(alignment)
    assert nothing.shape == (1, 16)
    np.testing.assert_allclose(np.linalg.norm(nothing), 1.0, atol=1e-5)
    # A person whose vector of a gene is the training people's mean tells as much as nobody.
    training = np.flatnonzero(np.asarray(cohort.labels) == "train")
    source = cohort.genes.sources["evo2"]
    mean = source.vectors[training].mean(axis=0, dtype=np.float64).astype(np.float32)
    average = GeneVectors.of({"evo2": replace(source, vectors=mean[None], mask=source.mask[:1])})
    for _, _, shown in each_gene_alone(alignment, average):
        assert np.abs(shown - nothing).max() < 0.02
    real = next(each_gene_alone(alignment, cohort.genes.take(cohort.test)))[2]
    assert np.abs(real - nothing).max() > 0.1


def first_genes(cohort: GeneCohort, alignment, *, of_everybody: bool = False) -> np.ndarray:
    """Of each test person, the number of the gene that is nearest to their brain.

    Of their own genes, or of every gene of every test person.
    """
    brain = alignment.search_vectors("brain", cohort.brain[cohort.test])
    people = cohort.genes.take(cohort.test)
    best = np.full((len(brain), len(people.genes)), -np.inf)
    for gene, rows, shown in each_gene_alone(alignment, people):
        scores = brain @ alignment.scored("dna", shown).T
        column = people.genes.index(gene)
        best[:, column] = scores.max(axis=1) if of_everybody else scores[rows, np.arange(len(rows))]
    return best.argmax(axis=1)


def test_the_planted_gene_comes_first_and_on_shuffled_pairs_it_does_not(tmp_path):
    cohort = gene_cohort(0, n=500, n_genes=10, n_causal=1)
    planted = int(np.flatnonzero(cohort.causal)[0])
    alignment = trained(cohort, tmp_path / "planted", FINDS)
    # A person near the average carries a planted gene that tells little: not everyone's is first.
    assert (first_genes(cohort, alignment) == planted).mean() > 0.7
    # Among all people's there is one that fits most brains, and better than noise does.
    assert (first_genes(cohort, alignment, of_everybody=True) == planted).mean() > 0.8
    null = cohort.with_pairs_shuffled(0)
    alignment = trained(null, tmp_path / "null", FINDS)
    # A gene that chance favours comes first for more than a tenth, never for most.
    for of_everybody in (False, True):
        found = first_genes(null, alignment, of_everybody=of_everybody) == planted
        assert found.mean() < 0.4


def test_unknown_genes_and_modalities_are_named(tmp_path):
    cohort = gene_cohort(0, n=80, n_genes=3)
    alignment = trained(cohort, tmp_path)
    with pytest.raises(UserError, match=r"evo2 has no gene 'G0' that varies.*Did you mean 'G0"):
        next(each_gene_alone(alignment, cohort.genes, only=[Gene("evo2", "G0")]))
    with pytest.raises(UserError, match="'brain' does not come as genes"):
        nothing_shown(alignment, name="brain")


def test_a_hash_of_a_model_is_of_its_arrays(tmp_path):
    cohort = gene_cohort(0, n=80, n_genes=3)
    first = trained(cohort, tmp_path / "a")
    trained(cohort, tmp_path / "b", replace(TINY, seed=1))
    first.save(tmp_path / "moved")
    hashes = [model_hash(tmp_path / name) for name in ("a", "moved", "b")]
    assert hashes[0] == hashes[1] != hashes[2]
    assert first.score_name == "density ratio, nats"
    with pytest.raises(UserError, match="no trained alignment in"):
        model_hash(tmp_path / "nothing")
