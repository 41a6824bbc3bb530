"""What the adapters share: an adapter knows a model's conventions, and any container will do.

Shape legend: n people, g genes, c chunks, w stored width, h hidden size.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from brainfusion.genetics import checks
from brainfusion.genetics.features import UNKNOWN, GeneticFeatures, Provenance
from brainfusion.genetics.models import (
    SIMULATED,
    Checkpoint,
    check_layer,
    check_tokens,
    check_width,
    find_checkpoint,
)
from brainfusion.genetics.source import Source
from brainfusion.runtime.errors import UserError, nearest


@dataclass(frozen=True, kw_only=True, slots=True)
class Adapter:
    """How one model's files become vectors."""

    model: str
    strands: tuple[str, ...]
    """How files of this model may hold the two strands."""
    pooling: tuple[str, ...]
    """How positions may have become one vector."""
    to_vectors: Callable[[np.ndarray, Provenance, Checkpoint, str], tuple[np.ndarray, str]]
    """(one gene's float32 array [n, w] or [n, c, w], provenance, checkpoint, name for errors) ->
    (float32 [n, h], what was done, or "")."""
    check: Callable[[Provenance, Checkpoint, str], None] | None = None
    """What only this model asks of the provenance; raises UserError."""

    def checked(self, provenance: Provenance, *, where: str) -> Checkpoint:
        """The declared checkpoint, once the provenance makes sense for this model.

        Raises:
            UserError: It does not.
        """
        spec = find_checkpoint(self.model, provenance.checkpoint)
        if provenance.strands not in self.strands:
            raise UserError(
                f"{where}: strands '{provenance.strands}' is nothing that {self.model} gives. "
                f"{nearest(provenance.strands, self.strands)}"
            )
        if provenance.pooling not in (*self.pooling, UNKNOWN):
            raise UserError(
                f"{where}: pooling '{provenance.pooling}' is not known for {self.model}. "
                f"{nearest(provenance.pooling, self.pooling)}"
            )
        if provenance.checkpoint == SIMULATED and not provenance.simulated:
            raise UserError(f'{where}: checkpoint "simulated" needs "simulated": true beside it.')
        if provenance.sequence == "reference":
            raise UserError(
                f"{where}: sequence 'reference' is the same in everyone, so whatever differs "
                "between rows is numerical noise: extract from each person's own sequence."
            )
        check_tokens(
            self.model,
            provenance.checkpoint,
            spec,
            token_unit=provenance.token_unit,
            length_bp=provenance.length_bp,
            n_tokens=provenance.n_tokens,
            chunked=provenance.n_chunks is not None,
            where=where,
        )
        if self.check is not None:
            self.check(provenance, spec, where)
        return spec

    def features(
        self, source: Source, provenance: Provenance, spec: Checkpoint, *, where: str
    ) -> GeneticFeatures:
        """Read a source gene by gene; `spec` is what `checked` found.

        Raises:
            UserError: A wrong width or layer, rows that do not fit the ids, everyone the same.
        """
        if source.layer is not None:
            check_layer(self.model, provenance.checkpoint, spec, source.layer, where=where)
        n, g = len(source.subjects), len(source.genes)
        width = 2 * spec.width if provenance.strands == "concat" else spec.width
        vectors = np.empty((n, g, width), dtype=np.float32)
        mask = np.empty((n, g), dtype=np.bool_)
        figures, steps = [], {}
        for column, gene in enumerate(source.genes):
            raw, dtype = source.load(column)
            label = f"{where}: gene {gene}"
            ready, step = self.to_vectors(raw, provenance, spec, label)
            stored = checks.coarsest([dtype, provenance.dtype, checks.resolution(raw)])
            vectors[:, column] = ready
            mask[:, column] = checks.clean(vectors[:, column])
            figures.append(checks.describe(vectors[:, column], mask[:, column], stored=stored))
            if step:
                steps[step] = None
        provenance = dataclasses.replace(
            provenance,
            layer=source.layer,
            strands="ps_folded" if provenance.strands == "ps_raw" else provenance.strands,
            dtype=checks.coarsest(
                [provenance.dtype, *(gene.stored for gene in figures if gene.n_present)]
            ),
            steps=(*provenance.steps, *steps),
        )
        alarms = checks.find_alarms(
            figures, mask, where=where, undeclared=_undeclared(self.model, provenance)
        )
        return GeneticFeatures(
            subjects=source.subjects,
            genes=source.genes,
            vectors=vectors,
            mask=mask,
            provenance=provenance,
            alarms=tuple(alarms),
        )


def checked_vectors(
    raw: np.ndarray, provenance: Provenance, spec: Checkpoint, *, where: str
) -> np.ndarray:
    """`raw` if it is [n, w] with the width that the provenance implies.

    Raises:
        UserError: More axes (token-level output), or another width.
    """
    if raw.ndim != 2:
        raise UserError(
            f"{where}: an array of shape {raw.shape} where [people, width] is expected: pool "
            "token-level output over its true length, in float32, before storing it."
        )
    check_width(
        raw.shape[1],
        name=provenance.checkpoint,
        spec=spec,
        strands=provenance.strands,
        where=where,
    )
    return raw


def _undeclared(model: str, provenance: Provenance) -> list[str]:
    if provenance.simulated:
        return []
    said = {
        "pooling": provenance.pooling != UNKNOWN,
        "layer": provenance.layer is not None or model != "evo2",
        "sequence": provenance.sequence is not None,
        "reference": provenance.reference is not None,
    }
    return [key for key, is_said in said.items() if not is_said]
