"""Which genes attention looks at on the demo's cohorts, where the causal ones are known."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from brainfusion.alignment import AlignConfig, GeneVectors, train
from brainfusion.data.cohort import Cohort
from brainfusion.data.simulate import PRESETS, simulate
from brainfusion.eval.baselines import connectome
from brainfusion.genetics import read
from tests.alignment.genes.gene_cohort import GeneCohort, roc_area

pytestmark = pytest.mark.slow


def demo_cohort(seed: int, folder: Path) -> GeneCohort:
    """The demo's people, with the connectome in place of an encoder's features."""
    simulate(folder, replace(PRESETS["demo"], seed=seed))
    cohort, genetics = Cohort.open(folder), read("evo2", folder / "sources" / "evo2")
    subjects = cohort.recordings.index["subject"].to_list()
    truth = cohort.truth()
    assert truth is not None
    return GeneCohort(
        brain=connectome(cohort.recordings, range(len(subjects))),
        genes=GeneVectors.of({"evo2": genetics.select(subjects)}),
        labels=cohort.splits().label(subjects),
        causal=np.isin(genetics.genes, truth["causal_genes"]),
    )


def areas(cohort: GeneCohort, run_dir: Path) -> tuple[float, float]:
    """ROC area of the causal genes, by weight and by attention alone, in the test people."""
    config = AlignConfig(dna_pool="attention")
    alignment = train(cohort.features, cohort.labels, config=config, run_dir=run_dir).alignment
    found = alignment.gene_weights(cohort.genes.take(cohort.test))
    return roc_area(found.share, cohort.causal), roc_area(found.attention.mean(0), cohort.causal)


def test_attention_on_the_demo_puts_the_causal_genes_first_and_not_on_permuted_pairs(tmp_path):
    null = []
    for seed in range(3):
        cohort = demo_cohort(seed, tmp_path / str(seed))
        assert min(areas(cohort, tmp_path / "run")) > 0.8
        null += [areas(cohort.with_pairs_shuffled(i), tmp_path / "null") for i in range(4)]
    # Areas of 4 genes against 20 have variance 25 / (12 * 80) under chance.
    error = np.sqrt(25 / (12 * 80) / len(null))
    np.testing.assert_allclose(np.mean(null, axis=0), 0.5, atol=3 * error)
