"""Pairs: the people who have both brain features and DNA, with everything known about them."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl

from brainfusion.cli.workspace import Workspace, ensure_features, ensure_genetics
from brainfusion.data.cohort import Cohort
from brainfusion.data.features import read_features
from brainfusion.runtime.errors import UserError
from brainfusion.runtime.logs import say


@dataclass(frozen=True, kw_only=True, eq=False)
class Pairs:
    """Row-aligned brain features and DNA vectors of the people who have both."""

    people: pl.DataFrame
    """Rows of subjects.parquet, one a pair."""
    brain: np.ndarray
    """float32 [pair, width]."""
    dna: np.ndarray
    """float32 [pair, gene x width]."""
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


def load_pairs(workspace: Workspace, cohort: Cohort, *, brain: str, dna: str) -> Pairs:
    """Join by id; nothing is dropped without being counted.

    Raises:
        UserError: Nobody has both.
    """
    from brainfusion.genetics import read

    features = read_features(ensure_features(workspace, brain))
    genetics = read(dna, ensure_genetics(workspace, dna))
    if (made_of := features.provenance.get("cohort_hash")) not in (None, cohort.hash):
        say(
            f"warning: features '{brain}' were made from another state of the cohort ({made_of}, "
            f"now {cohort.hash}): make them again with 'brainfusion embed --model {brain}'."
        )
    known, with_brain, with_dna = (
        set(cohort.subjects["subject"]),
        set(features.subjects),
        set(genetics.subjects),
    )
    both = known & with_brain & with_dna
    flow = [
        {"step": "people in the cohort", "n": len(known)},
        {"step": "with brain features", "n": len(known & with_brain)},
        {"step": "with DNA embeddings", "n": len(known & with_dna)},
        {"step": "with both: pairs", "n": len(both)},
        {"step": "in a table but not in the cohort", "n": len((with_brain | with_dna) - known)},
    ]
    say(
        f"pairs: {len(both)} people have {brain} features and {dna} embeddings; "
        f"{len(known & with_brain - with_dna)} only brain, {len(known & with_dna - with_brain)} "
        f"only DNA, {flow[-1]['n']} unknown to the cohort."
    )
    if not both:
        raise UserError(
            f"nobody has both {brain} features and {dna} embeddings: the ids of the two tables "
            "do not meet. Compare them with subjects.parquet (leading zeros, suffixes, numbers "
            "as text)."
        )
    people = cohort.subjects.filter(pl.col("subject").is_in(list(both)))
    subjects = people["subject"].to_list()
    splits = cohort.splits()
    labels = splits.label(subjects)
    chosen = genetics.select(subjects)
    training = [s for s, label in zip(subjects, labels, strict=True) if label == "train"]
    return Pairs(
        people=people,
        brain=features.select(subjects),
        # A missing gene is filled with its mean over training people, who may be looked at.
        dna=chosen.concatenated(fill=chosen.select(training).gene_means()),
        labels=labels,
        provenance={
            "brain": features.provenance,
            "dna": genetics.provenance.to_dict(),
            "splits_hash": splits.hash,
            "cohort_hash": cohort.hash,
        },
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
