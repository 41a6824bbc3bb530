"""What comes before the training loop: checks, conditioners, the model with fresh weights."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist

from brainfusion.alignment.batches import Batch
from brainfusion.alignment.conditioning import Conditioner
from brainfusion.alignment.config import AlignConfig
from brainfusion.alignment.genes.conditioning import GeneConditioner, describe_genes
from brainfusion.alignment.genes.tower import GeneBatch
from brainfusion.alignment.genes.vectors import GeneVectors
from brainfusion.alignment.initialise import find_start
from brainfusion.alignment.modalities import LEAST_TRAINING, LEAST_VALIDATION
from brainfusion.alignment.network import AlignmentModel, GeneSettings, Inputs, as_inputs
from brainfusion.runtime.distributed import Ranks
from brainfusion.runtime.errors import UserError, nearest
from brainfusion.runtime.logs import say

if TYPE_CHECKING:
    from brainfusion.alignment.losses.pair_ids import PairIds

SPLITS = ("train", "validation", "test")


def check(
    features: Mapping[str, np.ndarray | GeneVectors],
    labels: Sequence[str],
    config: AlignConfig,
    covariates: np.ndarray | None,
    present: Mapping[str, np.ndarray] | None = None,
) -> dict[str, np.ndarray]:
    """Rows of each split, once everything is known to fit."""
    if len(features) < 2:
        raise UserError(
            f"{len(features)} modalities: expected two or more, such as 'brain' and 'dna'."
        )
    has = everyone(features, len(labels)) | dict(present or {})
    _check_present(has, features, len(labels))
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
        if bad := int((~np.isfinite(x).all(axis=1) & has[name]).sum()):
            raise UserError(
                f"'{name}' features hold NaN or infinite values in {bad} of {len(x)} rows: "
                "make them again, or leave these people out."
            )
    _check_pool(features, config)
    if strange := sorted(set(labels) - set(SPLITS)):
        raise UserError(f"label '{strange[0]}': expected one of {', '.join(SPLITS)}.")
    rows = {split: np.flatnonzero(np.asarray(labels) == split) for split in SPLITS}
    for split, least in (("train", LEAST_TRAINING), ("validation", LEAST_VALIDATION)):
        most = max(
            int((has[first] & has[second])[rows[split]].sum())
            for first, second in combinations(features, 2)
        )
        if most < least:
            raise UserError(
                f"{most} {split} people with both modalities: expected at least "
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


def everyone(names: Iterable[str], n: int) -> dict[str, np.ndarray]:
    """Who has which modality where nobody lacks any: bool [n], all true."""
    return {name: np.ones(n, dtype=bool) for name in names}


def _check_present(
    present: Mapping[str, np.ndarray], features: Mapping[str, np.ndarray | GeneVectors], n: int
) -> None:
    for name, has in present.items():
        if name not in features:
            raise UserError(f"present: no modality '{name}'. {nearest(name, features)}")
        if np.shape(has) != (n,) or np.asarray(has).dtype != np.bool_:
            raise UserError(
                f"present['{name}'] is {np.asarray(has).dtype} of shape {np.shape(has)}: expected "
                f"bool ({n},), true for each person who has the modality."
            )


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
    present: Mapping[str, np.ndarray] | None = None,
) -> dict[str, Conditioner | GeneConditioner]:
    """A conditioner of each modality, fitted on `rows` (training people), the same on all ranks.

    Each is fitted on those of the rows who have the modality.
    """
    fitted: dict[str, Conditioner | GeneConditioner] = {}
    if ranks.is_main:
        how: dict[str, Any] = {
            "whiten": config.whiten,
            "shrinkage": config.shrinkage,
            "covariate_names": covariate_names,
        }
        together = config.dna_pool == "concat"
        for name, x in features.items():
            own = rows if present is None else rows[present[name][rows]]
            how["covariates"] = None if covariates is None else covariates[own]
            if isinstance(x, GeneVectors):
                n = config.n_components if together else config.gene_components
                fitted[name] = GeneConditioner.fit(
                    x.take(own), together=together, n_components=n, **how
                )
            else:
                fitted[name] = Conditioner.fit(x[own], n_components=config.n_components, **how)
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
    present: np.ndarray | None = None,
) -> Inputs:
    """The conditioned features of some people, as the model takes them; zeros for who lacks them.

    Args:
        conditioner: Of the modality.
        features: Of everybody.
        rows: Whose to take.
        covariates: Of everybody, where there are any.
        present: bool [n], of everybody: who has the modality; all if omitted.
    """
    has = np.ones(len(rows), dtype=bool) if present is None else present[rows]
    rows = rows[has]
    own = covariates[rows] if covariates is not None and conditioner.covariates else None
    if isinstance(conditioner, GeneConditioner):
        assert isinstance(features, GeneVectors)
        found = as_inputs(conditioner.transform(features.take(rows), own))
    else:
        assert isinstance(features, np.ndarray)
        found = as_inputs(conditioner.transform(features[rows], own))
    return found if has.all() else _spread(found, torch.from_numpy(has))


def _spread(inputs: Inputs, has: torch.Tensor) -> Inputs:
    """Rows to where `has` is true, zeros elsewhere."""
    if isinstance(inputs, GeneBatch):
        return GeneBatch(*(_spread(part, has) for part in inputs))  # type: ignore[arg-type]
    whole = inputs.new_zeros(len(has), *inputs.shape[1:])
    whole[has] = inputs
    return whole


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


def start(
    model: AlignmentModel, training: Batch, config: AlignConfig, ranks: Ranks, *, fresh: bool
) -> tuple[Batch, dict[str, float]]:
    """Give the projectors the weights that `config.init` says, the same on all ranks.

    Args:
        model: Has random weights, or those of a run that goes on.
        training: The training people.
        config: What to start from.
        ranks: Where this process stands.
        fresh: Write the start into the model; a run that goes on has its weights.

    Returns:
        The training people with the inputs to train on, and what was found.
    """
    if config.init != "rcca":
        return training, {}
    inputs, facts = dict(training.inputs), [{}]
    if ranks.is_main:
        groups = related(training.ids)
        found = find_start(training.inputs, training.present, config, groups=groups)
        inputs, facts = dict(found.inputs), [found.facts]
        if fresh:
            found.write(model)
    if ranks.world_size > 1:
        dist.broadcast_object_list(facts, src=0, device=ranks.device)
        # Rows of one rank may lie in memory as columns of another: what is sent is contiguous.
        tensors = {n: x.contiguous() for n, x in inputs.items() if isinstance(x, torch.Tensor)}
        for value in (*tensors.values(), *model.state_dict().values()):
            dist.broadcast(value, src=0)
        inputs |= tensors
    return dataclasses.replace(training, inputs=inputs), facts[0]


def related(ids: "PairIds | None") -> np.ndarray | None:
    """Groups of people who are no negatives of one another, directly or by others: int64 [n]."""
    if ids is None or ids.excluded is None:
        return None
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    columns = ids.excluded.cpu().numpy()
    n, sizes = len(columns), columns.max(axis=0) + 1
    # People and values are the nodes; who has a value hangs on it.
    rows, places = np.nonzero(columns >= 0)
    values = n + np.concatenate([[0], np.cumsum(sizes)])[places] + columns[rows, places]
    edges = (np.ones(len(rows)), (rows, values))
    graph = coo_array(edges, shape=(n + int(sizes.sum()),) * 2)
    return connected_components(graph, directed=False)[1][:n].astype(np.int64)


def peak_lr(config: AlignConfig, *, closed_form: bool) -> float:
    """The learning rate that is asked for, or what suits where the projectors start."""
    return config.lr or (3e-4 if closed_form else 1e-3)


def make_optimizer(model: AlignmentModel, config: AlignConfig, lr: float) -> torch.optim.AdamW:
    """AdamW with decay for matrices alone; each group's `relative_lr` multiplies the schedule."""
    # The logits of genes have a long way to go in few steps, and nothing to be decayed to but the
    # even attention that they start from: early stopping holds them.
    names = ("logits", "query")
    attention = [p for n, p in model.towers.named_parameters() if n.rsplit(".", 1)[-1] in names]
    rest = [p for p in model.parameters() if not any(p is a for a in attention)]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in rest if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in rest if p.ndim <= 1], "weight_decay": 0.0},
        {"params": attention, "weight_decay": 0.0, "relative_lr": config.attention_lr / lr},
    ]
    groups = [{"relative_lr": 1.0, **group} for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98))
