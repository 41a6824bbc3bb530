"""Pairs: the people who have both brain features and DNA, with everything known about them.

A side may have several modalities, which stand side by side in a name, too: `brainjepa,brainlm` are
two brain modalities, `evo2,caduceus` are two of DNA, and `evo2+caduceus` is one, whose genes are
those of both models.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import polars as pl

from brainfusion.alignment.genes.vectors import GeneVectors
from brainfusion.cli.modalities import Tables, load_tables
from brainfusion.cli.modalities import dna_models as dna_models
from brainfusion.cli.modalities import dna_name as dna_name
from brainfusion.cli.workspace import Workspace
from brainfusion.data.cohort import Cohort


@dataclass(frozen=True, kw_only=True, eq=False)
class Pairs:
    """Row-aligned brain features and gene vectors of the people who have all that was asked for."""

    people: pl.DataFrame
    """Rows of subjects.parquet, one a pair."""
    brain: np.ndarray
    """float32 [pair, width]; of several encoders, side by side."""
    genes: GeneVectors
    """Of all DNA models."""
    labels: list[str]
    """train, validation or test."""
    provenance: dict[str, Any]
    flow: list[dict[str, Any]]
    """Who was dropped, and why: counts only."""
    rows: list[list[int]]
    """The recordings of each pair's person, as rows of the index."""

    @property
    def subjects(self) -> list[str]:
        """Ids, in row order."""
        return self.people["subject"].to_list()

    @cached_property
    def dna(self) -> np.ndarray:
        """All genes of all models side by side, float32 [pair, gene x width].

        A missing gene is filled with its mean over training people, who may be looked at.
        """
        training = np.flatnonzero(np.asarray(self.labels) == "train")
        return self.genes.concatenated(known_from=training)

    @property
    def families(self) -> list[str]:
        """The family of each row; people without one are their own."""
        return families_of(self.people)


def families_of(people: pl.DataFrame) -> list[str]:
    """The family of each person; people without one are their own."""
    alone = pl.concat_str(pl.lit("alone:"), pl.col("subject"))
    if "family" not in people.columns:
        return people.select(alone).to_series().to_list()
    return people.select(pl.coalesce(pl.col("family"), alone)).to_series().to_list()


def load_pairs(
    workspace: Workspace,
    cohort: Cohort,
    *,
    brain: str | Sequence[str],
    dna: Sequence[str],
    haplotypes: str = "mean",
) -> Pairs:
    """Join by id; nothing is dropped without being counted.

    Args:
        workspace: Where features are.
        cohort: Whose people count.
        brain: Name of the brain features, or names; people need each.
        dna: DNA modalities; people need a gene of each model.
        haplotypes: How stores that keep both are read: "mean", "sum" or "mean-absdiff".

    Raises:
        UserError: Nobody has all, or a store holds one vector for both haplotypes.
    """
    names = [brain] if isinstance(brain, str) else brain
    tables = load_tables(workspace, cohort, brain=names, dna=dna, haplotypes=haplotypes)
    return complete(tables, cohort)


def complete(tables: Tables, cohort: Cohort) -> Pairs:
    """The people who have every modality of `tables`; how many, and why, is said."""
    people, flow = tables.join(cohort, needed=all)
    subjects = people["subject"].to_list()
    features = [table.select(subjects) for table in tables.brain.values()]
    genes = {model: t.select(subjects) for model, t in tables.models.items()}
    return Pairs(
        people=people,
        brain=features[0] if len(features) == 1 else np.concatenate(features, axis=1),
        genes=GeneVectors.of(genes),
        labels=cohort.splits().label(subjects),
        provenance=tables.provenance(cohort),
        flow=flow,
        rows=_rows(cohort, subjects),
    )


def connectomes(cohort: Cohort, pairs: Pairs) -> np.ndarray:
    """Fisher-z Pearson FC of each pair's person, the mean over their recordings.

    Pairs of parcels that a person lacks get the mean of the training people.
    """
    from brainfusion.eval.baselines import connectome, fill_missing

    flat = [row for rows in pairs.rows for row in rows]
    owner = np.repeat(np.arange(len(pairs.rows)), [len(rows) for rows in pairs.rows])
    single = connectome(cohort.recordings, flat)
    if len(flat) == len(pairs.rows):
        mean = single
    else:
        mean = np.stack([np.nanmean(single[owner == i], axis=0) for i in range(len(pairs.rows))])
    return fill_missing(mean, np.array(pairs.labels) == "train")


def _rows(cohort: Cohort, subjects: list[str]) -> list[list[int]]:
    rows: dict[str, list[int]] = {}
    for row, subject in enumerate(cohort.recordings.index["subject"]):
        rows.setdefault(subject, []).append(row)
    return [rows.get(subject, []) for subject in subjects]
