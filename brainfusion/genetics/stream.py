"""Embeddings that are read, converted and watched block by block, never all at once.

Shape legend: n people, g genes, r rows and c columns of a block, h width.
"""

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np

from brainfusion.genetics import checks, statistics
from brainfusion.genetics.checks import Alarm
from brainfusion.genetics.features import GeneticFeatures, Provenance
from brainfusion.genetics.source import Block, Findings, Source


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ReadyBlock:
    """Vectors that are ready to be kept: strands folded, chunks averaged, absent ones masked."""

    rows: slice
    columns: slice
    vectors: np.ndarray
    """float32 [r, c, h], or [r, c, 2, h] where haplotypes are kept apart; zeros where masked."""
    mask: np.ndarray
    """bool [r, c], true where there is a vector (both, of two haplotypes)."""
    dtype: str
    """The coarsest type that the block is known to have been stored in."""
    resolutions: tuple[str, ...]
    """The coarsest type that holds what a column has, one a column."""
    steps: tuple[str, ...] = ()
    """What was done to the vectors."""
    findings: Findings = field(default_factory=Findings)
    """What the files say besides."""


class Stream:
    """A source, its blocks converted; `provenance` and `alarms` are there after the last one.

    Iterate over it once, or share the work: `blocks(start, stop)` may run in several processes,
    each block is given to `account` in one of them, and `finish` closes the books.

    Args:
        source: Where blocks come from.
        convert: Block -> ReadyBlock.
        provenance: What is declared; completed by what is read.
        width: h.
        where: The file or folder, for errors.
        findings_alarms: Of all findings, the alarms that they give.
        undeclared: Of all findings, what provenance should say and does not.
    """

    def __init__(
        self,
        source: Source,
        convert: Callable[[Block], ReadyBlock],
        provenance: Provenance,
        *,
        width: int,
        where: str,
        findings_alarms: Callable[[Findings], list[Alarm]],
        undeclared: Callable[[Findings], list[str]],
    ) -> None:
        self.source = source
        self.subjects, self.genes, self.width = source.subjects, source.genes, width
        self.has_haplotypes = source.has_haplotypes
        self.n_blocks = source.n_blocks
        self._convert, self._declared, self._where = convert, provenance, where
        self._findings_alarms, self._undeclared = findings_alarms, undeclared
        self._findings = Findings()
        self._findings.add(source.findings)
        self._statistics = statistics.TableStatistics(len(self.subjects), len(self.genes))
        self._steps: dict[str, None] = dict.fromkeys(source.steps)
        self._provenance: Provenance | None = None
        self._alarms: tuple[Alarm, ...] = ()

    def __iter__(self) -> Iterator[ReadyBlock]:
        for block in self.blocks():
            self.account(block)
            yield block
        self.finish()

    def blocks(self, start: int = 0, stop: int | None = None) -> Iterator[ReadyBlock]:
        """The blocks numbered `start` to `stop`, ready, without accounting for them."""
        for block in self.source.blocks(start, stop):
            yield self._convert(block)

    def account(self, block: ReadyBlock) -> None:
        """Add a block to the statistics behind the alarms; each must be added once, in any order.

        A person's two haplotypes count by their mean.
        """
        vectors = block.vectors
        if self.has_haplotypes:
            vectors = vectors.mean(axis=2, dtype=np.float32)
        self._statistics.add(
            block.rows,
            block.columns,
            vectors,
            block.mask,
            dtype=block.dtype,
            resolutions=block.resolutions,
        )
        self._steps.update(dict.fromkeys(block.steps))
        self._findings.add(block.findings)

    def finish(self) -> None:
        """Complete the provenance and raise the alarms, once all blocks are accounted for.

        Raises:
            UserError: Everyone has the same vectors, or most vectors are absent.
        """
        figures = self._statistics.figures()
        declared = self._declared
        stored = [gene.stored for gene in figures if gene.n_present]
        self._provenance = dataclasses.replace(
            declared,
            dtype=statistics.coarsest([declared.dtype, *stored]),
            steps=(*declared.steps, *self._steps),
        )
        found = checks.find_alarms(
            figures,
            self._statistics.n_genes_present,
            where=self._where,
            undeclared=self._undeclared(self._findings),
            n_twins=self._statistics.largest_twin_group(),
        )
        self._alarms = (*found, *self._findings_alarms(self._findings))

    @property
    def provenance(self) -> Provenance:
        """What is declared, and what reading found out and did.

        Raises:
            RuntimeError: Blocks are still to come.
        """
        if self._provenance is None:
            raise RuntimeError("the provenance is complete after the last block")
        return self._provenance

    @property
    def alarms(self) -> tuple[Alarm, ...]:
        """What there is to warn about.

        Raises:
            RuntimeError: Blocks are still to come.
        """
        if self._provenance is None:
            raise RuntimeError("the alarms are complete after the last block")
        return self._alarms

    def gathered(self) -> GeneticFeatures:
        """All blocks in memory, haplotypes side by side where the files keep them apart.

        Raises:
            UserError: What `finish` raises.
        """
        n, g = len(self.subjects), len(self.genes)
        haplotypes = (2,) if self.has_haplotypes else ()
        vectors = np.zeros((n, g, *haplotypes, self.width), dtype=np.float32)
        mask = np.zeros((n, g), dtype=np.bool_)
        for block in self:
            vectors[block.rows, block.columns] = block.vectors
            mask[block.rows, block.columns] = block.mask
        return GeneticFeatures(
            subjects=self.subjects,
            genes=self.genes,
            vectors=vectors,
            mask=mask,
            provenance=self.provenance,
            alarms=self.alarms,
        )
