"""Who is in the cohort: families, ancestry, sites, genomes, latent traits and phenotypes.

Shapes: n people, g genes, k latent traits, c causal SNPs, q populations.
"""

from dataclasses import dataclass

import numpy as np
import polars as pl

from brainfusion.data.simulation import genotypes
from brainfusion.data.simulation.config import SimulationConfig

MDD_PREVALENCE = 0.15
COGNITION_TRAIT_SHARE = 0.5
"""Share of the variance of `cognition` that the latent traits explain."""
MDD_TRAIT_SHARE = 0.4
"""Share of the variance of the liability to `mdd` that they explain."""


@dataclass(frozen=True, kw_only=True, eq=False)
class People:
    """All that is drawn for a person except the recordings; every array has n rows."""

    subjects: tuple[str, ...]
    family: np.ndarray
    """int64 [n], numbered from 0."""
    population: np.ndarray
    """int64 [n]."""
    site: np.ndarray
    """int64 [n]."""
    age: np.ndarray
    """Years."""
    is_male: np.ndarray
    motion_mm: np.ndarray
    """Mean framewise displacement."""
    ancestry: np.ndarray
    """float64 [n, 4], unit variance."""
    haplotypes: np.ndarray
    """uint8 [n, 2, g]: which founder's."""
    genetic: np.ndarray
    """float64 [n, k]: the genetic scores, white and free of population means."""
    traits: np.ndarray
    """float64 [n, k]: the latent traits."""
    cognition: np.ndarray
    mdd: np.ndarray
    causal_snps: np.ndarray
    """int64 [c, 2]: gene and SNP."""
    snp_effects: np.ndarray
    """float64 [c, k]: effect of one derived allele on each genetic score."""

    def table(self) -> pl.DataFrame:
        """The rows of subjects.parquet."""
        return pl.DataFrame(
            {
                "subject": self.subjects,
                "family": [f"fam-{family + 1:06d}" for family in self.family],
                "site": [f"site-{site + 1}" for site in self.site],
                "age": self.age,
                "sex": np.where(self.is_male, "M", "F"),
                "motion": self.motion_mm,
                **{f"ancestry_{i + 1}": column for i, column in enumerate(self.ancestry.T)},
                "group": [f"population-{population + 1}" for population in self.population],
                "cognition": self.cognition,
                "mdd": self.mdd,
            }
        )


def draw_people(
    config: SimulationConfig, founders: genotypes.Founders, rngs: dict[str, np.random.Generator]
) -> People:
    """Draw everybody. `rngs` holds the streams "families", "genomes", "traits", "phenotypes"."""
    rng = rngs["families"]
    n = config.n_people
    family = genotypes.draw_families(
        rng, n, sibling_share=config.sibling_share, sibship_size=config.sibship_size
    )
    n_families = int(family.max()) + 1
    weights = 1 / np.arange(2, config.n_populations + 2)
    family_population = rng.choice(config.n_populations, n_families, p=weights / weights.sum())
    family_site = _recruit(rng, family_population, config)
    population, site = family_population[family], family_site[family]
    age = np.clip(np.round(rng.normal(42, 12, n) + 3 * (site % 3 - 1), 1), 18, 85)
    is_male = rng.random(n) < 0.47
    motion_mm = 0.13 * np.exp(0.4 * rng.standard_normal(n) + 0.1 * (age - 42) / 12)

    rng = rngs["genomes"]
    haplotypes = genotypes.transmit_haplotypes(rng, founders.frequencies, family_population, family)
    ancestry = genotypes.ancestry_components(
        rng, family_population, family, n_populations=config.n_populations, fst=config.fst
    )
    dosage = genotypes.snp_dosage(founders, haplotypes)

    rng = rngs["traits"]
    causal_snps = choose_causal_snps(rng, founders, config.n_causal_genes)
    causal_dosage = dosage[:, causal_snps[:, 0], causal_snps[:, 1]].astype(np.float64)
    genetic, snp_effects = genetic_scores(rng, causal_dosage, population, n_traits=config.n_traits)
    traits = (
        np.sqrt(config.h2) * genetic
        + np.sqrt(config.c2) * rng.standard_normal((n_families, config.n_traits))[family]
        + np.sqrt(max(0.0, 1 - config.h2 - config.c2)) * rng.standard_normal((n, config.n_traits))
    )
    cognition, mdd = _phenotypes(rngs["phenotypes"], traits, age, is_male)
    return People(
        subjects=tuple(f"sim-{i + 1:06d}" for i in range(n)),
        family=family,
        population=population,
        site=site,
        age=age,
        is_male=is_male,
        motion_mm=motion_mm,
        ancestry=ancestry,
        haplotypes=haplotypes,
        genetic=genetic,
        traits=traits,
        cognition=cognition,
        mdd=mdd,
        causal_snps=causal_snps,
        snp_effects=snp_effects,
    )


def _recruit(
    rng: np.random.Generator, population: np.ndarray, config: SimulationConfig
) -> np.ndarray:
    """Site of each family: at random, or with probability `recruitment` that of its population."""
    own = population % config.n_sites
    anywhere = rng.integers(0, config.n_sites, len(population))
    return np.where(rng.random(len(population)) < config.recruitment, own, anywhere)


def choose_causal_snps(
    rng: np.random.Generator, founders: genotypes.Founders, n_causal_genes: int
) -> np.ndarray:
    """Two SNPs in each of some genes, int64 [c, 2]: gene and SNP.

    In each gene it is the pair of the largest generalised variance, common and not in LD, so that
    the genetic scores have full rank.
    """
    n_genes = founders.alleles.shape[0]
    genes = np.sort(rng.choice(n_genes, n_causal_genes, replace=False))
    chosen = []
    for gene in genes:
        alleles = founders.alleles[gene].astype(np.float64)  # (f, s)
        p = founders.frequencies[:, gene].mean(axis=0)
        centred = alleles - p @ alleles
        covariance = centred.T @ (centred * p[:, None])
        variance = np.diag(covariance)
        determinant = np.outer(variance, variance) - covariance**2
        first, second = np.unravel_index(determinant.argmax(), determinant.shape)
        chosen += [(gene, first), (gene, second)]
    return np.asarray(chosen, dtype=np.int64)


def genetic_scores(
    rng: np.random.Generator, dosage: np.ndarray, population: np.ndarray, *, n_traits: int
) -> tuple[np.ndarray, np.ndarray]:
    """Additive scores of the causal SNPs: free of population means, white over the cohort.

    White, because then all canonical correlations of scores and traits are known: sqrt(h2).

    Args:
        rng: Random stream.
        dosage: Of the causal SNPs [n, c].
        population: Of each person [n]; the scores have mean zero in every population, so ancestry
            enters the recordings through recruitment and environment alone.
        n_traits: Scores to make, c at most.

    Returns:
        The scores [n, k] and the effect of one allele on each [c, k].
    """
    members = np.eye(int(population.max()) + 1)[population]
    means = members.T @ dosage / np.maximum(members.sum(axis=0), 1)[:, None]
    residual = dosage - means[population]
    residual_scale = residual.std(axis=0)
    effects = rng.standard_normal((dosage.shape[1], n_traits)) / residual_scale[:, None]
    if dosage.shape[1] == n_traits:
        # As many traits as SNPs: an orthogonal mix of the white SNPs, none better seen than others.
        effects = np.linalg.qr(effects * residual_scale[:, None])[0] / residual_scale[:, None]
    values, vectors = np.linalg.eigh(effects.T @ (residual.T @ residual) @ effects / len(dosage))
    effects = effects @ (vectors / np.sqrt(values)) @ vectors.T
    return residual @ effects, effects


def _phenotypes(
    rng: np.random.Generator, traits: np.ndarray, age: np.ndarray, is_male: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """`cognition` (mean 100, SD about 15) and `mdd` (0 or 1, prevalence 0.15)."""
    n, n_traits = traits.shape
    years = (age - age.mean()) / max(float(age.std()), 1e-9)
    directions = np.linalg.qr(rng.standard_normal((n_traits, min(2, n_traits))))[0]
    wanted, liable = traits @ directions[:, 0], traits @ directions[:, -1]
    cognition = (
        np.sqrt(COGNITION_TRAIT_SHARE) * wanted
        - np.sqrt(0.05) * years
        + np.sqrt(0.95 - COGNITION_TRAIT_SHARE) * rng.standard_normal(n)
    )
    liability = (
        np.sqrt(MDD_TRAIT_SHARE) * liable
        + np.sqrt(0.03) * np.where(is_male, -1.0, 1.0)
        + np.sqrt(0.97 - MDD_TRAIT_SHARE) * rng.standard_normal(n)
    )
    mdd = (liability > np.quantile(liability, 1 - MDD_PREVALENCE)).astype(np.int8)
    return np.round(100 + 15 * cognition, 2), mdd
