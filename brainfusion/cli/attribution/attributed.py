"""The alignment that an attribution asks about: its test people, and what retrieval scores of them.

A side of several modalities is the mean of those that a person has, as in the run itself, and what
is hidden is hidden from one of them or from several: `vectors` takes what has changed.

Shape legend: t test people, m of them who have a modality, o width of the shared space.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from brainfusion.alignment.conditioning import design_matrix
from brainfusion.alignment.genes.conditioning import GeneConditioner
from brainfusion.alignment.genes.vectors import Gene, GeneVectors
from brainfusion.alignment.modalities import side_mean
from brainfusion.alignment.model import Alignment, load
from brainfusion.cli.modalities import Modalities, load_modalities, load_tables
from brainfusion.cli.pairs import families_of
from brainfusion.cli.runs import AlignmentRun
from brainfusion.cli.workspace import Workspace, hash_ids
from brainfusion.data.cohort import Cohort
from brainfusion.runtime.errors import UserError
from brainfusion.runtime.logs import say


@dataclass(frozen=True, kw_only=True, eq=False)
class Attributed:
    """A trained alignment and the test people that it is asked about."""

    run: AlignmentRun
    workspace: Workspace
    cohort: Cohort
    alignment: Alignment
    people: Modalities
    """All that the run was made of."""
    rows: np.ndarray
    """Of `people`: the test people, int64 [t]."""
    covariates: np.ndarray | None
    """Of all people, where the run took some out."""

    @property
    def names(self) -> dict[str, str]:
        """Of each modality the features, or the DNA models joined by +, that it is made of."""
        given = (*self.run.brain, *self.run.dna)
        return dict(zip(self.people.features, given, strict=True))

    @property
    def covariate_names(self) -> tuple[str, ...]:
        """What was taken out, column by column of the design matrix."""
        return tuple(next(iter(self.alignment.conditioners.values())).covariates)

    @property
    def families(self) -> list[str]:
        """Of the test people."""
        return families_of(self.people.people[self.rows])

    @property
    def genes(self) -> tuple[Gene, ...]:
        """The genes that vary, of all DNA modalities."""
        return tuple(gene for name in self.people.dna for gene in self.conditioner(name).used)

    def conditioner(self, name: str) -> GeneConditioner:
        """Of a DNA modality."""
        found = self.alignment.conditioners[name]
        if not isinstance(found, GeneConditioner):
            raise UserError(
                f"'{name}' does not come as genes in this alignment, so none can be left out: "
                "align again from gene vectors."
            )
        return found

    def unit(self, gene: Gene) -> str:
        """What a gene is called: with its model, where there are several."""
        n_models = sum(len(vectors.sources) for vectors in self.people.dna.values())
        return f"{gene.model} {gene.name}" if n_models > 1 else gene.name

    def has(self, name: str) -> np.ndarray:
        """Which test people have a modality, bool [t]."""
        return self.people.present[name][self.rows]

    def owners(self, name: str) -> np.ndarray:
        """Rows of `people` of the test people who have a modality, int64 [m]."""
        return self.rows[self.has(name)]

    def embed(self, name: str, features: Any) -> np.ndarray:
        """Unit rows [m, o] of a modality from other features of its owners."""
        own = None if self.covariates is None else self.covariates[self.owners(name)]
        return self.alignment.embed(name, features, own)

    @cached_property
    def embedded(self) -> dict[str, np.ndarray]:
        """Unit rows [m, o] of each modality with nothing hidden."""
        found = {}
        for name, features in self.people.features.items():
            rows = self.owners(name)
            own = features.take(rows) if isinstance(features, GeneVectors) else features[rows]
            found[name] = self.embed(name, own) if len(rows) else np.zeros((0, 1), np.float32)
        width = max(rows.shape[1] for rows in found.values())
        return {n: x if len(x) else np.zeros((0, width), np.float32) for n, x in found.items()}

    def vectors(self, side: str, changed: Mapping[str, np.ndarray] | None = None) -> np.ndarray:
        """What retrieval scores of a side, [t, k]: the head's vectors where there is a head.

        Args:
            side: "brain" or "dna".
            changed: Unit rows [m, o] of modalities of which something is hidden.
        """
        return scored(
            self.alignment,
            side,
            {name: {**self.embedded, **(changed or {})}[name] for name in self.people.sides[side]},
            {name: self.has(name) for name in self.people.sides[side]},
        )


def scored(
    alignment: Alignment,
    side: str,
    embedded: Mapping[str, np.ndarray],
    present: Mapping[str, np.ndarray],
) -> np.ndarray:
    """Vectors of a side [t, k] from unit rows of its modalities, and who has which."""
    mean = side_mean(embedded, present)
    return mean if alignment.head is None else alignment.head.vectors(side, mean)


def read_attributed(
    workspace: Workspace, cohort: Cohort, run: AlignmentRun, *, people: int, seed: int
) -> Attributed:
    """Open a run and join the tables that it was made of.

    Args:
        workspace: Where features are.
        cohort: Whose people count.
        run: The alignment.
        people: Test people at most; others are left out by lot.
        seed: Of that lot.

    Raises:
        UserError: The run was made from another split or of other modalities, or there are fewer
            than two test people.
    """
    alignment = load(run.path)
    tables = load_tables(workspace, cohort, brain=run.brain, dna=run.dna, haplotypes=run.haplotypes)
    joined = load_modalities(tables, cohort)
    _check_same(run, alignment, cohort, joined)
    rows = np.flatnonzero(np.asarray(joined.labels) == "test")
    if len(rows) < 2:
        raise UserError(f"{len(rows)} test people with both modalities: expected 2 or more.")
    if len(rows) > people:
        say(f"{people} of {len(rows)} test people are looked at (--people).")
        rows = rows[np.sort(np.random.default_rng(seed).choice(len(rows), people, False))]
    names = next(iter(alignment.conditioners.values())).covariates
    columns = list(dict.fromkeys(name.split("=")[0] for name in names))
    return Attributed(
        run=run,
        workspace=workspace,
        cohort=cohort,
        alignment=alignment,
        people=joined,
        rows=rows,
        covariates=design_matrix(joined.people, columns, names=names)[0] if names else None,
    )


def _check_same(
    run: AlignmentRun, alignment: Alignment, cohort: Cohort, people: Modalities
) -> None:
    """The run must be of this split and of these modalities; of other people it is said."""
    meta = alignment.info.get("meta", {})
    made_of = meta.get("provenance", {}).get("splits_hash", cohort.splits().hash)
    if made_of != cohort.splits().hash:
        raise UserError(
            f"{run.path} was trained on another split of these people, so its test people are not "
            "held out: align again."
        )
    if set(people.features) != set(alignment.conditioners):
        raise UserError(
            f"{run.path} has the modalities {', '.join(alignment.conditioners)}, and its summary "
            f"names {', '.join(people.features)}: restore the folder, or align again."
        )
    if meta.get("subjects_hash", hash_ids(people.subjects)) != hash_ids(people.subjects):
        say(
            f"warning: {run.path} was made of other people than those who have features and DNA "
            f"now ({len(people.subjects)}): those of them in the test split are asked about."
        )
