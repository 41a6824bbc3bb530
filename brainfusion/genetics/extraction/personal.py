"""Personal haplotypes from one FASTA a person (or a haplotype), as `bcftools consensus` writes.

    sequences/0001.fa             >OXT|1, >OXT|2, >AVP|1 ...   records are genes
    sequences/0001.1.fa           >20                          records are chromosomes

- files are named by a template: "{subject}" or, for instance, "{subject}.{haplotype}"
- records are genes, with "|1" and "|2" behind the name where one file holds both haplotypes; or
  chromosomes, all people's of one length, because an insertion would shift whatever follows
- a person who lacks a gene has no vector of it
- a sequence whose length is not the most common one of its gene is flagged as carrying an indel

Sequences are kept in a temporary folder, each distinct one of a gene once.

Shape legend: n people, p haplotypes (1 or 2), g genes, u distinct sequences of a gene.
"""

import hashlib
import re
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from brainfusion.genetics.extraction.fasta import (
    SUFFIXES,
    count_odd,
    match_chromosomes,
    normalised,
    records,
)
from brainfusion.genetics.extraction.regions import Region
from brainfusion.genetics.extraction.sequences import GeneHaplotypes
from brainfusion.genetics.ids import text_ids
from brainfusion.runtime.errors import UserError
from brainfusion.runtime.logs import Progress, say


class PersonalSequences:
    """A folder of FASTA files, read when this is made; to be closed.

    Args:
        folder: The files.
        files: What their names are, without the suffix.
        regions: Where genes are, if records are chromosomes; flanks included.
        genes: Which genes to take, if records are genes; all by default.
        subjects: Whom to take; everybody by default.

    Raises:
        UserError: No files, names that do not fit, people or genes that are not there.
    """

    def __init__(
        self,
        folder: Path,
        *,
        files: str = "{subject}",
        regions: Sequence[Region] | None = None,
        genes: Sequence[str] | None = None,
        subjects: Sequence[str] | None = None,
    ) -> None:
        paths = _named(folder, files)
        self.subjects = _people(paths, subjects, folder)
        self._regions = regions
        self._spool = tempfile.TemporaryDirectory(prefix="brainfusion-sequences-")
        self._places: dict[str, int] = {}
        self._numbers: dict[str, dict[bytes, int]] = {}
        self._lengths: dict[str, list[int]] = {}
        self._found: dict[tuple[str, int], dict[int, int]] = {}  # (gene, haplotype): row -> number
        self._chromosome_bp: dict[str, int] = {}
        self._n_odd = self._n_lower = 0
        has_pair = "{haplotype}" in files
        rows = {subject: row for row, subject in enumerate(self.subjects)}
        wanted = [(key, path) for key, path in paths.items() if key[0] in rows]
        progress = Progress("people's FASTA files", len(wanted))
        for number, ((subject, haplotype), path) in enumerate(wanted, start=1):
            for gene, own, sequence in self._cut(path):
                if has_pair and own is not None:
                    raise UserError(
                        f"{folder}: file names and record names ('{gene}|{own + 1}') both say "
                        "which haplotype: one of them must do."
                    )
                place = haplotype if has_pair else own
                self._keep(rows[subject], gene, 0 if place is None else place, sequence)
            progress.update(number)
        if self._n_odd or self._n_lower:
            say(
                f"{folder}: {self._n_lower} sequences with lower-case bases are made upper, "
                f"{self._n_odd} letters that are none of ACGTN become N"
            )
        known = tuple(self._numbers)
        self.n_haplotypes = 1 + any(haplotype for _, haplotype in self._found)
        if genes is not None and (absent := [gene for gene in genes if gene not in known]):
            raise UserError(
                f"{folder}: {len(absent)} of {len(genes)} genes are in nobody's file "
                f"({', '.join(absent[:3])}): records must be named by gene (one has "
                f"{', '.join(known[:3])})."
            )
        self.has_indels = any(len(set(lengths)) > 1 for lengths in self._lengths.values())
        """Whether sequences of a gene differ in length."""
        self.genes = text_ids(list(genes or known), what="gene", where=str(folder))

    def gene(self, number: int) -> GeneHaplotypes:
        """Everyone's haplotypes of a gene."""
        gene = self.genes[number]
        index = np.full((len(self.subjects), self.n_haplotypes), -1, dtype=np.int32)
        for haplotype in range(self.n_haplotypes):
            for row, sequence in self._found.get((gene, haplotype), {}).items():
                index[row, haplotype] = sequence
        mask = np.asarray((index >= 0).all(axis=1))
        index[index < 0] = 0
        sequences = tuple(self._file(gene).read_text().split("\n")[:-1])
        lengths = np.array(self._lengths[gene])
        usual = np.bincount(lengths[index[mask].ravel()]).argmax() if mask.any() else 0
        strand = next((r.strand for r in self._regions or () if r.gene == gene), "+")
        return GeneHaplotypes(
            gene=gene,
            strand=strand,
            sequences=sequences,
            index=index,
            mask=mask,
            indels=lengths != usual,
            counts=+Counter({"absent": int((~mask).sum())}),
        )

    def close(self) -> None:
        """Throw the temporary folder away."""
        self._spool.cleanup()

    def _cut(self, path: Path) -> Iterator[tuple[str, int | None, str]]:
        """(gene, haplotype or None, sequence) of a file."""
        if self._regions is None:
            for name, sequence in records(path):
                gene, separator, own = name.rpartition("|")
                has_own = separator == "|" and own in ("1", "2")
                yield (gene, int(own) - 1, sequence) if has_own else (name, None, sequence)
            return
        chromosomes = dict(records(path))
        names = match_chromosomes(
            [r.chromosome for r in self._regions], list(chromosomes), where="a person's FASTA file"
        )
        for region in self._regions:
            sequence = chromosomes[names[region.chromosome]]
            usual = self._chromosome_bp.setdefault(region.chromosome, len(sequence))
            if len(sequence) != usual or region.end > usual:
                raise UserError(
                    f"chromosome {region.chromosome} has {len(sequence)} bases in one person's "
                    f"file and {usual} in another's (region {region.gene} ends at {region.end}): "
                    "insertions shift what follows, so regions cannot be cut from it; apply "
                    "single-base variants only, or give files whose records are genes."
                )
            yield region.gene, None, sequence[region.start : region.end]

    def _keep(self, row: int, gene: str, haplotype: int, sequence: str) -> None:
        text = normalised(sequence)
        if not text:
            return
        self._n_odd += count_odd(sequence)
        self._n_lower += sequence != sequence.upper()
        self._places.setdefault(gene, len(self._places))
        numbers = self._numbers.setdefault(gene, {})
        digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
        if digest not in numbers:
            numbers[digest] = len(numbers)
            self._lengths.setdefault(gene, []).append(len(text))
            with self._file(gene).open("a") as handle:
                handle.write(text + "\n")
        self._found.setdefault((gene, haplotype), {})[row] = numbers[digest]

    def _file(self, gene: str) -> Path:
        return Path(self._spool.name) / f"{self._places[gene]:06d}.txt"


def _named(folder: Path, template: str) -> dict[tuple[str, int], Path]:
    """(subject, haplotype from 0) -> file."""
    fields = re.findall(r"\{(\w*)\}", template)
    if sorted(fields) not in (["subject"], ["haplotype", "subject"]):
        raise UserError(
            f"--files '{template}': expected '{{subject}}', with '{{haplotype}}' where each has a "
            "file of its own, for example '{subject}.{haplotype}'."
        )
    pattern = re.escape(template).replace(r"\{subject\}", "(?P<subject>.+?)")
    pattern = re.compile(pattern.replace(r"\{haplotype\}", "(?P<haplotype>[12])"))
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder: expected one FASTA file a person in it.")
    paths: dict[tuple[str, int], Path] = {}
    n_other = 0
    for path in sorted(folder.iterdir()):
        suffix = next((s for s in SUFFIXES if path.name.endswith(s)), None)
        if suffix is None:
            continue
        match = pattern.fullmatch(path.name.removesuffix(suffix))
        if match is None:
            n_other += 1
            continue
        groups = match.groupdict()
        paths[groups["subject"], int(groups.get("haplotype") or 1) - 1] = path
    if not paths:
        raise UserError(
            f"{folder}: no file is named '{template}' with one of {', '.join(SUFFIXES)} "
            f"({n_other} FASTA files have other names): say with --files how they are named."
        )
    if n_other:
        say(f"{folder}: {n_other} FASTA files are not named '{template}' and are left out")
    written = list(dict.fromkeys(subject for subject, _ in paths))
    ids = dict(zip(written, text_ids(written, what="subject", where=str(folder)), strict=True))
    return {(ids[subject], haplotype): path for (subject, haplotype), path in paths.items()}


def _people(
    paths: dict[tuple[str, int], Path], wanted: Sequence[str] | None, folder: Path
) -> tuple[str, ...]:
    known = tuple(dict.fromkeys(subject for subject, _ in paths))
    if wanted is None:
        return known
    if n_absent := len(set(wanted) - set(known)):
        raise UserError(
            f"{n_absent} of the {len(wanted)} people who are asked for have no file among the "
            f"{len(known)} in {folder}: compare how ids are written (leading zeros, suffixes)."
        )
    return tuple(wanted)
