"""What a simulated cohort is made of, and the presets."""

from dataclasses import dataclass, replace

from brainfusion.runtime.errors import UserError


@dataclass(frozen=True, kw_only=True, slots=True)
class SimulationConfig:
    """A simulated cohort; `PRESETS` holds the named ones. Every field changes the result."""

    preset: str = "demo"
    """Name of the recipe that this config started from; kept in the cohort's truth."""
    seed: int = 0
    """The same seed gives the same bytes."""
    n_people: int = 1000
    """People, families included."""
    n_parcels: int = 100
    """Parcels, half of them (or one more) in the left hemisphere."""
    n_trs: int = 160
    """Time points of a recording."""
    tr_s: float = 2.0
    """Seconds between time points."""
    n_runs: int = 1
    """Recordings of a person; they share the person's connectivity."""
    n_sites: int = 3
    """Scanning sites, each with a gain and a pattern of its own."""

    n_genes: int = 24
    """Genes with a DNA embedding."""
    n_causal_genes: int = 4
    """Genes with two causal SNPs each."""
    n_founders: int = 8
    """Founder haplotypes of a gene; fewer make the link easier to find."""
    n_snps: int = 24
    """SNPs of a gene."""
    gene_length_bp: int = 600
    """Length of a gene's sequence; a multiple of 6, so that 6-mers are the same on both strands."""
    n_populations: int = 3
    """Ancestral populations that people come from."""
    fst: float = 0.05
    """How far the populations' haplotype frequencies differ (Balding-Nichols)."""

    sibling_share: float = 0.2
    """Share of people who have siblings in the cohort."""
    sibship_size: int = 2
    """Siblings in such a family."""

    n_traits: int = 8
    """Latent traits, independent of one another."""
    h2: float = 0.8
    """Share of each latent trait's variance that the causal SNPs explain."""
    c2: float = 0.0
    """Share that siblings have in common without genes (family environment)."""
    recruitment: float = 0.0
    """How much sites recruit by ancestry: 0 all alike, 1 each from one population."""
    environment: float = 0.0
    """Effect of a population's environment on connectivity, in units of one trait's effect."""

    step: float = 0.5
    """Effect of one standard deviation of a trait on the log covariance (Frobenius norm)."""
    idiosyncrasy: float = 1.25
    """Effect of each of 12 directions that are the person's own, in units of one trait's."""
    observation_noise: float = 0.35
    """Standard deviation of the white noise on a recording; parcels have about 1."""

    def __post_init__(self) -> None:
        _at_least(self, n_people=20, n_parcels=14, n_trs=16, n_runs=1, n_sites=1, n_genes=1)
        _at_least(self, n_causal_genes=1, n_founders=4, n_snps=4, gene_length_bp=96)
        _at_least(self, n_populations=1, sibship_size=1, n_traits=1, seed=0)
        _share(self, "sibling_share", "h2", "c2", "recruitment")
        if not 0 < self.fst < 1 or self.tr_s <= 0 or self.step < 0 or self.observation_noise < 0:
            raise UserError(
                f"fst={self.fst}, tr_s={self.tr_s}, step={self.step}, "
                f"observation_noise={self.observation_noise}: expected fst between 0 and 1, tr_s "
                "above 0 and the others not negative."
            )
        if self.h2 >= 1 or self.h2 + self.c2 > 1:
            raise UserError(
                f"h2={self.h2} and c2={self.c2} are shares of one variance: h2 must stay below 1 "
                "and their sum may not exceed 1."
            )
        if self.n_causal_genes > self.n_genes:
            raise UserError(
                f"n_causal_genes={self.n_causal_genes} of n_genes={self.n_genes}: ask for no more "
                "causal genes than genes."
            )
        if self.n_traits > 2 * self.n_causal_genes:
            raise UserError(
                f"n_traits={self.n_traits} from {2 * self.n_causal_genes} causal SNPs would not be "
                f"independent: use n_causal_genes={(self.n_traits + 1) // 2} or more."
            )
        if self.gene_length_bp % 6:
            raise UserError(
                f"gene_length_bp={self.gene_length_bp} is not a multiple of 6, the token of a "
                f"6-mer model: use {self.gene_length_bp // 6 * 6}."
            )
        if self.gene_length_bp < 4 * self.n_snps:
            raise UserError(
                f"{self.n_snps} SNPs do not fit into gene_length_bp={self.gene_length_bp}: give 4 "
                "bp or more to each."
            )
        n_directions = self.n_traits + self.n_sites + self.n_populations + 15
        if n_directions > self.n_parcels * (self.n_parcels + 1) // 2:
            raise UserError(
                f"n_parcels={self.n_parcels} leave no room for {n_directions} separate patterns of "
                "connectivity: use more parcels, or fewer sites and traits."
            )


def _at_least(config: SimulationConfig, **lowest: int) -> None:
    for name, value in lowest.items():
        if getattr(config, name) < value:
            raise UserError(f"{name}={getattr(config, name)}: expected {value} or more.")


def _share(config: SimulationConfig, *names: str) -> None:
    for name in names:
        if not 0 <= getattr(config, name) <= 1:
            raise UserError(f"{name}={getattr(config, name)}: expected a share from 0 to 1.")


_DEMO = SimulationConfig()

PRESETS: dict[str, SimulationConfig] = {
    # A strong link through four genes: found in seconds, for demonstrations and tests.
    "demo": _DEMO,
    # A polygenic link that a linear method finds with 700 training pairs, barely.
    "moderate": replace(
        _DEMO, preset="moderate", h2=0.4, n_genes=48, n_causal_genes=12, n_founders=12
    ),
    # What a gene panel may explain in real people: nothing can be learnt from 1,000 of them.
    "realistic": replace(
        _DEMO, preset="realistic", h2=0.01, n_genes=48, n_causal_genes=12, n_founders=12
    ),
    # No link at all: whatever is found is a bug.
    "null": replace(_DEMO, preset="null", h2=0.0),
    # No genetic effect, but ancestry goes with site and environment: naive analyses find a link.
    "stratification": replace(
        _DEMO, preset="stratification", h2=0.0, recruitment=0.6, environment=1.0
    ),
    # No genetic effect, but siblings share DNA and environment: a split through families leaks.
    "family": replace(_DEMO, preset="family", h2=0.0, c2=0.6, sibling_share=1.0, sibship_size=5),
}
