"""Evo 2 (Brixi 2025; ArcInstitute/evo2 @53f1959): what people store of `return_embeddings`.

`model(input_ids, return_embeddings=True, layer_names=[...])` gives a dict {layer: [1, L, H]} in
bfloat16. Users pool it over the sequence and store, most often, one `.pt` a gene:

    evo2/OXT.pt             torch.save({"blocks.26": float32 tensor [n, H]})
    evo2/subjects.txt       one id a line, in row order
    evo2/provenance.json

Any other container of `genetics.files` will do as well. Layer names belong to the checkpoint:
`blocks.28.mlp.l3` does not exist in the 1B or the 20B, and `mlp.l1`, `mlp.l2` and `projections`
are not H wide. Where a file holds several layers, one must be named.

The dicts themselves, one a person and gene, are read with "level": "token", "special_tokens": [0,
0] ([1, 0] after prepend_bos) and "files": "{subject}/{gene}", and pooled in float32. The first 15
positions or so are spikes (ArcInstitute/evo2#223): "trim_left": 15 leaves them out.

Strands: the model promises nothing. "averaged" is the mean of the pooled forward and
reverse-complement vectors; "pair" files hold both, and are averaged here; "concat" (the official
exon notebook) keeps both, 2H wide.
"""

from brainfusion.genetics.adapter import Adapter, plain_vectors

ADAPTER = Adapter(
    model="evo2",
    strands=("fwd_only", "averaged", "concat", "pair"),
    pooling=("mean", "max", "last"),
    to_vectors=plain_vectors,
)
