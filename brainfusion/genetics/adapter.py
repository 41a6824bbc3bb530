"""What the adapters share: an adapter knows a model's conventions, and any container will do.

Shape legend: r rows (people) and k columns (genes) of a block, b vectors, c chunks, w stored width,
h hidden size.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from brainfusion.genetics import checks, statistics
from brainfusion.genetics.checks import Alarm
from brainfusion.genetics.features import UNKNOWN, GeneticFeatures, Provenance
from brainfusion.genetics.layout import PAIR
from brainfusion.genetics.models import (
    SIMULATED,
    Checkpoint,
    check_layer,
    check_tokens,
    check_width,
    find_checkpoint,
    unit_bp,
)
from brainfusion.genetics.source import Block, Findings, Source
from brainfusion.genetics.strands import average
from brainfusion.genetics.stream import ReadyBlock, Stream
from brainfusion.runtime.errors import UserError, nearest

INDELS = ("none", "included")
"""What provenance may say under "indels": single-base variants alone, or all."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Adapter:
    """How one model's files become vectors."""

    model: str
    strands: tuple[str, ...]
    """How files of this model may hold the two strands."""
    pooling: tuple[str, ...]
    """How positions may have become one vector."""
    to_vectors: Callable[[np.ndarray, Provenance, Checkpoint, str], tuple[np.ndarray, str]]
    """(float32 [b, w] or [b, c, w], provenance, checkpoint, name for errors) -> (float32 [b, h],
    what was done, or "")."""
    check: Callable[[Provenance, Checkpoint, str], None] | None = None
    """What only this model asks of the provenance; raises UserError."""
    is_sequence_model: bool = True
    """False for genotypes and scores: no layer, no strands, and zeros are numbers."""
    defaults: Mapping[str, str] = field(default_factory=dict)
    """Provenance of files that need none beside them."""

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
        if (indels := provenance.extra.get("indels")) not in (None, *INDELS):
            raise UserError(f"{where}: indels={indels!r}. {nearest(str(indels), INDELS)}")
        self._check_length(provenance, spec, provenance.length_bp, where=where)
        if self.check is not None:
            self.check(provenance, spec, where)
        return spec

    def stream(
        self, source: Source, provenance: Provenance, spec: Checkpoint, *, where: str
    ) -> Stream:
        """Read a source block by block; `spec` is what `checked` found.

        Raises:
            UserError: A wrong width or layer, here or while streaming.
        """
        if source.layer is not None:
            check_layer(self.model, provenance.checkpoint, spec, source.layer, where=where)
        for length_bp in sorted(source.findings.lengths_bp):
            self._check_length(provenance, spec, length_bp, where=where)
        if spec.width == 0:
            spec = dataclasses.replace(spec, width=source.width, output_width=source.width)
            width = source.width
        else:
            width = 2 * spec.width if provenance.strands == "concat" else spec.width

        def convert(block: Block) -> ReadyBlock:
            return self._ready(block, source, provenance, spec, where=where)

        folded = {"ps_raw": "ps_folded", PAIR: "averaged"}
        final = dataclasses.replace(
            provenance,
            layer=source.layer,
            strands=folded.get(provenance.strands, provenance.strands),
        )
        return Stream(
            source,
            convert,
            final,
            width=width,
            where=where,
            findings_alarms=lambda findings: self._findings_alarms(findings, provenance, spec),
            undeclared=lambda findings: self._undeclared(final, spec, findings),
        )

    def features(
        self, source: Source, provenance: Provenance, spec: Checkpoint, *, where: str
    ) -> GeneticFeatures:
        """The stream, gathered in memory.

        Raises:
            UserError: A wrong width or layer, rows that do not fit the ids, everyone the same.
        """
        return self.stream(source, provenance, spec, where=where).gathered()

    def _ready(
        self, block: Block, source: Source, provenance: Provenance, spec: Checkpoint, *, where: str
    ) -> ReadyBlock:
        for length_bp in sorted(block.findings.lengths_bp):
            self._check_length(provenance, spec, length_bp, where=where)
        genes = source.genes[block.columns]
        label = f"{where}: gene {genes[0]}" if len(genes) == 1 and genes != ("all",) else where
        raw = block.raw
        resolutions = tuple(statistics.resolution(raw[:, k]) for k in range(raw.shape[1]))
        n_axes = 2 + source.has_haplotypes + source.has_strands
        lead, rest = raw.shape[:n_axes], raw.shape[n_axes:]
        flat, step = self.to_vectors(
            raw.reshape(int(np.prod(lead)), *rest), provenance, spec, label
        )
        steps = (step,) if step else ()
        vectors = flat.reshape(*lead, flat.shape[-1])
        if source.has_strands:
            vectors = average(vectors[..., 0, :], vectors[..., 1, :])
            steps = (*steps, "mean of forward and reverse complement")
        mask = statistics.clean(vectors, zeros_missing=self.is_sequence_model)
        if source.has_haplotypes:
            mask = np.asarray(mask.all(axis=2))
            vectors[~mask] = 0.0
        return ReadyBlock(
            rows=block.rows,
            columns=block.columns,
            vectors=vectors,
            mask=mask,
            dtype=statistics.coarsest([block.dtype, provenance.dtype]),
            resolutions=resolutions,
            steps=steps,
            findings=block.findings,
        )

    def _check_length(
        self, provenance: Provenance, spec: Checkpoint, length_bp: int | None, *, where: str
    ) -> None:
        check_tokens(
            self.model,
            provenance.checkpoint,
            spec,
            token_unit=provenance.token_unit,
            length_bp=length_bp,
            n_tokens=provenance.n_tokens,
            chunked=provenance.n_chunks is not None,
            where=where,
        )

    def _findings_alarms(
        self, findings: Findings, provenance: Provenance, spec: Checkpoint
    ) -> list[Alarm]:
        share = findings.n_indels / findings.n_flagged if findings.n_flagged else None
        if share is None and provenance.extra.get("indels") == "included":
            share = 1.0
        padded = findings.n_padded / findings.n_sequences if findings.n_sequences else 0.0
        return [
            *checks.mixture_alarms(findings.covariates),
            *checks.indel_alarms(share, unit_bp=unit_bp(spec.token_unit) or 1),
            *checks.padding_alarms(padded, model=self.model),
        ]

    def _undeclared(
        self, provenance: Provenance, spec: Checkpoint, findings: Findings
    ) -> list[str]:
        if provenance.simulated or not self.is_sequence_model:
            return []
        needs_indels = spec.token_unit == "6-mer" and not findings.n_flagged
        said = {
            "pooling": provenance.pooling != UNKNOWN,
            "layer": provenance.layer is not None or self.model != "evo2",
            "sequence": provenance.sequence is not None,
            "reference": provenance.reference is not None,
            "indels": "indels" in provenance.extra or not needs_indels,
        }
        return [key for key, is_said in said.items() if not is_said]


def checked_vectors(
    raw: np.ndarray, provenance: Provenance, spec: Checkpoint, *, where: str
) -> np.ndarray:
    """`raw` if it is [b, w] with the width that the provenance implies.

    Raises:
        UserError: More axes (token-level output), or another width.
    """
    if raw.ndim != 2:
        raise UserError(
            f"{where}: an array of shape {raw.shape} where [people, width] is expected: pool "
            "token-level output over its true length, in float32, before storing it; or declare "
            '"level": "token" (and "haplotypes": 2, or strands "pair", for an axis of two).'
        )
    check_width(
        raw.shape[1],
        name=provenance.checkpoint,
        spec=spec,
        strands=provenance.strands,
        where=where,
    )
    return raw


def plain_vectors(
    raw: np.ndarray, provenance: Provenance, spec: Checkpoint, where: str
) -> tuple[np.ndarray, str]:
    """Vectors as they are, for models without conventions of their own."""
    return checked_vectors(raw, provenance, spec, where=where), ""
