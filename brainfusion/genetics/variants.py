"""Variant-level output of Caduceus' `vep_embeddings.py` (kuleshov-group/caduceus @0060a6d).

A dict of six tensors: mean vectors of a window around a variant, the reference's beside the
alternative allele's, for the forward strand and for the reverse complement, and what is known of
the variant. There is no row id, and rows come in the order of parallel workers
(`DistributedSampler(drop_last=True)`, rank files in listing order): row i is not variant i of the
data set. So it cannot be joined to people, nor to variants by position; what it can do is to say
how far alleles are apart.

Shape legend: n variants, d hidden size.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from brainfusion.genetics.containers import first_line
from brainfusion.genetics.strands import average
from brainfusion.runtime import logs
from brainfusion.runtime.errors import UserError

_FORWARD, _REVERSE = "concat_avg_ws", "rc_concat_avg_ws"
_ABOUT = ("chromosome", "labels", "distance_to_nearest_tss", "tissue_embed")


@dataclass(frozen=True, kw_only=True, eq=False)
class VariantEmbeddings:
    """Variants in no known order, both strands averaged."""

    reference: np.ndarray
    """float32 [n, d]."""
    alternative: np.ndarray
    """float32 [n, d]."""
    about: dict[str, np.ndarray]
    """`chromosome` (X is -1), `labels`, `distance_to_nearest_tss`, `tissue_embed`: [n] each."""
    n_dropped: int
    """Rows with nan, which half-precision autocast leaves."""

    @property
    def difference(self) -> np.ndarray:
        """float32 [n, d]: alternative minus reference."""
        return self.alternative - self.reference


def read_variants(path: str | Path) -> VariantEmbeddings:
    """Read a `{split}_embeds_combined.pt`.

    Rows with nan are left out and counted, as the authors' notebook does.

    Raises:
        UserError: It cannot be read, or is not such a file.
    """
    import pickle

    import torch

    path = Path(path)
    try:
        loaded = torch.load(path, weights_only=True, map_location="cpu")
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, OSError) as error:
        raise UserError(
            f"{path} cannot be read as tensors ({first_line(error)}): it is truncated or of "
            "another kind."
        ) from error
    if not isinstance(loaded, dict) or _FORWARD not in loaded:
        raise UserError(f"{path}: no '{_FORWARD}', so this is not what vep_embeddings.py writes.")
    arrays = {key: value.float().numpy() for key, value in loaded.items()}
    forward, reverse = arrays[_FORWARD], arrays.get(_REVERSE, arrays[_FORWARD])
    if forward.ndim != 2 or forward.shape[1] % 2 or reverse.shape != forward.shape:
        raise UserError(
            f"{path}: '{_FORWARD}' of shape {forward.shape}, expected [variants, 2 x width]: "
            "reference beside alternative allele."
        )
    both = average(forward, reverse)
    kept = np.isfinite(both).all(axis=1)
    n_dropped = int((~kept).sum())
    logs.say(
        f"{path}: {int(kept.sum())} variants without row ids, in no order that is known: not to be "
        f"joined to people or variants by position; {n_dropped} rows with nan left out"
    )
    half = both.shape[1] // 2
    return VariantEmbeddings(
        reference=both[kept, :half],
        alternative=both[kept, half:],
        about={key: arrays[key][kept] for key in _ABOUT if key in arrays},
        n_dropped=n_dropped,
    )
