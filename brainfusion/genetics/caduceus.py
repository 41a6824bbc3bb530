"""Caduceus (Schiff 2024, arXiv 2403.03234; kuleshov-group/caduceus @0060a6d): pooled output.

    caduceus/embeddings.parquet   eid, gene_id, embedding, source_model, layer: one row a person
                                  and gene
    caduceus/provenance.json      strands "ps_raw", "ps_folded", "averaged" or "fwd_only"

Any other container of `genetics.files` will do as well. Caduceus-PS output is 2d wide and
equivariant, not invariant: "ps_raw" is folded here, with the flip of the reverse half's channels
(`strands.fold_ps`); at token level the reverse half is turned in length first. Caduceus-Ph is
averaged over both strands by whoever extracts it, or here from "pair" files.

The tokenizer appends `[SEP]` ("special_tokens": [0, 1]) unless told not to, and pads on the left.
There is no attention mask: padded batches contaminate real positions, which is an alarm.

The dict that `vep_embeddings.py` writes (`concat_avg_ws` ...) is refused: its 2d columns are the
reference and alternative allele of a variant, not two strands, and its rows carry no ids
(`genetics.variants` reads it as variants). The NaN rows that half-precision autocast leaves in
other files are masked.

The published configs run fused kernels (`fused_add_norm`), whose function differs from the
unfused one: record which under a key of your own, such as "fused_add_norm".
"""

import numpy as np

from brainfusion.genetics.adapter import Adapter, checked_vectors
from brainfusion.genetics.features import Provenance
from brainfusion.genetics.models import Checkpoint
from brainfusion.genetics.strands import fold_ps
from brainfusion.runtime.errors import UserError


def _to_vectors(
    raw: np.ndarray, provenance: Provenance, spec: Checkpoint, where: str
) -> tuple[np.ndarray, str]:
    folded = fold_ps(raw, where=where) if provenance.strands == "ps_raw" else None
    vectors = checked_vectors(raw, provenance, spec, where=where)
    if folded is None:
        return vectors, ""
    return folded, "ps_raw folded, channels of the reverse half flipped"


def _check(provenance: Provenance, spec: Checkpoint, where: str) -> None:
    if provenance.strands in ("ps_raw", "ps_folded") and spec.strand_class != "equivariant":
        raise UserError(
            f"{where}: strands '{provenance.strands}' belongs to Caduceus-PS, but "
            f"'{provenance.checkpoint}' is a Ph model, one strand at a time: declare 'averaged' or "
            "'fwd_only', or the PS checkpoint that made the file."
        )


ADAPTER = Adapter(
    model="caduceus",
    strands=("ps_raw", "ps_folded", "averaged", "fwd_only", "pair"),
    pooling=("mean", "max", "last"),
    to_vectors=_to_vectors,
    check=_check,
)
