"""DNA embeddings, in memory or in a store, and where they come from.

Shape legend: n people, g genes, h width, b people of a batch.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

import numpy as np

from brainfusion.genetics.checks import Alarm
from brainfusion.genetics.haplotypes import Combination, check_combination
from brainfusion.genetics.source import COVARIATES
from brainfusion.genetics.vectors import Dense, StoredVectors
from brainfusion.runtime.errors import UserError, nearest

UNKNOWN = "unknown"
LEVELS = ("gene", "subject")
MINIMAL = (
    '{"model": "evo2", "checkpoint": "evo2_7b", "layer": "blocks.26", "pooling": "mean", '
    '"strands": "averaged"}'
)
_BLOCK_ROWS = 1024
_REQUIRED = ("model", "checkpoint", "pooling", "strands")


@dataclass(frozen=True, kw_only=True, slots=True)
class Provenance:
    """How embeddings were made: what `provenance.json` beside the files says.

    Keys that are not listed here (device, package versions, window, date ...) are kept in `extra`.
    """

    model: str
    checkpoint: str
    strands: str
    """"fwd_only", "averaged", "concat" (forward || reverse), "ps_raw" or "ps_folded"."""
    pooling: str = UNKNOWN
    layer: str | None = None
    level: str = "gene"
    """"gene" (a vector a person and gene) or "subject" (a vector a person)."""
    dtype: str = "float32"
    """The coarsest type in which the pooled vectors were ever stored."""
    token_unit: str | None = None
    reference: str | None = None
    """Genome build, for example "GRCh38"."""
    sequence: str | None = None
    """"personal" (each person's own alleles) or "reference"."""
    length_bp: int | None = None
    n_tokens: int | None = None
    n_chunks: int | None = None
    simulated: bool = False
    notes: str = ""
    steps: tuple[str, ...] = ()
    """What reading did to the vectors (fold, mean over chunks), in order."""
    extra: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """As JSON, `extra` spread among the other keys."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        extra = values.pop("extra")
        values["steps"] = list(values["steps"])
        return {**values, **extra}

    @classmethod
    def from_dict(cls, values: Any, *, where: str) -> "Provenance":
        """From the JSON of a `provenance.json`.

        Raises:
            UserError: A missing key, a misspelt one, or a value of the wrong type.
        """
        if not isinstance(values, dict):
            raise UserError(f"{where}: expected a JSON object, such as {MINIMAL}.")
        if missing := [key for key in _REQUIRED if values.get(key) in (None, "")]:
            raise UserError(f"{where}: {', '.join(missing)} missing. A minimal one is {MINIMAL}.")
        known = {f.name: f for f in dataclasses.fields(cls) if f.name != "extra"}
        for key in values:
            if key in known or key in COVARIATES:
                continue
            if near := get_close_matches(key, known, n=1, cutoff=0.8):
                raise UserError(f"{where}: unknown key '{key}'. Did you mean '{near[0]}'?")
        given = {key: value for key, value in values.items() if key in known}
        if isinstance(given.get("layer"), int):
            given["layer"] = str(given["layer"])
        _check_types(given, where=where)
        given["steps"] = tuple(given.get("steps", ()))
        if given.get("level", "gene") not in LEVELS:
            raise UserError(
                f"{where}: level '{given['level']}' cannot be joined to people: pool tokens (or "
                "variants) to one vector a person and gene first, in float32, and declare 'gene'."
            )
        return cls(**given, extra={key: values[key] for key in values if key not in known})


@dataclass(frozen=True, kw_only=True, eq=False)
class GeneticFeatures:
    """One vector a person and gene, with a mask and with its provenance.

    Raises:
        UserError: Arrays whose shapes do not fit the ids.
    """

    subjects: tuple[str, ...]
    genes: tuple[str, ...]
    vectors: np.ndarray | StoredVectors
    """float32 [n, g, h], zeros where `mask` is false. In memory, C-contiguous; or in a store, and
    decoded as it is asked for. An array [n, g, 2, h] keeps both haplotypes, and reads as their
    mean (`with_haplotypes`)."""
    mask: np.ndarray
    """bool [n, g], true where there is a vector."""
    provenance: Provenance
    alarms: tuple[Alarm, ...] = ()
    """What reading the files found to warn about."""

    def __post_init__(self) -> None:
        expected = (len(self.subjects), len(self.genes))
        if self.vectors.ndim not in (3, 4) or self.vectors.shape[:2] != expected:
            raise UserError(
                f"vectors have shape {self.vectors.shape}; expected [{expected[0]} people, "
                f"{expected[1]} genes, width]."
            )
        if self.mask.shape != expected or self.mask.dtype != np.bool_:
            raise UserError(
                f"mask is {self.mask.dtype} of shape {self.mask.shape}; expected bool {expected}."
            )
        if isinstance(self.vectors, np.ndarray):
            vectors = np.ascontiguousarray(self.vectors, np.float32)
            kept = StoredVectors(Dense(vectors)) if vectors.ndim == 4 else vectors
            object.__setattr__(self, "vectors", kept)

    @property
    def n_subjects(self) -> int:
        """People, with or without a vector."""
        return len(self.subjects)

    @property
    def n_genes(self) -> int:
        """Genes."""
        return len(self.genes)

    @property
    def width(self) -> int:
        """Numbers in a vector."""
        return self.vectors.shape[2]

    @property
    def n_haplotypes(self) -> int:
        """2 where both haplotypes are kept, 1 where files held them merged."""
        return self.vectors.n_haplotypes if isinstance(self.vectors, StoredVectors) else 1

    @property
    def haplotypes(self) -> Combination:
        """How two haplotypes become one vector; "mean" where there is only one."""
        return self.vectors.how if isinstance(self.vectors, StoredVectors) else "mean"

    @property
    def n_missing(self) -> int:
        """Pairs of person and gene without a vector."""
        return int(self.mask.size - np.count_nonzero(self.mask))

    def with_haplotypes(self, how: str) -> "GeneticFeatures":
        """The same haplotypes combined as "mean", "sum" or "mean-absdiff"; reads nothing.

        Raises:
            UserError: An unknown way, or haplotypes that are merged already.
        """
        combination = check_combination(how, n_haplotypes=self.n_haplotypes)
        if isinstance(self.vectors, np.ndarray):
            return self
        return dataclasses.replace(self, vectors=self.vectors.combined(combination))

    def rows(self, positions: Sequence[int] | np.ndarray) -> np.ndarray:
        """float32 [b, g, h]: the vectors of some people, by row; nothing else is read."""
        where = np.asarray(positions, dtype=np.int64)
        if isinstance(self.vectors, StoredVectors):
            return self.vectors.take(where)
        return self.vectors[where]

    def pooled(self, positions: Sequence[int] | np.ndarray) -> np.ndarray:
        """float32 [b, h]: the mean over the genes that each of some people has; zeros for none."""
        where = np.asarray(positions, dtype=np.int64)
        if isinstance(self.vectors, StoredVectors):
            total = self.vectors.total(where)
        else:
            total = self.vectors[where].sum(axis=1)
        n_present = np.maximum(self.mask[where].sum(axis=1), 1)
        return total / n_present[:, None].astype(np.float32)

    def column(self, gene: int, positions: Sequence[int] | np.ndarray) -> np.ndarray:
        """float32 [b, h]: one gene's vectors of some people, by row."""
        where = np.asarray(positions, dtype=np.int64)
        if isinstance(self.vectors, StoredVectors):
            return self.vectors.take(where, np.array([gene]))[:, 0]
        return self.vectors[where, gene]

    def select(
        self, subjects: Sequence[str], genes: Sequence[str] | None = None
    ) -> "GeneticFeatures":
        """The named people, and the named genes if any, in the order given.

        A copy of arrays in memory; a store stays where it is, and only what is selected is read.

        Raises:
            UserError: Ids that are not here (their count) or that are named twice.
        """
        rows = _positions(subjects, self.subjects, what="subject")
        columns = _positions(genes, self.genes, what="gene") if genes is not None else None
        mask = self.mask[rows]
        if isinstance(self.vectors, StoredVectors):
            vectors = self.vectors.subset(rows, columns)
        elif columns is None:
            vectors = self.vectors[rows]
        else:
            vectors = self.vectors[rows[:, None], columns]
        return dataclasses.replace(
            self,
            subjects=tuple(subjects),
            genes=self.genes if genes is None else tuple(genes),
            vectors=vectors,
            mask=mask if columns is None else mask[:, columns],
        )

    def gene_means(self) -> np.ndarray:
        """float32 [g, h]: each gene's mean over the people who have it; zeros where nobody has."""
        means = np.zeros((self.n_genes, self.width), dtype=np.float32)
        for gene in range(self.n_genes):
            rows = np.flatnonzero(self.mask[:, gene])
            total = np.zeros(self.width)
            for start in range(0, len(rows), _BLOCK_ROWS):
                block = self.column(gene, rows[start : start + _BLOCK_ROWS])
                total += block.sum(axis=0, dtype=np.float64)
            means[gene] = total / max(len(rows), 1)
        return means

    def concatenated(self, *, fill: np.ndarray | None = None) -> np.ndarray:
        """All genes side by side, float32 [n, g * h]; a copy that may be written to.

        A gene that a person lacks (`n_missing` in all) is filled with the mean of that gene over
        the people present, which carries nothing about the person.

        Args:
            fill: [g, h] to fill with instead: `gene_means()` of the training people, where what the
                others look like must not be known.
        """
        flat = np.array(self.vectors, dtype=np.float32, copy=True)
        if self.n_missing:
            means = self.gene_means() if fill is None else np.asarray(fill, dtype=np.float32)
            rows, columns = np.nonzero(~self.mask)
            flat[rows, columns] = means[columns]
        return flat.reshape(self.n_subjects, -1)


def _positions(wanted: Sequence[str], known: tuple[str, ...], *, what: str) -> np.ndarray:
    if isinstance(wanted, str):
        raise UserError(f"expected a list of {what} ids, got the text '{wanted}'.")
    where = {name: position for position, name in enumerate(known)}
    if unknown := [name for name in wanted if name not in where]:
        hint = f" {nearest(str(unknown[0]), known)}" if what == "gene" and len(known) <= 40 else ""
        raise UserError(
            f"{len(unknown)} of {len(wanted)} {what} ids have no row in the genetic features "
            f"({len(known)} {what}s): ids are compared as text, leading zeros included.{hint}"
        )
    if len(set(wanted)) != len(wanted):
        raise UserError(f"{len(wanted) - len(set(wanted))} {what} ids are asked for twice.")
    return np.array([where[name] for name in wanted], dtype=np.int64)


def _check_types(given: dict[str, Any], *, where: str) -> None:
    for key, value in given.items():
        if key in ("length_bp", "n_tokens", "n_chunks"):
            fits = value is None or (type(value) is int and value > 0)
            expected = "a positive whole number"
        elif key == "simulated":
            fits, expected = isinstance(value, bool), "true or false"
        elif key == "steps":
            fits = isinstance(value, list) and all(isinstance(step, str) for step in value)
            expected = "a list of texts"
        else:
            optional = key in ("layer", "token_unit", "reference", "sequence")
            fits = isinstance(value, str) or (optional and value is None)
            expected = "text"
        if not fits:
            raise UserError(f"{where}: {key}={value!r}, expected {expected}.")
