"""Vectors of people's genes, from one DNA model or from several side by side.

Only arrays pass here: whatever answers `column` (a store of `brainfusion.genetics`, or `GeneArray`)
is read one gene at a time, so that the whole [n, g, h] never has to be in memory.

Shape legend: n people, g genes of a model, h width of a model, s genes of all models.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

from brainfusion.runtime.errors import UserError

ALONE = "dna"
"""What the only model is called where nobody named it."""


class Gene(NamedTuple):
    """A gene as one model saw it."""

    model: str
    name: str


class GeneSource(Protocol):
    """One model's vectors; `brainfusion.genetics.GeneticFeatures` is one."""

    @property
    def genes(self) -> tuple[str, ...]:
        """Names, in column order."""
        ...

    @property
    def mask(self) -> np.ndarray:
        """Where there is a vector, bool [n, g]."""
        ...

    @property
    def width(self) -> int:
        """Numbers in a vector."""
        ...

    def column(self, gene: int, positions: np.ndarray) -> np.ndarray:
        """float32 [b, h]: one gene's vectors of some people, by row."""
        ...


@dataclass(frozen=True, kw_only=True, eq=False)
class GeneArray:
    """A `GeneSource` in memory.

    Raises:
        UserError: Shapes that do not fit one another, or a gene that is named twice.
    """

    genes: tuple[str, ...]
    vectors: np.ndarray
    """float32 [n, g, h]; what stands where `mask` is false does not matter."""
    mask: np.ndarray
    """bool [n, g], true where there is a vector."""

    def __post_init__(self) -> None:
        shape = self.vectors.shape
        if len(shape) != 3 or shape[1] != len(self.genes):
            raise UserError(
                f"gene vectors have shape {shape}: expected (people, {len(self.genes)} genes, "
                "width), the genes in the order of their names."
            )
        if self.mask.shape != shape[:2] or self.mask.dtype != np.bool_:
            raise UserError(
                f"the mask is {self.mask.dtype} of shape {self.mask.shape}: expected bool "
                f"{shape[:2]}, true where there is a vector."
            )
        if twice := len(self.genes) - len(set(self.genes)):
            raise UserError(f"{twice} gene names repeat: expected each gene once.")

    @property
    def width(self) -> int:
        """Numbers in a vector."""
        return self.vectors.shape[2]

    def column(self, gene: int, positions: np.ndarray) -> np.ndarray:
        """float32 [b, h]: one gene's vectors of some people, by row."""
        return np.asarray(self.vectors[positions, gene], dtype=np.float32)


@dataclass(frozen=True, kw_only=True, eq=False)
class GeneVectors:
    """Genes of all models side by side: row i of each source is the same person.

    Raises:
        UserError: No model, no gene, or sources of different people.
    """

    sources: Mapping[str, GeneSource]
    """By the model's name, in the order in which their genes stand."""
    rows: np.ndarray
    """int64 [n]: which rows of the sources, in this order."""

    def __post_init__(self) -> None:
        counts = {name: len(source.mask) for name, source in self.sources.items()}
        if not counts or not any(source.genes for source in self.sources.values()):
            raise UserError("no gene vectors: expected at least one DNA model with one gene.")
        if len(set(counts.values())) > 1:
            text = ", ".join(f"{name} {n}" for name, n in counts.items())
            raise UserError(
                f"DNA models of different people ({text}): select the same people, in the same "
                "order, from each."
            )

    @classmethod
    def of(cls, sources: Mapping[str, GeneSource]) -> "GeneVectors":
        """Everybody in the sources, in their order."""
        n = len(next(iter(sources.values())).mask) if sources else 0
        return cls(sources=sources, rows=np.arange(n))

    @classmethod
    def coerce(cls, value: Any, *, models: Sequence[str], genes: Sequence[Gene]) -> "GeneVectors":
        """Gene vectors from what a caller has at hand.

        Args:
            value: Gene vectors; the only model's source; or its vectors as an array [n, g, h] or
                [n, g * h], genes in the order of `genes`.
            models: The models expected.
            genes: The genes expected.

        Raises:
            UserError: Anything else.
        """
        if isinstance(value, GeneVectors):
            return value
        if isinstance(value, Mapping):
            return cls.of(value)
        if len(models) > 1:
            raise UserError(
                f"one table of DNA vectors, but the model was trained on {' and '.join(models)}: "
                "give GeneVectors with a source for each."
            )
        if isinstance(value, np.ndarray):
            n, n_genes = len(value), len(genes)
            if value.ndim not in (2, 3) or (value.ndim == 2 and value.shape[1] % n_genes):
                raise UserError(
                    f"DNA features have shape {value.shape}: expected (people, {n_genes} genes, "
                    "width), or the genes side by side."
                )
            vectors = value.reshape(n, n_genes, -1) if value.ndim == 2 else value
            mask = np.ones(vectors.shape[:2], dtype=bool)
            value = GeneArray(genes=tuple(g.name for g in genes), vectors=vectors, mask=mask)
        return cls.of({models[0]: value})

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def genes(self) -> tuple[Gene, ...]:
        """The genes of all models, [s]."""
        return tuple(Gene(m, name) for m, source in self.sources.items() for name in source.genes)

    @property
    def widths(self) -> dict[str, int]:
        """Numbers in a vector of each model."""
        return {name: source.width for name, source in self.sources.items()}

    @property
    def mask(self) -> np.ndarray:
        """Where a person has a vector, bool [n, s]."""
        return np.concatenate([s.mask[self.rows] for s in self.sources.values()], axis=1)

    def take(self, rows: np.ndarray) -> "GeneVectors":
        """Some people, or all in another order; nothing is read."""
        return GeneVectors(sources=self.sources, rows=self.rows[rows])

    def columns(self) -> Iterator[tuple[Gene, np.ndarray]]:
        """Gene after gene, its vectors float32 [n, h]."""
        for model, source in self.sources.items():
            for position, name in enumerate(source.genes):
                yield Gene(model, name), self.column(Gene(model, name), position)

    def column(self, gene: Gene, position: int | None = None) -> np.ndarray:
        """float32 [n, h]: one gene's vectors; its place among the model's may be given."""
        source = self.sources[gene.model]
        where = source.genes.index(gene.name) if position is None else position
        return source.column(where, self.rows)

    def concatenated(self, *, known_from: np.ndarray) -> np.ndarray:
        """All genes side by side, float32 [n, sum of g * h].

        Args:
            known_from: Rows of the people whose mean fills in for a gene that a person lacks: the
                training people.
        """
        parts = []
        for (_, values), has in zip(self.columns(), self.mask.T, strict=True):
            filled = np.array(values, dtype=np.float32)
            if not has.all():
                givers = known_from[has[known_from]]
                filled[~has] = values[givers].mean(axis=0, dtype=np.float64) if len(givers) else 0.0
            parts.append(filled)
        return np.concatenate(parts, axis=1)
