"""What comes before the training loop: checks, conditioners, the model with fresh weights."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch.distributed as dist

from brainfusion.alignment.conditioning import Conditioner
from brainfusion.alignment.config import AlignConfig
from brainfusion.alignment.gene_conditioning import GeneConditioner, describe_genes
from brainfusion.alignment.gene_vectors import GeneVectors
from brainfusion.alignment.model import AlignmentModel, GeneSettings, Inputs, as_inputs
from brainfusion.runtime.distributed import Ranks
from brainfusion.runtime.errors import UserError
from brainfusion.runtime.logs import say

SPLITS = ("train", "validation", "test")


def check(
    features: Mapping[str, np.ndarray | GeneVectors],
    labels: Sequence[str],
    config: AlignConfig,
    covariates: np.ndarray | None,
) -> dict[str, np.ndarray]:
    """Rows of each split, once everything is known to fit."""
    if len(features) != 2:
        raise UserError(f"{len(features)} modalities: expected two, such as 'brain' and 'dna'.")
    for name, x in features.items():
        if not name.isidentifier():
            raise UserError(f"modality '{name}': expected letters, digits and _ only.")
        if isinstance(x, GeneVectors):
            if len(x) != len(labels):
                raise UserError(
                    f"'{name}' gene vectors are those of {len(x)} people: expected one row for "
                    f"each of the {len(labels)} labels, in the same order."
                )
            continue
        if x.ndim != 2 or len(x) != len(labels):
            raise UserError(
                f"'{name}' features have shape {x.shape}: expected one row for each of the "
                f"{len(labels)} labels, in the same order."
            )
        if bad := int((~np.isfinite(x).all(axis=1)).sum()):
            raise UserError(
                f"'{name}' features hold NaN or infinite values in {bad} of {len(x)} rows: "
                "make them again, or leave these people out."
            )
    _check_pool(features, config)
    if strange := sorted(set(labels) - set(SPLITS)):
        raise UserError(f"label '{strange[0]}': expected one of {', '.join(SPLITS)}.")
    rows = {split: np.flatnonzero(np.asarray(labels) == split) for split in SPLITS}
    for split, least in (("train", 8), ("validation", 4)):
        if len(rows[split]) < least:
            raise UserError(
                f"{len(rows[split])} {split} people with both modalities: expected at least "
                f"{least}. Check that both were made from the same cohort."
            )
    if bool(config.residualise) != (covariates is not None):
        raise UserError(
            "residualise names columns but no covariates were given, or the reverse: make them "
            "with design_matrix(subjects, config.residualise)."
        )
    if covariates is not None and len(covariates) != len(labels):
        raise UserError(
            f"covariates have {len(covariates)} rows: expected {len(labels)}, one a person."
        )
    return rows


def _check_pool(features: Mapping[str, np.ndarray | GeneVectors], config: AlignConfig) -> None:
    """Refuse or announce what the settings of genes cannot do."""
    has_genes = any(isinstance(x, GeneVectors) for x in features.values())
    if config.dna_pool != "concat" and not has_genes:
        raise UserError(
            f"dna_pool={config.dna_pool!r} pools genes, but no modality comes as gene vectors: "
            "give GeneVectors, or use dna_pool='concat'."
        )
    untouched = ("gene_components", "gene_width", "attention_lr")
    if config.dna_pool in ("mean", "max"):
        untouched = ("attention_lr",)
    if config.dna_pool == "attention":
        return
    fields = {f.name: f.default for f in dataclasses.fields(AlignConfig)}
    for name in untouched:
        if getattr(config, name) != fields[name]:
            say(f"warning: {name} has no effect with dna_pool={config.dna_pool!r}.")


def fit_conditioners(
    features: Mapping[str, np.ndarray | GeneVectors],
    rows: np.ndarray,
    config: AlignConfig,
    covariates: np.ndarray | None,
    covariate_names: Sequence[str],
    ranks: Ranks,
) -> dict[str, Conditioner | GeneConditioner]:
    """A conditioner of each modality, fitted on `rows` (training people), the same on all ranks."""
    fitted: dict[str, Conditioner | GeneConditioner] = {}
    if ranks.is_main:
        how: dict[str, Any] = {
            "whiten": config.whiten,
            "shrinkage": config.shrinkage,
            "covariates": None if covariates is None else covariates[rows],
            "covariate_names": covariate_names,
        }
        together = config.dna_pool == "concat"
        for name, x in features.items():
            if isinstance(x, GeneVectors):
                n = config.n_components if together else config.gene_components
                fitted[name] = GeneConditioner.fit(
                    x.take(rows), together=together, n_components=n, **how
                )
            else:
                fitted[name] = Conditioner.fit(x[rows], n_components=config.n_components, **how)
    if ranks.world_size > 1:
        # Two machines may round differently: all ranks use the axes that one of them found.
        box: list[Any] = [fitted]
        dist.broadcast_object_list(box, src=0, device=ranks.device)
        fitted = box[0]
    if ranks.is_main:
        for name, conditioner in fitted.items():
            if isinstance(conditioner, GeneConditioner):
                describe_genes(conditioner, name=name)
            if conditioner.n_dropped:
                n, d = conditioner.n_dropped, conditioner.dim_in
                say(f"{name}: {n} of {d} columns do not vary among training people: left out.")
    return fitted


def conditioned(
    conditioner: Conditioner | GeneConditioner,
    features: np.ndarray | GeneVectors,
    rows: np.ndarray,
    covariates: np.ndarray | None,
) -> Inputs:
    """The conditioned features of some people, as the model takes them."""
    own = covariates[rows] if covariates is not None and conditioner.covariates else None
    if isinstance(conditioner, GeneConditioner):
        assert isinstance(features, GeneVectors)
        return as_inputs(conditioner.transform(features.take(rows), own))
    assert isinstance(features, np.ndarray)
    return as_inputs(conditioner.transform(features[rows], own))


def make_model(
    config: AlignConfig, conditioners: Mapping[str, Conditioner | GeneConditioner]
) -> AlignmentModel:
    """The model with fresh weights, from torch's random state."""
    dims_in = {name: conditioner.dim_out for name, conditioner in conditioners.items()}
    genes: dict[str, GeneSettings] = {}
    for name, conditioner in conditioners.items():
        if isinstance(conditioner, GeneConditioner) and not conditioner.together:
            assert config.dna_pool != "concat"
            n_components = list(conditioner.n_components)
            genes[name] = {"n_components": n_components, "pool": config.dna_pool}
            dims_in[name] = config.gene_width
    return AlignmentModel(
        dims_in,
        genes=genes,
        dim_out=config.dim_out,
        dim_hidden=config.dim_hidden,
        dropout=config.dropout,
        init_scale=config.init_scale,
        min_scale=config.min_scale,
        max_scale=config.max_scale,
        init_bias=config.init_bias if config.loss == "siglip" else None,
    )
