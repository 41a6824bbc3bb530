"""Personal haplotypes from a reference and a phased VCF or BCF, read with pysam.

One rule for each thing that may be in such a file; what a rule does is counted and said:

- REF that is not the reference's: an error; the file is of another build or another FASTA
- a filter that is not PASS or ".": the record is left out
- several alternative alleles: each haplotype takes its own
- insertions and deletions: left out, or applied with a flag on whoever carries one; substitutions
  of equal length are always applied
- symbolic alleles (<DEL>, *, breakends): left out, that haplotype keeps the reference
- two changes of one haplotype on the same bases: the first wins (`sequences.patch`)
- a change that reaches beyond the region: left out
- a missing allele: the reference; a person of whom more than a tenth of a gene's genotypes are
  missing has no vector of that gene
- a heterozygous genotype without phase: the reference on both haplotypes if they are rare, an error
  above 1 % of the gene's heterozygous genotypes; homozygous ones need no phase
- one allele only (a man's X): it stands for both haplotypes
- phase sets (PS): said, because phase then holds within a block only

Shape legend: n people, v variants.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from brainfusion.genetics.extraction.fasta import match_chromosomes
from brainfusion.genetics.extraction.packages import require
from brainfusion.genetics.extraction.regions import Region
from brainfusion.genetics.extraction.sequences import (
    Change,
    GeneHaplotypes,
    build_haplotypes,
    change_of,
)
from brainfusion.genetics.ids import text_ids
from brainfusion.runtime.errors import UserError

MAX_UNPHASED = 0.01
"""Share of a gene's heterozygous genotypes that may be without phase."""
MAX_MISSING = 0.1
"""Share of a gene's genotypes that may be missing in a person."""
WORDS = {
    "filtered": "records that failed a filter, left out",
    "multi-allelic": "records with several alternative alleles, each haplotype given its own",
    "indels left out": "insertions and deletions, left out (--indels apply applies them)",
    "indels applied": "insertions and deletions, applied and flagged",
    "symbolic": "symbolic alleles, left out",
    "beyond the region": "changes that reach beyond their region, left out",
    "overlapping": "changes (times haplotypes) on bases that another has changed, left out",
    "missing": "missing alleles, taken as the reference",
    "unphased": "heterozygous genotypes without phase, taken as the reference",
    "haploid": "genotypes of one allele, taken for both haplotypes",
    "phase sets": "records with phase sets (PS): phase holds within a block only",
    "masked": "people times genes with more than a tenth of their genotypes missing, masked",
}
"""What is counted, in words."""

_MISSING, _UNPHASED, _HAPLOID, _HETEROZYGOUS = 1, 2, 4, 8


@dataclass(slots=True)
class _Sites:
    """What was read of a region."""

    changes: list[list[Change | None]] = field(default_factory=list)
    alleles: list[np.ndarray] = field(default_factory=list)
    """uint8 [n, 2] a variant."""
    n_records: int = 0
    n_other_ref: int = 0
    n_missing: Any = 0
    """int [n], genotypes with a missing allele."""
    n_heterozygous: int = 0
    counts: Counter[str] = field(default_factory=Counter)


class PhasedVariants:
    """A VCF or BCF with an index, or one a chromosome; to be closed.

    Args:
        path: The file; "{chromosome}" in its name stands for each chromosome's.
        regions: Of each gene, flanks included.
        references: gene -> the region's bases, upper case, forward strand.
        subjects: Whom to read, in this order; everybody if omitted.
        apply_indels: Whether insertions and deletions are applied.

    Raises:
        UserError: pysam or a file is missing, there is no index, samples that are not in it.
    """

    n_haplotypes = 2

    def __init__(
        self,
        path: str,
        *,
        regions: Sequence[Region],
        references: Mapping[str, str],
        subjects: Sequence[str] | None = None,
        apply_indels: bool = False,
    ) -> None:
        self._pysam = require("pysam", purpose="reading VCF and BCF files")
        self._apply_indels, self._parsed = apply_indels, _Parsed()
        self._regions, self._references = tuple(regions), references
        self.genes = tuple(region.gene for region in regions)
        chromosomes = list(dict.fromkeys(region.chromosome for region in regions))
        names = {name: path.replace("{chromosome}", name) for name in chromosomes}
        self._files = {name: Path(file) for name, file in names.items()}
        self._opened: tuple[Path, Any] | None = None
        self._contigs: dict[str, str] = {}
        self._columns: dict[Path, np.ndarray] = {}
        self.subjects: tuple[str, ...] = ()
        for file in dict.fromkeys(self._files.values()):
            opened = self._open(file)
            mine = [name for name in chromosomes if self._files[name] == file]
            self._contigs |= match_chromosomes(mine, _contigs(opened), where=str(file))
            samples = tuple(opened.header.samples)
            if not samples:
                raise UserError(f"{file} has no samples: give a file with genotypes.")
            ids = text_ids(samples, what="subject", where=str(file))
            self.subjects = self.subjects or _chosen(ids, subjects, file)
            self._columns[file] = _columns(self.subjects, ids, file)

    def gene(self, number: int) -> GeneHaplotypes:
        """Everyone's haplotypes of a gene, on the forward strand.

        Raises:
            UserError: REF alleles that are not the reference's, or genotypes without phase.
        """
        region = self._regions[number]
        reference = self._references[region.gene]
        file = self._files[region.chromosome]
        sites = _Sites(n_missing=np.zeros(len(self.subjects), dtype=np.int64))
        for line in self._lines(region, file):
            self._read(line, region, reference, self._columns[file], sites)
        where = f"{file}, gene {region.gene}"
        _refuse_other_reference(sites, where)
        _refuse_unphased(sites, where)
        n, v = len(self.subjects), len(sites.alleles)
        alleles = np.stack(sites.alleles, axis=2) if v else np.zeros((n, 2, 0), dtype=np.uint8)
        sequences, index, indels, n_skipped = build_haplotypes(reference, alleles, sites.changes)
        mask = sites.n_missing <= MAX_MISSING * max(1, sites.n_records)
        sites.counts["overlapping"] += n_skipped
        sites.counts["masked"] += int((~mask).sum())
        return GeneHaplotypes(
            gene=region.gene,
            strand=region.strand,
            sequences=sequences,
            index=index,
            mask=mask,
            indels=indels,
            n_variants=int(alleles.any(axis=(0, 1)).sum()),
            counts=+sites.counts,
        )

    def close(self) -> None:
        """Close the file that is open."""
        if self._opened is not None:
            self._opened[1].close()
            self._opened = None

    def _read(
        self, line: str, region: Region, reference: str, columns: np.ndarray, sites: _Sites
    ) -> None:
        """Take in one record, as VCF text."""
        fields = line.rstrip("\n").split("\t")
        if fields[6] not in (".", "PASS", ""):
            sites.counts["filtered"] += 1
            return
        start, ref, alts = int(fields[1]) - 1, fields[3].upper(), fields[4].upper().split(",")
        sites.n_records += 1
        if not _fits(ref, start - region.start, reference):
            sites.n_other_ref += 1
            return
        if len(alts) > 1:
            sites.counts["multi-allelic"] += 1
        if "PS" in fields[8].split(":"):
            sites.counts["phase sets"] += 1
        changes = [
            self._change(start - region.start, ref, alt, len(reference), sites.counts)
            for alt in alts
        ]
        genotypes = _genotypes(fields, columns, self._parsed)
        flags = genotypes[:, 2]
        sites.n_missing += (flags & _MISSING) > 0
        sites.n_heterozygous += int(((flags & _HETEROZYGOUS) > 0).sum())
        sites.counts["missing"] += int((flags & _MISSING > 0).sum())
        sites.counts["unphased"] += int((flags & _UNPHASED > 0).sum())
        sites.counts["haploid"] += int((flags & _HAPLOID > 0).sum())
        applied = np.array([0, *(change is not None for change in changes)], dtype=np.uint8)
        codes = genotypes[:, :2]
        if codes.max(initial=0) > len(alts):
            raise UserError(f"a genotype names allele {codes.max()} of {len(alts)}: broken record.")
        codes = (codes * applied[codes]).astype(np.uint8)
        if codes.any():
            sites.alleles.append(codes)
            sites.changes.append(changes)

    def _change(
        self, start: int, ref: str, alt: str, length_bp: int, counts: Counter[str]
    ) -> Change | None:
        if alt == ".":
            return None
        if not alt or alt.strip("ACGTN"):
            counts["symbolic"] += 1
            return None
        change = change_of(start, ref, alt)
        if change.start < 0 or change.end > length_bp or change.start >= length_bp:
            counts["beyond the region"] += 1
            return None
        if change.is_indel:
            counts["indels applied" if self._apply_indels else "indels left out"] += 1
            return change if self._apply_indels else None
        return change

    def _lines(self, region: Region, file: Path) -> Iterator[str]:
        opened = self._open(file)
        contig = self._contigs[region.chromosome]
        try:
            for record in opened.fetch(contig, region.start, region.end):
                yield str(record)
        except (ValueError, OSError) as error:
            raise UserError(
                f"{file} cannot be read around gene {region.gene} ({error}): restore it, or make "
                "its index again ('bcftools index FILE')."
            ) from error

    def _open(self, file: Path) -> Any:
        """The file, opened; the one before it is closed."""
        if self._opened is not None and self._opened[0] == file:
            return self._opened[1]
        if not file.exists():
            raise UserError(f"{file} does not exist: expected a phased VCF or BCF with its index.")
        self.close()
        before = self._pysam.set_verbosity(0)  # its warnings about headers are not for our users
        try:
            opened = self._pysam.VariantFile(str(file))
            if opened.index is None:
                raise UserError(
                    f"{file} has no index, so regions cannot be found in it: 'bcftools index "
                    "FILE' makes one (of a file that bgzip compressed)."
                )
        except (ValueError, OSError, NotImplementedError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(
                f"{file} cannot be opened as VCF or BCF ({error}): expected one that bgzip "
                "compressed, with its index beside it."
            ) from error
        finally:
            self._pysam.set_verbosity(before)
        self._opened = (file, opened)
        return opened


# -- samples ---------------------------------------------------------------------------------------


def _contigs(opened: Any) -> list[str]:
    """Chromosomes that have records; of a BCF, those that its header names."""
    try:
        return list(opened.index)
    except TypeError:
        return list(opened.header.contigs)


def _chosen(known: tuple[str, ...], wanted: Sequence[str] | None, file: Path) -> tuple[str, ...]:
    if wanted is None:
        return known
    n_absent = len(set(wanted) - set(known))
    if n_absent:
        raise UserError(
            f"{n_absent} of the {len(wanted)} people who are asked for are not among the "
            f"{len(known)} samples of {file}: compare how ids are written (leading zeros, family "
            "prefixes), or leave them out of the list."
        )
    return tuple(wanted)


def _columns(subjects: tuple[str, ...], samples: tuple[str, ...], file: Path) -> np.ndarray:
    places = {name: place for place, name in enumerate(samples)}
    if n_absent := sum(name not in places for name in subjects):
        raise UserError(
            f"{file} lacks {n_absent} of the {len(subjects)} people whom another chromosome's file "
            "has: give files of the same samples, or list those in all of them with --subjects."
        )
    return np.array([places[name] for name in subjects])


# -- genotypes -------------------------------------------------------------------------------------


class _Parsed(dict[str, int]):
    """GT text -> its row of `rows`; a file has few different ones."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, int, int]] = []
        """Two alleles and flags."""

    def __missing__(self, text: str) -> int:
        plain = text.lstrip("/|")
        alleles = plain.replace("/", "|").split("|")
        numbers = [int(allele) if allele.isdigit() else 0 for allele in alleles]
        flags = 0 if all(map(str.isdigit, alleles)) else _MISSING
        if len(numbers) == 1:
            numbers, flags = numbers * 2, flags | (0 if flags else _HAPLOID)
        if len(numbers) != 2:
            raise UserError(f"a genotype of {len(numbers)} alleles ('{text}'): expected two.")
        if numbers[0] != numbers[1]:
            flags |= 0 if flags else _HETEROZYGOUS
            if "/" in plain:
                numbers, flags = [0, 0], flags | (0 if flags & _MISSING else _UNPHASED)
        self[text] = len(self.rows)
        self.rows.append((numbers[0], numbers[1], flags))
        return self[text]


def _genotypes(fields: list[str], columns: np.ndarray, parsed: _Parsed) -> np.ndarray:
    """int64 [n, 3]: both alleles and flags, of the people in `columns`."""
    if fields[8].split(":")[0] != "GT":
        raise UserError(
            f"the record at {fields[0]}:{fields[1]} has no GT first in its format ({fields[8]}): "
            "give a file with genotypes, not with dosages alone."
        )
    texts = fields[9:]
    if ":" in fields[8]:
        texts = [text.partition(":")[0] for text in texts]
    which = np.fromiter(map(parsed.__getitem__, texts), dtype=np.int64, count=len(texts))
    return np.array(parsed.rows, dtype=np.int64)[which[columns]]


def _fits(ref: str, start: int, reference: str) -> bool:
    """Whether REF is what the reference has, as far as it lies in the region."""
    inside = ref[max(0, -start) : max(0, len(reference) - start)]
    at = max(0, start)
    return reference[at : at + len(inside)] == inside


def _refuse_other_reference(sites: _Sites, where: str) -> None:
    if sites.n_other_ref:
        raise UserError(
            f"{where}: {sites.n_other_ref} of {sites.n_records} REF alleles are not what the "
            "reference has there: variants and FASTA are of different genome builds (or the FASTA "
            "is masked); give the FASTA that the variants were called against."
        )


def _refuse_unphased(sites: _Sites, where: str) -> None:
    n_unphased = sites.counts["unphased"]
    if n_unphased > MAX_UNPHASED * sites.n_heterozygous:
        raise UserError(
            f"{where}: {n_unphased} of {sites.n_heterozygous} heterozygous genotypes have no phase "
            f"('0/1', not '0|1'; at most {MAX_UNPHASED:.0%} may): nobody knows which alleles lie "
            "on one haplotype; phase the file first (SHAPEIT, Beagle, Eagle)."
        )
