"""Stand-ins for DNA language models: frozen random networks that read the people's sequences.

A haplotype is embedded once, whoever carries it; a person's gene is the mean of the two haplotypes'
vectors, pooled over positions in float32. Files are written as each model's users write them
(`docs/formats.md`), and their provenance says that they are simulated.

Shapes: u haplotypes, l base pairs, t tokens, h width, n people, g genes, f founders.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from brainfusion.runtime.files import write_json

WIDTH = 64
_SEEDS = {"evo2": 1234, "caduceus": 1235, "generator": 1236}
"""Of the frozen weights: part of the stand-in, so a cohort's seed does not change them."""
_NOTE = "A frozen random network in place of the model; the people and their DNA are simulated."


@dataclass(frozen=True, kw_only=True, eq=False)
class DNAEmbeddings:
    """Vectors of every person and gene, float32 [n, g, h]."""

    evo2: np.ndarray
    """Single-base model, forward and reverse-complement strand averaged."""
    generator: np.ndarray
    """6-mer model, forward strand."""
    caduceus_forward: np.ndarray
    """Another single-base model, forward strand."""
    caduceus_reverse: np.ndarray
    """The same on the reverse-complement strand."""


def embed_people(sequences: np.ndarray, haplotypes: np.ndarray) -> DNAEmbeddings:
    """Embed the founders' sequences [g, f, l] and average those that a person carries [n, 2, g]."""
    n_genes, n_founders, _ = sequences.shape
    by_founder = {
        name: np.empty((n_genes, n_founders, WIDTH), dtype=np.float32)
        for name in ("evo2", "generator", "caduceus_forward", "caduceus_reverse")
    }
    for gene in range(n_genes):
        forward, reverse = embed_strands(sequences[gene], seed=_SEEDS["evo2"])
        by_founder["evo2"][gene] = 0.5 * (forward + reverse)
        forward, reverse = embed_strands(sequences[gene], seed=_SEEDS["caduceus"])
        by_founder["caduceus_forward"][gene] = forward
        by_founder["caduceus_reverse"][gene] = reverse
        by_founder["generator"][gene] = embed_6mers(sequences[gene], seed=_SEEDS["generator"])
    genes = np.arange(n_genes)
    first, second = haplotypes[:, 0], haplotypes[:, 1]
    return DNAEmbeddings(
        **{
            name: 0.5 * (vectors[genes, first] + vectors[genes, second])
            for name, vectors in by_founder.items()
        }
    )


def embed_strands(sequences: np.ndarray, *, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Pool a frozen random convolutional network over either strand.

    Args:
        sequences: Bases 0 to 3 [u, l].
        seed: Of the weights.

    Returns:
        Mean over positions of the forward strand and of the reverse complement, each [u, h]. The
        reverse complement of a sequence gives the same two vectors, exchanged.
    """
    forward = _single_base_network(sequences, seed=seed)
    return forward, _single_base_network(3 - sequences[:, ::-1], seed=seed)


def embed_6mers(sequences: np.ndarray, *, seed: int) -> np.ndarray:
    """Pool a frozen random network over non-overlapping 6-mers [u, h].

    The last, separator token reads all others through one head of even attention: their mean.
    """
    tokens = sequences.reshape(len(sequences), -1, 6) @ (4 ** np.arange(6)[::-1])  # (u, t)
    rng = np.random.default_rng(seed)
    table = rng.standard_normal((4**6, WIDTH), dtype=np.float32)
    hidden = np.tanh(table[tokens])
    for dilation in (1, 3):
        hidden = hidden + np.tanh(_convolve(hidden, _weights(rng, 3, WIDTH), dilation=dilation))
    return hidden.mean(axis=1, dtype=np.float32)


def _single_base_network(sequences: np.ndarray, *, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    one_hot = np.eye(4, dtype=np.float32)[sequences]  # (u, l, 4)
    hidden = np.tanh(2 * _convolve(one_hot, _weights(rng, 7, 4), dilation=1))
    for dilation in (4, 16):
        hidden = hidden + np.tanh(_convolve(hidden, _weights(rng, 3, WIDTH), dilation=dilation))
    return hidden.mean(axis=1, dtype=np.float32)


def _weights(rng: np.random.Generator, n_taps: int, width_in: int) -> np.ndarray:
    scale = np.float32(1 / np.sqrt(n_taps * width_in))
    return scale * rng.standard_normal((n_taps, width_in, WIDTH), dtype=np.float32)


def _convolve(x: np.ndarray, weights: np.ndarray, *, dilation: int) -> np.ndarray:
    """Dilated convolution over the second axis, zeros beyond the ends: [u, l, in] -> [u, l, h]."""
    length = x.shape[1]
    out = np.zeros((*x.shape[:2], weights.shape[2]), dtype=np.float32)
    for tap, weight in enumerate(weights):
        shift = (tap - len(weights) // 2) * dilation
        low, high = max(0, -shift), min(length, length - shift)
        if low < high:
            out[:, low:high] += x[:, low + shift : high + shift] @ weight
    return out


def write_native(
    folder: Path, embeddings: DNAEmbeddings, *, subjects: Sequence[str], genes: Sequence[str]
) -> None:
    """Write `folder`/evo2, generator and caduceus, each in its model's own form."""
    _write_evo2(folder / "evo2", embeddings.evo2, subjects, genes)
    _write_generator(folder / "generator", embeddings.generator, subjects, genes)
    raw = fold_inverse(embeddings.caduceus_forward, embeddings.caduceus_reverse)
    _write_caduceus(folder / "caduceus", raw, subjects, genes)


def fold_inverse(forward: np.ndarray, reverse: np.ndarray) -> np.ndarray:
    """Strand-specific pools [..., h] as Caduceus-PS stores them [..., 2h].

    The second half holds the reverse strand with its channels reversed, so that
    `0.5 * (v[..., :h] + v[..., h:][..., ::-1])` does not depend on the strand.
    """
    return np.concatenate([forward, reverse[..., ::-1]], axis=-1)


def _write_evo2(
    folder: Path, vectors: np.ndarray, subjects: Sequence[str], genes: Sequence[str]
) -> None:
    import torch

    folder.mkdir(parents=True)
    layer = "blocks.26"
    for index, gene in enumerate(genes):
        tensor = torch.from_numpy(np.ascontiguousarray(vectors[:, index]))
        torch.save({layer: tensor}, folder / f"{gene}.pt")
    (folder / "subjects.txt").write_text("".join(f"{s}\n" for s in subjects), encoding="utf-8")
    write_json(folder / "provenance.json", _provenance("evo2", layer=layer, pooling="mean"))


def _write_generator(
    folder: Path, vectors: np.ndarray, subjects: Sequence[str], genes: Sequence[str]
) -> None:
    folder.mkdir(parents=True)
    np.savez(
        folder / "embeddings.npz",
        embeddings=vectors,
        subjects=np.asarray(subjects),
        genes=np.asarray(genes),
    )
    provenance = _provenance(
        "generator", layer="last", pooling="separator", strands="fwd_only", token_unit="6-mer"
    )
    write_json(folder / "provenance.json", provenance)


def _write_caduceus(
    folder: Path, vectors: np.ndarray, subjects: Sequence[str], genes: Sequence[str]
) -> None:
    import polars as pl
    import pyarrow as pa

    folder.mkdir(parents=True)
    n_people, n_genes, width = vectors.shape
    n_rows = n_people * n_genes
    offsets = pa.array(np.arange(n_rows + 1, dtype=np.int64) * width)
    lists = pa.LargeListArray.from_arrays(offsets, pa.array(vectors.reshape(-1)))
    table = pl.DataFrame(
        {
            "eid": np.repeat(np.asarray(subjects), n_genes),
            "gene_id": np.tile(np.asarray(genes), n_people),
            "embedding": pl.from_arrow(lists),
            "source_model": ["simulated"] * n_rows,
            "layer": ["last"] * n_rows,
        }
    )
    table.write_parquet(folder / "embeddings.parquet", compression="uncompressed")
    provenance = _provenance("caduceus", layer="last", pooling="mean", strands="ps_raw")
    write_json(folder / "provenance.json", provenance)


def _provenance(
    model: str,
    *,
    layer: str,
    pooling: str,
    strands: str = "averaged",
    token_unit: str = "bp",
) -> dict[str, str | bool]:
    return {
        "model": model,
        "checkpoint": "simulated",
        "layer": layer,
        "pooling": pooling,
        "strands": strands,
        "level": "gene",
        "dtype": "float32",
        "token_unit": token_unit,
        "reference": "simulated",
        "sequence": "personal",
        "simulated": True,
        "notes": _NOTE,
    }
