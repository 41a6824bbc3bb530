"""One vector from both strands of DNA.

Shape legend: ... any leading axes, d hidden size.

Caduceus (Schiff 2024, arXiv 2403.03234; kuleshov-group/caduceus @0060a6d, `vep_embeddings.py` and
`CaduceusForSequenceClassification`) with parameter sharing (PS) is *equivariant*: it stores the
forward strand in the first d channels, and the reverse strand in the last d, flipped in length and
in channels. Pooling over the length undoes the first flip; the second must be undone by hand.
"""

from typing import Literal

import numpy as np

from brainfusion.runtime.errors import UserError


def fold_ps(raw: np.ndarray, *, where: str = "ps_raw vectors") -> np.ndarray:
    """Fold pooled Caduceus-PS output into vectors that the input's strand does not change.

    Args:
        raw: [..., 2d], the mean or maximum of raw output positions over the length.
        where: What to call the vectors in an error.

    Returns:
        float32 [..., d]: the mean of the forward half and of the reverse half with its channels
        flipped.

    Raises:
        UserError: The width is odd, so these are not two halves.
    """
    width = raw.shape[-1]
    if width % 2:
        raise UserError(
            f"{where}: width {width} is odd, but ps_raw holds two strands of equal width: give the "
            "output as the model returned it, or declare strands 'averaged' if it is folded."
        )
    half = width // 2
    raw = raw.astype(np.float32, copy=False)
    return average(raw[..., :half], raw[..., half:][..., ::-1])


def average(forward: np.ndarray, reverse: np.ndarray) -> np.ndarray:
    """The mean, in float32, of a sequence's pooled vectors and of its reverse complement's.

    Both are [..., d]. For models without strand symmetry (Evo 2, GENERator, Caduceus-Ph). A
    GENERator sequence is trimmed to a multiple of 6 first and reversed second.
    """
    return np.float32(0.5) * (forward.astype(np.float32) + reverse.astype(np.float32))


def reverse_complement(sequence: str) -> str:
    """The other strand, read in its own direction; A, C, G, T, N in either case, which is kept."""
    return sequence.translate(_COMPLEMENT)[::-1]


def both_strands(
    sequence: str, *, unit_bp: int = 1, trim: Literal["left", "right"] = "left"
) -> tuple[str, str]:
    """A sequence cut to whole tokens, and the reverse complement of what was cut.

    In this order: the 6-mers of a reverse complement are those of the sequence, reversed, only if
    its length is a multiple of 6. Reversed first and cut second, another window is read in another
    frame.

    Args:
        sequence: A, C, G, T, N in either case, which is kept: Evo 2's tokens are bytes.
        unit_bp: Base pairs a token; 6 for GENERator and Nucleotide Transformer.
        trim: The side on which the remainder is cut off (GENERator's README and variant script
            cut on the left, its data collator on the right).

    Raises:
        UserError: Other letters, or nothing left.
    """
    if strange := sorted(set(sequence) - set("ACGTNacgtn")):
        raise UserError(
            f"a sequence with the letters {', '.join(strange[:4])}: expected A, C, G, T or N."
        )
    rest = len(sequence) % unit_bp
    forward = sequence[rest:] if trim == "left" else sequence[: len(sequence) - rest]
    if not forward:
        raise UserError(
            f"a sequence of {len(sequence)} bp is shorter than a token of {unit_bp}: leave it out."
        )
    return forward, reverse_complement(forward)


_COMPLEMENT = str.maketrans("ACGTNacgtn", "TGCANtgcan")
