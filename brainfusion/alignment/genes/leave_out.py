"""Embeddings with one gene hidden at a time, without training again (leave one gene out).

Where genes stand side by side behind one PCA, conditioning is linear in each gene: what a gene adds
is taken off, and each gene is read once. Where they are pooled, the gene is masked in the pool.

Shape legend: n people, s genes, o width of the shared space.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from brainfusion.alignment.genes.conditioning import GeneConditioner
from brainfusion.alignment.genes.vectors import Gene, GeneVectors
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
