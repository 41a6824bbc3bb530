"""A store once more, as the model's own users keep their embeddings; `brainfusion import` reads it.

    evo2         one `.pt` a gene, {layer: float32 [n, 2, H]}, and subjects.txt
    generator    embeddings.npy, float32 [n, g, 2, H], subjects.txt and genes.txt
    caduceus     embeddings.parquet, a row a person, gene and haplotype

with provenance.json beside. Vectors that the store masks are nan. Haplotypes that the store has
merged have no axis.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from brainfusion.genetics.features import GeneticFeatures
from brainfusion.genetics.store import open_store
from brainfusion.genetics.vectors import StoredVectors
from brainfusion.runtime.errors import UserError
from brainfusion.runtime.files import atomic_folder, write_json, write_text

_BLOCK_ROWS = 1024
_MARK = "provenance.json"


def write_native(folder: Path, store: Path) -> None:
    """Write a store in its model's own form, in place of an earlier one.

    Raises:
        UserError: The folder holds other things, or the model has no form of its own here.
    """
    features = open_store(store)
    model = features.provenance.model
    writers = {"evo2": _write_pt, "generator": _write_npy, "caduceus": _write_parquet}
    if model not in writers:
        raise UserError(f"{store}: no native form for '{model}'; known: {', '.join(writers)}.")
    if folder.exists() and any(folder.iterdir()) and not (folder / _MARK).exists():
        raise UserError(f"{folder} holds other things than an earlier run: move them away.")
    with atomic_folder(folder) as aside:
        writers[model](aside, features)
        values = {**features.provenance.to_dict(), "haplotypes": features.n_haplotypes, "steps": []}
        write_json(aside / _MARK, values)


def _write_pt(folder: Path, features: GeneticFeatures) -> None:
    import torch

    for gene, name in enumerate(features.genes):
        vectors = np.concatenate([block[:, 0] for block in _blocks(features, gene)])
        layer = features.provenance.layer or "last"
        torch.save({layer: torch.from_numpy(_merged(vectors))}, folder / f"{name}.pt")
    write_text(folder / "subjects.txt", "\n".join(features.subjects) + "\n")


def _write_npy(folder: Path, features: GeneticFeatures) -> None:
    n, p, width = features.n_subjects, features.n_haplotypes, features.width
    pair = (2,) if p == 2 else ()
    array = np.lib.format.open_memmap(
        folder / "embeddings.npy", mode="w+", dtype=np.float32,
        shape=(n, features.n_genes, *pair, width),
    )  # fmt: skip
    for gene in range(features.n_genes):
        start = 0
        for block in _blocks(features, gene):
            array[start : start + len(block), gene] = _merged(block[:, 0])
            start += len(block)
    array.flush()
    write_text(folder / "subjects.txt", "\n".join(features.subjects) + "\n")
    write_text(folder / "genes.txt", "\n".join(features.genes) + "\n")


def _write_parquet(folder: Path, features: GeneticFeatures) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    width, said = features.width, features.provenance
    kind = pa.list_(pa.float32(), width)
    names = ("eid", "gene_id", "haplotype", "embedding", "source_model", "layer")
    kinds = (pa.string(), pa.string(), pa.int8(), kind, pa.string(), pa.string())
    schema = pa.schema(list(zip(names, kinds, strict=True)))
    with pq.ParquetWriter(folder / "embeddings.parquet", schema) as writer:
        for gene, name in enumerate(features.genes):
            start = 0
            for block in _blocks(features, gene):
                subjects = features.subjects[start : start + len(block)]
                start += len(block)
                p = block.shape[2]
                n_rows = len(block) * p
                flat = pa.array(np.ascontiguousarray(block).reshape(-1))
                columns = [
                    pa.array([subject for subject in subjects for _ in range(p)]),
                    pa.array([name] * n_rows),
                    pa.array(list(range(1, p + 1)) * len(block), pa.int8()),
                    pa.FixedSizeListArray.from_arrays(flat, width),
                    pa.array([said.checkpoint] * n_rows),
                    pa.array([said.layer] * n_rows),
                ]
                writer.write_table(pa.Table.from_arrays(columns, schema=schema))


def _blocks(features: GeneticFeatures, gene: int) -> Iterator[np.ndarray]:
    """float32 [r, 1, p, w] of all people of a gene, nan where masked."""
    one = features.select(features.subjects, [features.genes[gene]])
    assert isinstance(one.vectors, StoredVectors)
    for start in range(0, features.n_subjects, _BLOCK_ROWS):
        rows = np.arange(start, min(start + _BLOCK_ROWS, features.n_subjects))
        block = one.vectors.haplotypes(rows)
        block[~features.mask[rows, gene]] = np.nan
        yield block


def _merged(vectors: np.ndarray) -> np.ndarray:
    """[r, p, w] without the axis of haplotypes, where there is only one."""
    return vectors[:, 0] if vectors.shape[1] == 1 else vectors
