"""Founder haplotypes with block LD, populations that differ, and Mendelian transmission.

Within a gene there is no recombination: people carry whole founder haplotypes, so its SNPs are in
LD. Genes are unlinked. Haplotype frequencies of the populations follow the multi-allelic form of
Balding and Nichols (1995): Dirichlet with mean p and concentration (1 - Fst) / Fst.

Shapes: n people, f founders, g genes, s SNPs of a gene, l base pairs, q populations.
"""

from dataclasses import dataclass

import numpy as np

N_ANCESTRY_SNPS = 400
"""Neutral SNPs all over the genome; the ancestry components are computed from them."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Founders:
    """The haplotypes that all people of the cohort carry."""

    alleles: np.ndarray
    """uint8 [g, f, s]: 1 for the derived allele."""
    positions_bp: np.ndarray
    """int64 [g, s]: where the SNPs lie in their gene, ascending."""
    sequences: np.ndarray
    """uint8 [g, f, l]: bases as 0 to 3 (A, C, G, T), so that 3 - base is the complement."""
    frequencies: np.ndarray
    """float64 [q, g, f]: of the haplotypes in each population."""


def draw_founders(
    rng: np.random.Generator,
    *,
    n_genes: int,
    n_founders: int,
    n_snps: int,
    length_bp: int,
    n_populations: int,
    fst: float,
) -> Founders:
    """Draw the haplotypes of every gene and their frequencies in every population."""
    alleles = np.stack([_mutations(rng, n_founders, n_snps) for _ in range(n_genes)])
    positions = np.stack(
        [np.sort(rng.choice(length_bp, n_snps, replace=False)) for _ in range(n_genes)]
    )
    reference = rng.integers(0, 4, (n_genes, length_bp), dtype=np.uint8)
    rows = np.arange(n_genes)[:, None]
    ancestral = reference[rows, positions]
    derived = (ancestral + rng.integers(1, 4, ancestral.shape, dtype=np.uint8)) % 4
    sequences = np.repeat(reference[:, None], n_founders, axis=1)
    for gene in range(n_genes):
        sequences[gene][:, positions[gene]] = np.where(
            alleles[gene] == 1, derived[gene], ancestral[gene]
        )
    # Concentration 4 a founder: common haplotypes, as in a gene panel, none of them dominant.
    base = rng.dirichlet(np.full(n_founders, 4.0), n_genes)
    spread = (1 - fst) / fst
    frequencies = np.stack(
        [np.stack([rng.dirichlet(p * spread) for p in base]) for _ in range(n_populations)]
    )
    return Founders(
        alleles=alleles, positions_bp=positions, sequences=sequences, frequencies=frequencies
    )


def _mutations(rng: np.random.Generator, n_founders: int, n_snps: int) -> np.ndarray:
    """SNPs [f, s] as mutations on the branches of a random genealogy (Kingman's coalescent).

    A mutation is carried by the whole clade under its branch, which is what LD in a block is.
    """
    lineages = [np.eye(n_founders, dtype=bool)[i] for i in range(n_founders)]
    born = [0.0] * n_founders
    clades, lengths, now = [], [], 0.0
    while len(lineages) > 1:
        now += rng.exponential(2 / (len(lineages) * (len(lineages) - 1)))
        pair = sorted(rng.choice(len(lineages), 2, replace=False), reverse=True)
        merged = np.zeros(n_founders, dtype=bool)
        for index in pair:
            clades.append(lineages[index])
            lengths.append(now - born[index])
            merged |= lineages.pop(index)
            born.pop(index)
        lineages.append(merged)
        born.append(now)
    weights = np.asarray(lengths) / np.sum(lengths)
    while True:
        branches = rng.choice(len(clades), n_snps, p=weights)
        alleles = np.stack([clades[branch] for branch in branches], axis=1).astype(np.uint8)
        # Two independent SNPs at least: all of them on one long branch would be a single one.
        if np.linalg.matrix_rank(alleles - alleles.mean(axis=0)) >= 2:
            return alleles


def draw_families(
    rng: np.random.Generator, n_people: int, *, sibling_share: float, sibship_size: int
) -> np.ndarray:
    """Family of each person [n], numbered from 0 in order of first appearance.

    Siblings are scattered over the cohort, so the row order says nothing about kinship.
    """
    n_sibships = round(n_people * sibling_share / sibship_size) if sibship_size > 1 else 0
    sizes = np.full(n_sibships, sibship_size)
    n_rest = n_people - int(sizes.sum())
    labels = np.concatenate(
        [np.repeat(np.arange(n_sibships), sizes), n_sibships + np.arange(max(n_rest, 0))]
    )[:n_people]
    labels = labels[rng.permutation(n_people)]
    _, first, inverse = np.unique(labels, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[inverse]


def transmit_haplotypes(
    rng: np.random.Generator,
    frequencies: np.ndarray,
    population: np.ndarray,
    family: np.ndarray,
) -> np.ndarray:
    """Give each person one haplotype of either parent, gene by gene.

    Args:
        rng: Random stream.
        frequencies: Of the founder haplotypes [q, g, f].
        population: Of each family [families].
        family: Of each person [n].

    Returns:
        Founder indices, uint8 [n, 2, g]; the first of the two comes from the first parent.
    """
    n_genes = frequencies.shape[1]
    cumulative = frequencies.cumsum(axis=2)[:, :, :-1]
    parents = np.zeros((len(population), 2, 2, n_genes), dtype=np.uint8)
    for gene in range(n_genes):
        draws = rng.random((len(population), 2, 2))
        edges = cumulative[population, gene]  # (families, f - 1)
        parents[..., gene] = (draws[..., None] > edges[:, None, None]).sum(axis=-1)
    which = rng.integers(0, 2, (len(family), 2, n_genes))
    return np.take_along_axis(parents[family], which[:, :, None], axis=2)[:, :, 0]


def snp_dosage(founders: Founders, haplotypes: np.ndarray) -> np.ndarray:
    """Copies of the derived allele at every SNP, uint8 [n, g, s]."""
    genes = np.arange(founders.alleles.shape[0])
    carried = founders.alleles[genes, haplotypes]  # (n, 2, g, s)
    return carried.sum(axis=1, dtype=np.uint8)


def ancestry_components(
    rng: np.random.Generator,
    population: np.ndarray,
    family: np.ndarray,
    *,
    n_populations: int,
    fst: float,
    n_components: int = 4,
) -> np.ndarray:
    """Principal components of neutral genome-wide SNPs, unit variance [n, n_components].

    Their signs are fixed by making the largest loading positive.
    """
    base = rng.uniform(0.1, 0.9, N_ANCESTRY_SNPS)
    spread = (1 - fst) / fst
    allele = rng.beta(base * spread, (1 - base) * spread, (n_populations, N_ANCESTRY_SNPS))
    dosage = np.zeros((len(family), N_ANCESTRY_SNPS), dtype=np.float32)
    for start in range(0, N_ANCESTRY_SNPS, 50):
        snps = slice(start, start + 50)
        frequency = allele[population, snps]
        shape = (*frequency.shape, 2, 2)
        parents = rng.random(shape, dtype=np.float32) < frequency[:, :, None, None]
        which = rng.integers(0, 2, (len(family), frequency.shape[1], 2))
        passed = np.take_along_axis(parents[family], which[..., None], axis=3)
        dosage[:, snps] = passed[..., 0].sum(axis=2)
    centred = (dosage - dosage.mean(axis=0)).astype(np.float64)
    _, vectors = np.linalg.eigh(centred.T @ centred)
    vectors = vectors[:, ::-1][:, :n_components]
    largest = np.abs(vectors).argmax(axis=0)
    vectors = vectors * np.sign(vectors[largest, np.arange(n_components)])
    scores = centred @ vectors
    return scores / scores.std(axis=0)
