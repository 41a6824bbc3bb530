"""The alignment run that a query is about, opened piece by piece as it is asked for."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from brainfusion.alignment.conditioning import design_matrix
from brainfusion.alignment.folder import model_hash
from brainfusion.alignment.genes.conditioning import GeneConditioner
from brainfusion.alignment.modalities import modality_name
from brainfusion.alignment.model import Alignment, load
from brainfusion.cli.query.options import Side
from brainfusion.cli.runs import AlignmentRun, check_cohort
from brainfusion.cli.scoring import read_embeddings, read_scores
from brainfusion.cli.workspace import Workspace
from brainfusion.data.cohort import Cohort
from brainfusion.data.features import Features
from brainfusion.runtime.errors import UserError

if TYPE_CHECKING:
    from brainfusion.genetics import GeneticFeatures

COSINE = "cosine"
N_MEASURED = 256
"""Queries that the recall of an approximate index is measured with."""


@dataclass(frozen=True, kw_only=True)
class QueryRun:
    """A run, its cohort, its model and the vectors that it has written."""

    workspace: Workspace
    run: AlignmentRun

    @cached_property
    def cohort(self) -> Cohort:
        """Its cohort; a warning is said where it was made from another."""
        cohort = self.workspace.open_cohort()
        check_cohort(self.run, cohort)
        return cohort

    @cached_property
    def alignment(self) -> Alignment:
        """Its model."""
        return load(self.run.path)

    @cached_property
    def model_hash(self) -> str:
        """Which model it is."""
        return model_hash(self.run.path)

    @cached_property
    def score(self) -> str:
        """What a score is: that of the vectors that the run has written."""
        written = (self.run.path / "scores" / f"{side}.parquet" for side in ("brain", "dna"))
        return "density ratio, nats" if all(path.exists() for path in written) else COSINE

    def vectors(self, side: Side) -> Features:
        """Everybody's vectors of one side, with their split."""
        if side not in self._read:
            found = None if self.score == COSINE else read_scores(self.run.path, side)
            self._read[side] = read_embeddings(self.run.path, side) if found is None else found
        return self._read[side]

    def sample(self, side: Side) -> np.ndarray:
        """Some of the vectors of one side, to measure an index with."""
        vectors = self.vectors(side).vectors
        return vectors[np.linspace(0, len(vectors) - 1, min(len(vectors), N_MEASURED)).astype(int)]

    @cached_property
    def _read(self) -> dict[Side, Features]:
        """The vectors that were read so far."""
        return {}

    def scored(self, side: Side, embedded: np.ndarray) -> np.ndarray:
        """Embeddings [n, o] as vectors of the kind that the run has written."""
        return embedded if self.score == COSINE else self.alignment.scored(side, embedded)

    def people(self, subjects: Sequence[str]) -> pl.DataFrame:
        """What subjects.parquet says of these people, in their order; null where it lacks them."""
        rows = pl.DataFrame({"subject": list(subjects)}, schema={"subject": pl.String})
        return rows.join(self.cohort.subjects, on="subject", how="left", maintain_order="left")

    def covariates(self, subjects: Sequence[str]) -> np.ndarray | None:
        """The design matrix of people of the cohort; None where nothing is residualised."""
        names = self.alignment.covariates
        if not names:
            return None
        columns = list(dict.fromkeys(name.split("=", 1)[0] for name in names))
        return design_matrix(self.people(subjects), columns, names=names)[0]

    def modality(self, side: Side, name: str) -> str:
        """What the model calls features of an encoder, or a DNA model or several joined by +."""
        names = self.run.brain if side == "brain" else self.run.dna
        return modality_name(side, name) if len(names) > 1 else side

    def genes(self, spec: str) -> GeneConditioner:
        """How the genes of a DNA modality are conditioned.

        Raises:
            UserError: It does not come as genes.
        """
        conditioner = self.alignment.conditioners[self.modality("dna", spec)]
        if not isinstance(conditioner, GeneConditioner):
            raise UserError(
                f"the DNA side of {self.run.path} does not come as genes: align again with this "
                "version."
            )
        return conditioner

    def dna_table(self, model: str) -> "GeneticFeatures":
        """The cohort's store of a DNA model, its haplotypes combined as in the run."""
        from brainfusion.cli.workspace import ensure_genetics
        from brainfusion.genetics import read

        path = ensure_genetics(self.workspace, model)
        return read(model, path).with_haplotypes(self.run.haplotypes)
