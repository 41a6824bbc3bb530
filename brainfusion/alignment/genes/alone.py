"""Embeddings of single genes: each shown alone, with all others of the person hidden.

This is `Alignment.embed` with a mask of one gene, without reading every gene for each. Where genes
stand side by side behind one PCA, a hidden gene is at its training mean: what is embedded is a
person who is average in all genes but one. Where genes are pooled, a hidden one counts as absent,
and the pool sees the one that is shown, whatever attention it gets among others.

Shape legend: n people, s genes, k components of a gene, o width of the shared space.
"""

from collections.abc import Collection, Iterator
from typing import Any

import numpy as np
import torch

from brainfusion.alignment.genes.conditioning import GeneArrays, GeneConditioner
from brainfusion.alignment.genes.vectors import Gene, GeneVectors
from brainfusion.alignment.model import Alignment
from brainfusion.alignment.network import as_inputs
from brainfusion.runtime.errors import UserError, nearest

_NUMBERS_AT_ONCE = 2**24


def each_gene_alone(
    alignment: Alignment,
    features: Any,
    covariates: np.ndarray | None = None,
    *,
    name: str = "dna",
    only: Collection[Gene] | None = None,
) -> Iterator[tuple[Gene, np.ndarray, np.ndarray]]:
    """The embedding of each gene of each person, gene after gene that varies.

    Args:
        alignment: A trained alignment.
        features: As for `Alignment.embed`.
        covariates: As for `Alignment.embed`.
        name: The modality.
        only: Genes to embed; all that vary among training people if omitted.

    Yields:
        The gene, the rows of the people who have it (int64 [m]), and float32 [m, o], rows of unit
        norm, in the order of these people.

    Raises:
        UserError: As `Alignment.embed`; the modality does not come as genes, or a gene of `only`
            that the model does not know or that does not vary.
    """
    conditioner = _conditioner(alignment, name)
    vectors = GeneVectors.coerce(features, models=conditioner.models, genes=conditioner.genes)
    # Checks all that can be wrong with the vectors, of one person: nothing else is read twice.
    conditioner.transform(vectors.take(np.arange(1)), _rows(covariates, np.arange(1)))
    wanted = _wanted(conditioner, only)
    place = {gene: i for i, gene in enumerate(vectors.genes)}
    mask = vectors.mask
    for shown, gene in enumerate(conditioner.used):
        if gene not in wanted:
            continue
        rows = np.flatnonzero(mask[:, place[gene]])
        step = max(_NUMBERS_AT_ONCE // _width(conditioner), 1)
        parts = [
            _embedded(alignment, conditioner, vectors, covariates, shown, rows[i : i + step], name)
            for i in range(0, len(rows), step)
        ]
        if parts:
            yield gene, rows, np.concatenate(parts)


def nothing_shown(alignment: Alignment, *, name: str = "dna") -> np.ndarray:
    """The embedding float32 [1, o] of a person all of whose genes are hidden.

    What a gene alone scores above this is what it tells.

    Raises:
        UserError: The modality does not come as genes.
    """
    conditioner = _conditioner(alignment, name)
    if conditioner.together:
        return _model(alignment, name, np.zeros((1, conditioner.dim_out), np.float32))
    return _model(alignment, name, _no_genes(conditioner, 1))


def known_genes(alignment: Alignment, *, name: str = "dna") -> tuple[Gene, ...]:
    """The genes that can be shown: those that vary among training people.

    Raises:
        UserError: The modality does not come as genes.
    """
    return _conditioner(alignment, name).used


def _embedded(
    alignment: Alignment,
    conditioner: GeneConditioner,
    vectors: GeneVectors,
    covariates: np.ndarray | None,
    shown: int,
    rows: np.ndarray,
    name: str,
) -> np.ndarray:
    """Of gene number `shown` of `used`, of people who have it."""
    gene = conditioner.used[shown]
    part = conditioner.parts[conditioner.genes.index(gene)]
    assert part is not None
    values = part.transform(vectors.take(rows).column(gene), _rows(covariates, rows))
    if conditioner.rotations is None:
        genes = _no_genes(conditioner, len(rows))
        genes.x[:, shown, : values.shape[1]] = values
        genes.mask[:, shown] = True
        return _model(alignment, name, genes)
    columns = list(zip(conditioner.used, conditioner.n_components, strict=True))
    first = sum(n for other, n in columns[:shown] if other.model == gene.model)
    own = slice(first, first + values.shape[1])
    blocks = []
    for model, axes in zip(conditioner.models, conditioner.rotations, strict=True):
        n_columns = sum(n for other, n in columns if other.model == model)
        block = np.zeros((len(rows), n_columns if axes is None else axes.shape[1]), np.float32)
        if model == gene.model and axes is None:
            block[:, own] = values
        elif model == gene.model and axes is not None:
            block += (values @ axes[own]).astype(np.float32)
        blocks.append(block)
    return _model(alignment, name, np.concatenate(blocks, axis=1))


def _model(alignment: Alignment, name: str, conditioned: np.ndarray | GeneArrays) -> np.ndarray:
    model = alignment.model.eval()
    inputs: Any = as_inputs(conditioned)
    with torch.no_grad():
        return model.embed(name, inputs.to(model.log_scale.device)).float().cpu().numpy()


def _no_genes(conditioner: GeneConditioner, n: int) -> GeneArrays:
    n_genes = len(conditioner.used)
    x = np.zeros((n, n_genes, max(conditioner.n_components)), np.float32)
    return GeneArrays(x, np.zeros((n, n_genes), bool))


def _width(conditioner: GeneConditioner) -> int:
    """Numbers that a person comes to a model with."""
    if conditioner.together:
        return conditioner.dim_out
    return len(conditioner.used) * max(conditioner.n_components)


def _wanted(conditioner: GeneConditioner, only: Collection[Gene] | None) -> set[Gene]:
    if only is None:
        return set(conditioner.used)
    for gene in only:
        if gene not in conditioner.used:
            names = [known.name for known in conditioner.used if known.model == gene.model]
            raise UserError(
                f"{gene.model} has no gene '{gene.name}' that varies in this model. "
                f"{nearest(gene.name, names[:20])}"
            )
    return set(only)


def _rows(covariates: np.ndarray | None, rows: np.ndarray) -> np.ndarray | None:
    return None if covariates is None else np.asarray(covariates)[rows]


def _conditioner(alignment: Alignment, name: str) -> GeneConditioner:
    conditioner = alignment.conditioners.get(name)
    if not isinstance(conditioner, GeneConditioner):
        raise UserError(
            f"'{name}' does not come as genes in this model, so none can be shown alone: align "
            "again from gene vectors."
        )
    return conditioner
