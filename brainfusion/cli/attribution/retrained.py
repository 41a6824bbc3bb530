"""The same training without one gene, gene after gene, as the run itself was made.

Its method, settings, modalities, haplotypes, covariates and rule of negatives are those of the run;
whose DNA is alike is found anew among the genes that are left.
"""

import io
import tempfile
from collections.abc import Iterator
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import numpy as np

from brainfusion.alignment.config import AlignConfig
from brainfusion.alignment.genes.leave_out import without_gene
from brainfusion.alignment.genes.vectors import Gene, GeneVectors
from brainfusion.alignment.linear import fit_linear
from brainfusion.alignment.model import Alignment
from brainfusion.alignment.train import train
from brainfusion.cli.attribution.attributed import Attributed, scored
from brainfusion.cli.attribution.hidden import progress
from brainfusion.cli.negatives import pair_ids
from brainfusion.runtime import config as configs
from brainfusion.runtime.errors import UserError


def retrained(asked: Attributed) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Of each gene that varies its name and the vectors [t, k] of both sides, trained without it.

    Raises:
        UserError: The run is a fine-tuned one, or only one gene varies.
    """
    check_retrainable(asked)
    step = progress("training without each gene", len(asked.genes))
    for name in asked.people.dna:
        for gene in asked.conditioner(name).used:
            yield asked.unit(gene), *_without(asked, name, gene)
            step()


def check_retrainable(asked: Attributed) -> None:
    """Refuse what cannot be trained again.

    Raises:
        UserError: The run is a fine-tuned one, or only one gene varies.
    """
    if "finetune" in asked.alignment.info:
        raise UserError(
            f"--retrain: {asked.run.path} is a fine-tuned run, and its encoder has learnt from all "
            "genes: leave --retrain out, or give the alignment that it started from with --run."
        )
    if len(asked.genes) < 2:
        raise UserError("only one gene varies: leaving it out would leave nothing to compare.")


def _without(asked: Attributed, name: str, gene: Gene) -> tuple[np.ndarray, np.ndarray]:
    """Vectors of both sides' test people after training without one gene of a modality."""
    people = asked.people
    dna, present = dict(people.dna), dict(people.present)
    less = without_gene(dna[name], gene)
    if less is None:
        del dna[name], present[name]
    else:
        dna[name], present[name] = less, present[name] & less.mask.any(axis=1)
    features = {**people.brain, **dna}
    alignment = _trained(asked, features, dna, present)
    vectors = []
    for side, names in people.sides.items():
        embedded, has = {}, {}
        for one in (other for other in names if other in features):
            rows, x = asked.rows[present[one][asked.rows]], features[one]
            own = x.take(rows) if isinstance(x, GeneVectors) else x[rows]
            covariates = None if asked.covariates is None else asked.covariates[rows]
            embedded[one] = alignment.embed(one, own, covariates)
            has[one] = present[one][asked.rows]
        vectors.append(scored(alignment, side, embedded, has))
    return vectors[0], vectors[1]


def _trained(
    asked: Attributed,
    features: dict[str, np.ndarray | GeneVectors],
    dna: dict[str, GeneVectors],
    present: dict[str, np.ndarray],
) -> Alignment:
    """The alignment of other features by the run's own method; what it says is not repeated."""
    info = asked.alignment.info
    rule = info.get("meta", {}).get("negatives", "all")
    method = asked.alignment.model.settings.get("method")
    with tempfile.TemporaryDirectory() as folder, redirect_stderr(io.StringIO()):
        known: dict[str, Any] = {
            "config": configs.from_dict(AlignConfig, info["config"]),
            "run_dir": Path(folder),
            "covariates": asked.covariates,
            "covariate_names": asked.covariate_names,
        }
        labels = asked.people.labels
        if method is not None:
            return fit_linear(features, labels, method=method, **known).alignment
        ids = pair_ids(rule, asked.people.people, dna, present)
        return train(features, labels, present=present, ids=ids, **known).alignment
