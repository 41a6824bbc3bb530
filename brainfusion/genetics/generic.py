"""Every other table: models that need no conventions of their own, genotypes, scores.

DNABERT-2, Nucleotide Transformer and HyenaDNA are known by their rows in `models.REGISTRY`;
`generic` takes vectors of any width from anything, by the checkpoint's name that you give.

Genotype dosages and polygenic scores are the baseline that a DNA tower has to beat, and go through
the same store:

    dosages.csv, .tsv       a column of ids, and a column a variant (0 to 2)
    chr20.raw               as plink --export A writes it
    scores.sscore           as plink2 --score writes it

They are read as one "gene" called "all" that is as wide as there are variants or scores
(`genetics.wide`), and need no provenance.json. A row of zeros is a person without alternative
alleles, not an absent vector; a person with a missing value is masked, never imputed.
"""

from brainfusion.genetics.adapter import Adapter, plain_vectors

_STRANDS = ("fwd_only", "averaged", "concat", "pair")
_POOLING = ("mean", "max", "last", "cls", "separator")

GENERIC = Adapter(
    model="generic",
    strands=(*_STRANDS, "ps_folded", "none"),
    pooling=(*_POOLING, "none"),
    to_vectors=plain_vectors,
)
DNABERT2 = Adapter(model="dnabert2", strands=_STRANDS, pooling=_POOLING, to_vectors=plain_vectors)
NUCLEOTIDE_TRANSFORMER = Adapter(
    model="nucleotide-transformer", strands=_STRANDS, pooling=_POOLING, to_vectors=plain_vectors
)
HYENADNA = Adapter(model="hyenadna", strands=_STRANDS, pooling=_POOLING, to_vectors=plain_vectors)
DOSAGE = Adapter(
    model="dosage",
    strands=("none",),
    pooling=("none",),
    to_vectors=plain_vectors,
    is_sequence_model=False,
    defaults={"checkpoint": "dosage", "strands": "none", "pooling": "none", "level": "subject"},
)
PGS = Adapter(
    model="pgs",
    strands=("none",),
    pooling=("none",),
    to_vectors=plain_vectors,
    is_sequence_model=False,
    defaults={"checkpoint": "pgs", "strands": "none", "pooling": "none", "level": "subject"},
)
