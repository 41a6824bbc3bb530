"""The reference sequence of each gene's region, from a FASTA file of chromosomes.

The file is read once and only the regions are kept: a compressed human genome takes about a minute,
and no index has to be written beside it.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from brainfusion.genetics.extraction.fasta import (
    count_odd,
    match_chromosomes,
    normalised,
    records,
    unknown_share,
)
from brainfusion.genetics.extraction.regions import Region
from brainfusion.runtime.errors import UserError
from brainfusion.runtime.logs import say

MAX_UNKNOWN = 0.1
"""Share of N above which a gene's sequence is refused."""


def read_reference(
    path: Path, regions: Sequence[Region], *, flank_bp: int = 0
) -> tuple[list[Region], dict[str, str]]:
    """The reference sequence of each region.

    Args:
        path: FASTA whose records are chromosomes.
        regions: What is wanted.
        flank_bp: Bases to add on both sides, as far as the chromosome reaches.

    Returns:
        The regions with their flanks, and gene -> upper-case sequence of the forward strand.

    Raises:
        UserError: A chromosome that is absent, a gene outside of it, or mostly unknown bases.
    """
    wanted: dict[str, list[Region]] = {}
    for region in regions:
        wanted.setdefault(region.chromosome.removeprefix("chr"), []).append(region)
    known: list[str] = []
    wide: dict[str, Region] = {}
    cut: dict[str, str] = {}
    for name, sequence in records(path):
        known.append(name)
        for region in wanted.get(name.removeprefix("chr"), []):
            found = _widened(region, flank_bp, len(sequence), path)
            wide[region.gene] = found
            cut[region.gene] = sequence[found.start : found.end]
    match_chromosomes([region.chromosome for region in regions], known, where=str(path))
    n_cut = sum(found.length_bp for found in wide.values())
    n_cut = sum(r.length_bp + 2 * flank_bp for r in regions) - n_cut
    if n_cut:
        say(f"{path}: {n_cut} bases of flanks lie beyond the chromosomes' ends and are left out")
    if n_lower := sum(sequence != sequence.upper() for sequence in cut.values()):
        say(f"{path}: {n_lower} of {len(cut)} regions have lower-case bases; all are made upper")
    if n_odd := sum(count_odd(sequence) for sequence in cut.values()):
        say(f"{path}: {n_odd} letters that are none of ACGTN become N")
    sequences = {gene: normalised(sequence) for gene, sequence in cut.items()}
    for gene, sequence in sequences.items():
        if (share := unknown_share([sequence])) > MAX_UNKNOWN:
            raise UserError(
                f"gene {gene}: {share:.0%} of its bases are unknown (N) in {path}, at most "
                f"{MAX_UNKNOWN:.0%} may be: correct its coordinates or leave it out."
            )
    return [wide[region.gene] for region in regions], sequences


def _widened(region: Region, flank_bp: int, length_bp: int, path: Path) -> Region:
    if region.end > length_bp:
        raise UserError(
            f"gene {region.gene} ({region.chromosome}:{region.start + 1}-{region.end}) is outside "
            f"the chromosome, which has {length_bp} bases in {path}: regions and reference are of "
            "different genome builds, or the coordinates are wrong."
        )
    start, end = max(0, region.start - flank_bp), min(region.end + flank_bp, length_bp)
    return replace(region, start=start, end=end)
