"""A cohort in which some genes are linked to the brain, small enough to train on in a second."""

from dataclasses import dataclass

import numpy as np

from brainfusion.alignment import GeneArray, GeneVectors


@dataclass(frozen=True, kw_only=True, eq=False)
class GeneCohort:
    """Everything that `train` takes, and which genes are linked."""

    brain: np.ndarray
    genes: GeneVectors
    labels: list[str]
    causal: np.ndarray

    @property
    def features(self) -> dict:
        return {"brain": self.brain, "dna": self.genes}

    @property
    def test(self) -> np.ndarray:
        """Rows of the test people."""
        return np.flatnonzero(np.asarray(self.labels) == "test")

    def with_pairs_shuffled(self, seed: int) -> "GeneCohort":
        """The same people with one another's genes, within each split."""
        random, order = np.random.default_rng(seed), np.arange(len(self.labels))
        for split in ("train", "validation", "test"):
            rows = np.flatnonzero(np.asarray(self.labels) == split)
            order[rows] = random.permutation(rows)
        return GeneCohort(
            brain=self.brain, genes=self.genes.take(order), labels=self.labels, causal=self.causal
        )


def gene_cohort(
    seed: int = 0,
    *,
    n: int = 500,
    n_genes: int = 12,
    n_causal: int = 3,
    width: int = 16,
    models: tuple[str, ...] = ("evo2",),
    missing: float = 0.0,
) -> GeneCohort:
    """People carry two of six haplotypes of each gene; those of some genes move the brain.

    Vectors are like a language model's: a large mean a gene, and differences a thousandth of it.
    Every model sees the same haplotypes, in an embedding of its own, the second half as wide.
    """
    random = np.random.default_rng(seed)
    carried = random.integers(0, 6, (n, 2, n_genes))
    causal = np.zeros(n_genes, dtype=bool)
    causal[random.choice(n_genes, n_causal, replace=False)] = True
    effects = random.normal(size=(n_genes, 6, 2)) * causal[:, None, None]
    columns = np.arange(n_genes)
    latents = effects[columns, carried].sum(axis=1)[:, causal].reshape(n, -1)  # (n, 2 causal)
    latents = (latents - latents.mean(0)) / latents.std(0)
    brain = np.column_stack([latents, random.normal(size=(n, 8))])
    brain = brain @ np.linalg.qr(random.normal(size=(brain.shape[1],) * 2))[0]
    sources = {}
    for place, model in enumerate(models):
        own = width // (place + 1)
        centre = 5.0 * random.normal(size=(n_genes, 1, own))
        haplotypes = centre + 5e-3 * random.normal(size=(n_genes, 6, own))
        vectors = haplotypes[columns, carried].mean(axis=1).astype(np.float32)
        mask = random.random((n, n_genes)) >= missing
        names = tuple(f"G{i:02d}" for i in range(n_genes))
        sources[model] = GeneArray(genes=names, vectors=vectors, mask=mask)
    n_train, n_validation = 3 * n // 5, n // 10
    return GeneCohort(
        brain=brain + 0.5 * random.normal(size=brain.shape),
        genes=GeneVectors.of(sources),
        labels=["train"] * n_train
        + ["validation"] * n_validation
        + ["test"] * (n - n_train - n_validation),
        causal=causal,
    )


def roc_area(scores: np.ndarray, truth: np.ndarray) -> float:
    """The chance that a true one scores above a false one; ties are half."""
    above = scores[truth][:, None] > scores[~truth]
    tied = scores[truth][:, None] == scores[~truth]
    return float((above + 0.5 * tied).mean())
