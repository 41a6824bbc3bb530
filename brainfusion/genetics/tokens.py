"""One vector from the positions of a sequence, padding, special and edge tokens left out.

Sums run in float64 and are kept as float32, whatever the tokens are stored in: averaged in
bfloat16, real haplotypes kept 21 to 58 % of the between-person variance; in float32 all of it.

Shape legend: b sequences, l stored positions, w stored width, s = (start, stop) of what is no
padding.
"""

from dataclasses import dataclass

import numpy as np

from brainfusion.runtime.errors import UserError

POOLINGS = ("mean", "max", "last", "separator")


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenPool:
    """How positions become one vector."""

    pooling: str
    """"mean", "max", "last" (token of the sequence) or "separator" (the token behind it)."""
    n_before: int
    """Special tokens before the sequence (BOS, CLS)."""
    n_after: int
    """Special tokens behind it (EOS, SEP, GENERator's second <s>)."""
    trim_left: int = 0
    """Tokens left out at the sequence's start (Evo 2's spikes: ArcInstitute/evo2#223)."""
    trim_right: int = 0
    """Tokens left out at its end."""
    padding: str = "right"
    """The side on which shorter sequences are padded."""
    mirrored: bool = False
    """Whether the second half of the channels runs backwards (Caduceus-PS's reverse strand)."""
    unit_bp: int | None = None
    """Base pairs a token."""
    length_bp: int | None = None
    """Length of every sequence, if they have one."""

    @property
    def step(self) -> str:
        """What pooling does, in words for the provenance."""
        left_out = [f"{self.n_before} + {self.n_after} special"]
        if self.trim_left or self.trim_right:
            left_out.append(f"{self.trim_left} + {self.trim_right} edge")
        return f"{self.pooling} over tokens in float32, {' and '.join(left_out)} tokens left out"

    def dtype(self, stored: str) -> str:
        """The type that a pooled vector has been through: a mean was never rounded."""
        return "float32" if self.pooling == "mean" else stored

    def __call__(self, tokens: np.ndarray, spans: np.ndarray | None, *, where: str) -> np.ndarray:
        """Pool float32 [b, l, w] over the positions in `spans` (int [b, 2]; None: all) to [b, w].

        A sequence of which nothing is left becomes nan, and is masked later.

        Raises:
            UserError: Spans beyond the positions, or a length that is not the declared one's.
        """
        n, length, width = tokens.shape
        if spans is None:
            spans = np.tile(np.array([0, length]), (n, 1))
        self._check(spans, length, where=where)
        pooled = np.full((n, width), np.nan, dtype=np.float32)
        half = width // 2 if self.mirrored else width
        for row, (start, stop) in enumerate(spans):
            inside = tokens[row, start:stop]
            pooled[row, :half] = self._pooled(inside[:, :half])
            if self.mirrored:
                # Stored back to front: its own first token is the last position.
                other = inside[self.n_before : len(inside) - self.n_after, half:][::-1]
                pooled[row, half:] = self._reduced(other)
        return pooled

    def _pooled(self, inside: np.ndarray) -> np.ndarray | float:
        if self.pooling == "separator":
            return inside[-1] if len(inside) > self.n_before + self.n_after - 1 else np.nan
        return self._reduced(inside[self.n_before : len(inside) - self.n_after])

    def _reduced(self, sequence: np.ndarray) -> np.ndarray | float:
        kept = sequence[self.trim_left : max(0, len(sequence) - self.trim_right)]
        if not len(kept):
            return np.nan
        if self.pooling == "last":
            return kept[-1]
        if self.pooling == "max":
            return kept.max(axis=0)
        return (kept.sum(axis=0, dtype=np.float64) / len(kept)).astype(np.float32)

    def _check(self, spans: np.ndarray, length: int, *, where: str) -> None:
        if n_bad := int(((spans[:, 0] < 0) | (spans[:, 1] > length)).sum()):
            raise UserError(
                f"{where}: {n_bad} lengths are beyond the {length} positions that are stored: "
                "lengths count tokens, special ones included."
            )
        if self.length_bp is None or self.unit_bp is None:
            return
        expected = -(-self.length_bp // self.unit_bp) + self.n_before + self.n_after
        found = spans[:, 1] - spans[:, 0]
        if n_bad := int((found != expected).sum()):
            raise UserError(
                f"{where}: {n_bad} of {len(spans)} sequences have another number of tokens than "
                f"length_bp={self.length_bp} gives ({int(found[found != expected][0])}, expected "
                f"{expected} with {self.n_before} + {self.n_after} special ones): correct "
                "length_bp or special_tokens, or give lengths."
            )


def spans_of_lengths(lengths: np.ndarray, n_positions: int, padding: str) -> np.ndarray:
    """Spans, int [..., 2]: where sequences of these lengths [...] lie among `n_positions`."""
    lengths = np.asarray(lengths).astype(np.int64)
    start = n_positions - lengths if padding == "left" else np.zeros_like(lengths)
    return np.stack([start, start + lengths], axis=-1)


def spans_of_mask(mask: np.ndarray, *, where: str) -> np.ndarray:
    """Spans, int [..., 2]: where attention masks [..., l] are one.

    Raises:
        UserError: A mask with a hole.
    """
    mask = np.asarray(mask).astype(bool)
    count = mask.sum(axis=-1)
    start = mask.argmax(axis=-1)
    stop = np.where(count > 0, mask.shape[-1] - mask[..., ::-1].argmax(axis=-1), 0)
    if np.any(stop - start != count):
        raise UserError(f"{where}: an attention_mask with holes: expected ones in one piece.")
    return np.stack([start, stop], axis=-1)
