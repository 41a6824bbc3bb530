"""Embeddings that were found in some container, read block by block.

Shape legend: n people, g genes, r rows and k columns of a block, c chunks, w stored width.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from brainfusion.runtime.errors import UserError, nearest

BLOCK_BYTES = 64 * 2**20
"""About how large a block is, as float32."""
MAX_BLOCK_BYTES = 256 * 2**20
"""How large a block may be where smaller ones would mean reading twice."""


COVARIATES = (
    "device", "gpu", "version", "package_version", "software_version", "case", "sequence_case",
    "window", "window_bp", "block_size", "batch_size", "reference", "reference_version", "assembly",
    "checkpoint_hash", "revision", "fused_add_norm", "dtype", "pooling", "strands",
)  # fmt: skip
"""What files may say of how rows were made, and of which a table should have one value."""


@dataclass(kw_only=True)
class Findings:
    """What the files say besides the vectors."""

    covariates: dict[str, Counter[str]] = field(default_factory=dict)
    """What (a word of `COVARIATES`) -> value -> rows or files that say so."""
    lengths_bp: set[int] = field(default_factory=set)
    """Lengths of the sequences."""
    n_flagged: int = 0
    """Vectors of which it is known whether their sequence carries an indel."""
    n_indels: int = 0
    """Those that do."""
    n_sequences: int = 0
    """Token-level sequences that were pooled."""
    n_padded: int = 0
    """Those with padding."""

    def add(self, other: "Findings") -> None:
        """Take in what another part of the files says."""
        for name, counts in other.covariates.items():
            self.covariates.setdefault(name, Counter()).update(counts)
        self.lengths_bp |= other.lengths_bp
        self.n_flagged += other.n_flagged
        self.n_indels += other.n_indels
        self.n_sequences += other.n_sequences
        self.n_padded += other.n_padded


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Block:
    """Some people's vectors of some genes."""

    rows: slice
    columns: slice
    raw: np.ndarray
    """float32 [r, k, w], nan where absent, the receiver's own to change; further axes may stand
    before the last, in this order: 2 haplotypes, 2 strands, chunks."""
    dtype: str
    """The type as stored."""
    findings: Findings = field(default_factory=Findings)


@dataclass(frozen=True, kw_only=True, eq=False)
class Source:
    """Embeddings that are found, with a plan of the blocks in which they are read."""

    subjects: tuple[str, ...]
    genes: tuple[str, ...]
    layer: str | None
    width: int
    """Stored width: the last axis of a block."""
    n_blocks: int
    load: Callable[[int, int], Iterator[Block]]
    """(start, stop) -> the blocks with these numbers, in order. Each person and gene is in one
    block. May be called again."""
    has_haplotypes: bool = False
    """Whether a person's two haplotypes stand side by side on an axis of their own."""
    has_strands: bool = False
    """Whether forward and reverse-complement vectors do."""
    steps: tuple[str, ...] = ()
    """What reading does to the vectors (pooling of tokens)."""
    findings: Findings = field(default_factory=Findings)
    """What is known before any block is read."""

    def blocks(self, start: int = 0, stop: int | None = None) -> Iterator[Block]:
        """The blocks numbered `start` to `stop`, all of them by default."""
        return self.load(start, self.n_blocks if stop is None else min(stop, self.n_blocks))


def row_ranges(n: int, *, bytes_per_row: int) -> list[slice]:
    """`n` rows in pieces of about `BLOCK_BYTES`."""
    step = max(1, BLOCK_BYTES // max(1, bytes_per_row))
    return [slice(start, min(start + step, n)) for start in range(0, n, step)]


def choose_layer(available: Sequence[str], wanted: str | None, *, where: Path) -> str | None:
    """The layer to read: the only one, or the one that is asked for.

    Raises:
        UserError: Several, and none named; or the one named is not there.
    """
    if not available:
        return wanted
    if wanted is None:
        if len(available) == 1:
            return available[0]
        raise UserError(
            f"{where}: {len(available)} layers ({', '.join(available)}): say which to read "
            "(layer=...)."
        )
    if wanted not in available:
        raise UserError(f"{where}: no layer '{wanted}'. {nearest(wanted, available)}")
    return wanted
