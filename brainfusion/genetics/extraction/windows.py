"""From a sequence to the texts that a model reads, and from their vectors back to one.

A sequence is first trimmed to whole tokens, then cut into windows, and each window is then turned
into its reverse complement: in this order, because the 6-mers of the reverse complement are those
of the window only if its length is a multiple of 6. Both strands of a window are read, so which
strand a gene is annotated on does not change its vector.

- trim: bases before the first whole token are left out on the left of the forward strand of the
  genome (GENERator's own variant script trims the left, too)
- windows: the fewest of at most `window_bp`, equal in length to within one token, each base in one;
  with a stride they have `window_bp` each, and start every `stride_bp` or a little less
- the vector of a sequence is the mean of its windows', weighted by how many positions were pooled
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from brainfusion.genetics.strands import average, reverse_complement
from brainfusion.runtime.errors import UserError


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """How sequences are cut and which strands are read."""

    unit_bp: int
    """Bases a token."""
    window_bp: int
    """Longest text; a multiple of `unit_bp`."""
    stride_bp: int
    """At most so far from the start of a window to the next; `window_bp` if they do not overlap."""
    both_strands: bool
    """Whether the reverse complement of each window is read and averaged."""
    gene_orientation: bool
    """If only one strand is read: the gene's own, or the reference's forward strand."""
    trim_left: int = 0
    """Tokens left out of the pool at each text's beginning."""

    def __post_init__(self) -> None:
        for name in ("window_bp", "stride_bp"):
            value = getattr(self, name)
            if value < self.unit_bp or value % self.unit_bp:
                raise UserError(
                    f"--{name.replace('_', '-')} {value}: expected a multiple of {self.unit_bp}, "
                    f"the bases of a token; {max(value // self.unit_bp, 1) * self.unit_bp} will do."
                )
        if self.stride_bp > self.window_bp:
            raise UserError(
                f"--stride-bp {self.stride_bp} is more than the window of {self.window_bp} bp, so "
                "bases between windows would be left out: give at most the window."
            )
        if not 0 <= self.trim_left < self.window_bp // self.unit_bp:
            raise UserError(
                f"--trim-left {self.trim_left}: a window has {self.window_bp // self.unit_bp} "
                "tokens; leave out fewer."
            )


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Texts:
    """The distinct texts of a gene, and which of them make up each sequence."""

    texts: tuple[str, ...]
    forward: tuple[tuple[int, ...], ...]
    """For each sequence, its windows' places in `texts`."""
    reverse: tuple[tuple[int, ...], ...]
    """The same of the windows' reverse complements; empty if one strand is read."""
    n_windows: int
    """Most windows of a sequence."""


def window_bounds(n_tokens: int, *, window: int, stride: int) -> list[tuple[int, int]]:
    """(start, stop) of the windows of `n_tokens`, in tokens."""
    if n_tokens <= window:
        return [(0, n_tokens)]
    if stride == window:
        n = -(-n_tokens // window)
        edges = [k * n_tokens // n for k in range(n + 1)]
        return list(pairwise(edges))
    n = -(-(n_tokens - window) // stride) + 1
    starts = [k * (n_tokens - window) // (n - 1) for k in range(n)]
    return [(start, start + window) for start in starts]


def cut(sequences: Sequence[str], reading: Reading, *, gene: str, strand: str) -> Texts:
    """The texts of a gene's sequences; each distinct one is there once.

    Args:
        sequences: Upper case; forward strand of the genome, or the gene's own if `strand` is "+".
        reading: How they are cut.
        gene: For errors.
        strand: Of the gene.

    Raises:
        UserError: A sequence without a token to pool.
    """
    unit = reading.unit_bp
    places: dict[str, int] = {}
    forward, reverse = [], []
    for sequence in sequences:
        n_tokens = len(sequence) // unit
        if n_tokens <= reading.trim_left:
            raise UserError(
                f"gene {gene}: a sequence of {len(sequence)} bp has {n_tokens} whole tokens of "
                f"{unit} bp, of which {reading.trim_left} are left out: widen it with --flank-bp."
            )
        trimmed = sequence[len(sequence) - n_tokens * unit :]
        bounds = window_bounds(
            n_tokens, window=reading.window_bp // unit, stride=reading.stride_bp // unit
        )
        windows = [trimmed[start * unit : stop * unit] for start, stop in bounds]
        others = [reverse_complement(window) for window in windows]
        if not reading.both_strands and reading.gene_orientation and strand == "-":
            windows = others
        forward.append(tuple(places.setdefault(text, len(places)) for text in windows))
        if reading.both_strands:
            reverse.append(tuple(places.setdefault(text, len(places)) for text in others))
    return Texts(
        texts=tuple(places),
        forward=tuple(forward),
        reverse=tuple(reverse),
        n_windows=max(map(len, forward)),
    )


def gather(vectors: np.ndarray, texts: Texts, reading: Reading) -> np.ndarray:
    """The vectors of the sequences: float32 [u, w] from those of the texts, float32 [t, w]."""
    pooled = [len(text) // reading.unit_bp - reading.trim_left for text in texts.texts]
    weights = np.array(pooled, dtype=np.float64)
    forward = _means(vectors, texts.forward, weights)
    if not reading.both_strands:
        return forward
    reverse = _means(vectors, texts.reverse, weights)
    return average(forward, reverse)


def _means(
    vectors: np.ndarray, windows: Sequence[Sequence[int]], weights: np.ndarray
) -> np.ndarray:
    means = np.empty((len(windows), vectors.shape[1]), dtype=np.float32)
    for row, places in enumerate(windows):
        where = np.array(places)
        share = weights[where] / weights[where].sum()
        means[row] = share @ vectors[where].astype(np.float64) if len(where) > 1 else vectors[where]
    return means
