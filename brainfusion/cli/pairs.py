"""Pairs: the people who have both brain features and DNA, with everything known about them."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from brainfusion.alignment.gene_vectors import GeneVectors
from brainfusion.cli.workspace import Workspace, ensure_features, ensure_genetics, known_dna
from brainfusion.data.cohort import Cohort
from brainfusion.data.features import read_features
from brainfusion.runtime.errors import UserError
from brainfusion.runtime.files import read_json
from brainfusion.runtime.logs import say


@dataclass(frozen=True, kw_only=True, eq=False)
class Pairs:
    """Row-aligned brain features and gene vectors of the people who have both."""

    people: pl.DataFrame
    """Rows of subjects.parquet, one a pair."""
    brain: np.ndarray
    """float32 [pair, width]."""
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


def dna_models(names: Sequence[str]) -> tuple[str, ...]:
    """The DNA models that make one DNA side, in the order of the adapters, whatever was typed.

    Raises:
        UserError: None, an unknown one, or one named twice.
    """
    from brainfusion.genetics import ADAPTERS

    if not names:
        raise UserError("--dna names no model: expected one or several, such as evo2 caduceus.")
    for name in names:
        known_dna(name)
    if twice := [name for name in names if list(names).count(name) > 1]:
        raise UserError(f"--dna names {twice[0]} twice: expected each model once.")
    return tuple(name for name in ADAPTERS if name in names)


def dna_name(models: Sequence[str]) -> str:
    """What a DNA side is called in folders and reports: its models joined by +."""
    return "+".join(models)


def load_pairs(
    workspace: Workspace,
    cohort: Cohort,
    *,
    brain: str,
    dna: Sequence[str],
    haplotypes: str = "mean",
) -> Pairs:
    """Join by id; nothing is dropped without being counted.

    Args:
        workspace: Where features are.
        cohort: Whose people count.
        brain: Name of the brain features.
        dna: DNA models; people need a gene of each.
        haplotypes: How stores that keep both are read: "mean", "sum" or "mean-absdiff".

    Raises:
        UserError: Nobody has both, or a store holds one vector for both haplotypes.
    """
    from brainfusion.genetics import read

    features = read_features(ensure_features(workspace, brain))
    tables = {
        model: read(model, ensure_genetics(workspace, model)).with_haplotypes(haplotypes)
        for model in dna
    }
    if (made_of := features.provenance.get("cohort_hash")) not in (None, cohort.hash):
        say(
            f"warning: features '{brain}' were made from another state of the cohort ({made_of}, "
            f"now {cohort.hash}): make them again with 'brainfusion embed --model {brain}'."
        )
    carriers = {
        model: {t.subjects[row] for row in np.flatnonzero(t.mask.any(axis=1))}
        for model, t in tables.items()
    }
    known, with_brain = set(cohort.subjects["subject"]), set(features.subjects)
    both, flow = _join(known, with_brain, carriers, brain=brain)
    listed = {subject for table in tables.values() for subject in table.subjects}
    if n_empty := len((known & listed) - set().union(*carriers.values())):
        say(f"without a vector of any gene, and left out: {n_empty} of {len(known & listed)}.")
    if not both:
        raise UserError(
            f"nobody has both {brain} features and {dna_name(dna)} embeddings: the ids of the "
            "tables do not meet. Compare them with subjects.parquet (leading zeros, suffixes, "
            "numbers as text)."
        )
    people = cohort.subjects.filter(pl.col("subject").is_in(list(both)))
    subjects = people["subject"].to_list()
    splits = cohort.splits()
    return Pairs(
        people=people,
        brain=features.select(subjects),
        genes=GeneVectors.of({model: t.select(subjects) for model, t in tables.items()}),
        labels=splits.label(subjects),
        provenance={
            "brain": features.provenance,
            "dna": {model: t.provenance.to_dict() for model, t in tables.items()},
            "haplotypes": haplotypes,
            "splits_hash": splits.hash,
            "cohort_hash": cohort.hash,
        },
        flow=flow,
        rows=_rows(cohort, subjects),
    )


def _join(
    known: set[str], with_brain: set[str], carriers: dict[str, set[str]], *, brain: str
) -> tuple[set[str], list[dict[str, Any]]]:
    """Who has all, and the counts of everyone else; they are said, too."""
    dna = dna_name(list(carriers))
    with_dna = set.intersection(*carriers.values())
    both = known & with_brain & with_dna
    unknown = with_brain.union(*carriers.values()) - known
    each = [
        {"step": f"with {model} embeddings", "n": len(known & people)}
        for model, people in carriers.items()
    ]
    if len(each) > 1:
        say(
            f"{dna}: {', '.join(str(row['n']) + ' people ' + row['step'] for row in each)}; "
            f"{len(known & with_dna)} have all."
        )
    flow = [
        {"step": "people in the cohort", "n": len(known)},
        {"step": "with brain features", "n": len(known & with_brain)},
        *(each if len(each) > 1 else []),
        {"step": "with DNA embeddings", "n": len(known & with_dna)},
        {"step": "with both: pairs", "n": len(both)},
        {"step": "in a table but not in the cohort", "n": len(unknown)},
    ]
    say(
        f"pairs: {len(both)} people have {brain} features and {dna} embeddings; "
        f"{len(known & with_brain - with_dna)} only brain, {len(known & with_dna - with_brain)} "
        f"only DNA, {len(unknown)} unknown to the cohort."
    )
    return both, flow


def read_haplotypes(run_dir: Path) -> str:
    """How an alignment run read the two haplotypes of its people."""
    summary = read_json(run_dir / "summary.json")
    return summary["meta"].get("provenance", {}).get("haplotypes", "mean")


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
