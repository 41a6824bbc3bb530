"""GENERator (Wu 2025, arXiv 2502.07272; GenerTeam/GENERator @96242a4): pooled or chunked output.

    generator/embeddings.npz    embeddings [n, g, H], subjects [n], genes [g]
    generator/provenance.json   pooling "separator", "mean" or "last"; token_unit "6-mer"

Any other container of `genetics.files` will do as well. Pooling: "separator" is the last token of
`"<s>" + sequence + "<s>"`, "last" the last token of the sequence itself, "mean" the masked mean.
Token-level files ("level": "token") are pooled here, with "special_tokens": [1, 1] for that form,
[1, 0] for the first version's, which has no second `<s>`.

Sequences longer than 16,384 tokens are cut into chunks, padded with zero chunks to the longest:
[n, g, chunks, H], or flattened to [n, g, chunks * H] with "n_chunks" in the provenance. The mean is
taken over the chunks that are there: zero chunks would shrink the vectors of short genes. (The
published chunking drops the tail, so all but the last chunk end in an ordinary 6-mer.)

Tokens are 6-mers that do not overlap: `length_bp` must be a multiple of 6, and one deletion changes
half of the tokens that follow, so carriers of indels differ from the rest by an artefact: declare
"indels" ("none" or "included"), or flag them in a column. Both strands are cut to whole tokens
first and reversed second (`strands.both_strands`).
"""

import numpy as np

from brainfusion.genetics.adapter import Adapter, checked_vectors
from brainfusion.genetics.features import Provenance
from brainfusion.genetics.models import Checkpoint, expected_width
from brainfusion.runtime.errors import UserError


def mean_over_chunks(stack: np.ndarray) -> np.ndarray:
    """The mean of [n, c, h] over chunks that are not all zero; zeros for a person with none.

    A chunk with nan stays nan, so that its person is masked rather than half averaged.
    """
    present = (stack != 0).any(axis=2)  # nan counts as present
    total = stack.sum(axis=1, dtype=np.float32)
    return total / np.maximum(present.sum(axis=1), 1).astype(np.float32)[:, None]


def _to_vectors(
    raw: np.ndarray, provenance: Provenance, spec: Checkpoint, where: str
) -> tuple[np.ndarray, str]:
    n_chunks = provenance.n_chunks
    width = expected_width(spec, provenance.strands)
    if raw.ndim == 2 and n_chunks is not None and raw.shape[1] == n_chunks * width:
        raw = raw.reshape(len(raw), n_chunks, width)
    if raw.ndim == 3 and n_chunks is not None and raw.shape[1] != n_chunks:
        raise UserError(
            f"{where}: {raw.shape[1]} chunks, but provenance.json says n_chunks={n_chunks}."
        )
    step = ""
    if raw.ndim == 3:
        raw, step = mean_over_chunks(raw), "mean over chunks that are not padding"
    return checked_vectors(raw, provenance, spec, where=where), step


ADAPTER = Adapter(
    model="generator",
    strands=("fwd_only", "averaged", "concat", "pair"),
    pooling=("separator", "mean", "last", "max"),
    to_vectors=_to_vectors,
)
