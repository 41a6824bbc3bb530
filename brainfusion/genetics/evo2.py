"""Evo 2 (Brixi 2025; ArcInstitute/evo2 @53f1959): what people store of `return_embeddings`.

`model(input_ids, return_embeddings=True, layer_names=[...])` gives a dict {layer: [1, L, H]} in
bfloat16. Users pool it over the sequence and store, most often, one `.pt` a gene:

    evo2/OXT.pt             torch.save({"blocks.26": float32 tensor [n, H]})
    evo2/subjects.txt       one id a line, in row order
    evo2/provenance.json

Any other container of `genetics.files` will do as well. Layer names belong to the checkpoint:
`blocks.28.mlp.l3` does not exist in the 1B or the 20B, and `mlp.l1`, `mlp.l2` and `projections`
are not H wide. Where a file holds several layers, one must be named. The first 15 positions or so
are spikes (ArcInstitute/evo2#223), best left out of the pool and noted under `notes`.

Strands: the model promises nothing. "averaged" is the mean of the pooled forward and
reverse-complement vectors; "concat" (the official exon notebook) keeps both, 2H wide.
"""

import numpy as np

from brainfusion.genetics.adapter import Adapter, checked_vectors
from brainfusion.genetics.features import Provenance
from brainfusion.genetics.models import Checkpoint


def _to_vectors(
    raw: np.ndarray, provenance: Provenance, spec: Checkpoint, where: str
) -> tuple[np.ndarray, str]:
    return checked_vectors(raw, provenance, spec, where=where), ""


ADAPTER = Adapter(
    model="evo2",
    strands=("fwd_only", "averaged", "concat"),
    pooling=("mean", "max", "last"),
    to_vectors=_to_vectors,
)
