"""Embeddings with one gene hidden at a time, and vectors without it, to train again.

Where genes stand side by side behind one PCA, conditioning is linear in each gene: what a gene adds
is taken off, and each gene is read once. Where they are pooled, the gene is masked in the pool.
Vectors without a gene are a view: nothing is read or copied.

Shape legend: n people, s genes, o width of the shared space.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from brainfusion.alignment.genes.conditioning import GeneConditioner
from brainfusion.alignment.genes.vectors import Gene, GeneSource, GeneVectors
from brainfusion.alignment.model import Alignment, as_inputs
from brainfusion.runtime.errors import UserError


def without_each_gene(
    alignment: Alignment,
    features: Any,
    covariates: np.ndarray | None = None,
    *,
    name: str = "dna",
) -> Iterator[tuple[Gene, np.ndarray]]:
    """The embeddings of people with one gene hidden, gene after gene that varies.

    The same as `Alignment.embed(name, features, covariates, mask=...)` with that gene false.

    Args:
        alignment: A trained alignment.
        features: As for `Alignment.embed`.
        covariates: As for `Alignment.embed`.
        name: The modality.

    Yields:
        The gene and float32 [n, o], rows of unit norm.

    Raises:
        UserError: The modality does not come as genes, only one gene varies, or a person has no
            other gene than the hidden one.
    """
    conditioner = alignment.conditioners.get(name)
    if not isinstance(conditioner, GeneConditioner):
        raise UserError(
            f"'{name}' does not come as genes in this model, so none can be left out: align again "
            "from gene vectors."
        )
    if len(conditioner.used) < 2:
        raise UserError("only one gene varies: leaving it out would leave nothing to compare.")
    vectors = GeneVectors.coerce(features, models=conditioner.models, genes=conditioner.genes)
    model = alignment.model.eval()
    device = model.log_scale.device
    for gene, inputs in conditioner.without_each(vectors, covariates):
        with torch.no_grad():
            rows = model.embed(name, as_inputs(inputs).to(device))
        yield gene, rows.float().cpu().numpy()


def without_gene(genes: GeneVectors, gene: Gene) -> GeneVectors | None:
    """The same people without one gene; a model that has no other is left out.

    None where nothing is left.
    """
    sources: dict[str, GeneSource] = dict(genes.sources)
    source = sources[gene.model]
    kept = tuple(i for i, name in enumerate(source.genes) if name != gene.name)
    if kept:
        sources[gene.model] = _Some(source=source, kept=kept, mask=source.mask[:, list(kept)])
    else:
        del sources[gene.model]
    return GeneVectors(sources=sources, rows=genes.rows) if sources else None


@dataclass(frozen=True, kw_only=True, eq=False)
class _Some:
    """Some genes of a source."""

    source: GeneSource
    kept: tuple[int, ...]
    mask: np.ndarray

    @property
    def genes(self) -> tuple[str, ...]:
        return tuple(self.source.genes[i] for i in self.kept)

    @property
    def width(self) -> int:
        return self.source.width

    def column(self, gene: int, positions: np.ndarray) -> np.ndarray:
        return self.source.column(self.kept[gene], positions)
