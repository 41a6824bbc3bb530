"""Gene vectors made fit for alignment; everything is fitted on training people and saved.

Vectors of one gene have a large mean and differ by a thousandth of it between people, so each gene
is standardised and residualised by itself, on the training people who have it. Then either all
genes of a model are put side by side and one PCA is made of them (`together`), or each gene keeps a
few principal components of its own for a pool (`genes.GeneTower`). A gene that a person lacks, or
that is masked, is zeros behind all of this: it carries nothing about the person.

Shape legend: n people, s genes of all models, k components, c covariates.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Self

import numpy as np

from brainfusion.alignment.conditioning import Conditioner, constant_columns, principal_axes
from brainfusion.alignment.genes.vectors import Gene, GeneVectors
from brainfusion.runtime.errors import UserError
from brainfusion.runtime.logs import say

DnaPool = Literal["concat", "mean", "max", "attention"]
_LEAST_PEOPLE = 4
"""Training people whom a gene needs."""


class GeneArrays(NamedTuple):
    """Conditioned genes, float32 [n, s, k], and bool [n, s] where there is one."""

    x: np.ndarray
    mask: np.ndarray


@dataclass(frozen=True, kw_only=True, eq=False)
class GeneConditioner:
    """A fitted map from gene vectors to features of people, or to genes for a pool."""

    widths: Mapping[str, int]
    """Width of each model's vectors, models in order."""
    genes: tuple[Gene, ...]
    """The genes it was fitted on, and that vectors must have, by name."""
    parts: tuple[Conditioner | None, ...]
    """One a gene; none for a gene that does not vary, or that too few training people have."""
    rotations: tuple[np.ndarray | None, ...] | None
    """Genes together: principal axes float64 [columns, k] of each model, or none for all columns.
    No tuple where genes stay apart."""
    n_people: int
    """Training people."""
    explained: float
    """Share of the variance, after standardising and residualising, that the output holds."""

    @classmethod
    def fit(
        cls,
        features: GeneVectors,
        *,
        together: bool,
        n_components: int,
        whiten: bool = True,
        shrinkage: float = 0.3,
        covariates: np.ndarray | None = None,
        covariate_names: Sequence[str] = (),
    ) -> Self:
        """Fit on training people only.

        Args:
            features: The training people's.
            together: One PCA of all genes of a model instead of one a gene.
            n_components: Principal components of a model or of a gene, at most half the people;
                0 keeps all columns.
            whiten: Scale the components to unit variance.
            shrinkage: As for `Conditioner.fit`.
            covariates: [n, c] from `design_matrix`, regressed out of each column.
            covariate_names: Their names, in order.

        Raises:
            UserError: Fewer than 4 people, no gene that varies, or values that are not finite.
        """
        if len(features) < _LEAST_PEOPLE:
            raise UserError(f"{len(features)} people to fit on: expected at least {_LEAST_PEOPLE}.")
        parts: list[Conditioner | None] = []
        mask = features.mask
        for (gene, values), known in zip(features.columns(), mask.T, strict=True):
            _check_finite(values[known], gene)
            varies = known.sum() >= _LEAST_PEOPLE and not constant_columns(values[known]).all()
            part = None
            if varies:
                part = Conditioner.fit(
                    values[known],
                    n_components=0 if together else n_components,
                    whiten=whiten,
                    shrinkage=shrinkage,
                    covariates=None if covariates is None else covariates[known],
                    covariate_names=covariate_names,
                )
            parts.append(part)
        kept = [part for part in parts if part is not None]
        if not kept:
            raise UserError(
                f"none of {len(parts)} genes varies among {len(features)} training people: "
                "expected each person's own sequence, not the reference's."
            )
        fitted = cls(
            widths=features.widths,
            genes=features.genes,
            parts=tuple(parts),
            rotations=(None,) * len(features.widths) if together else None,
            n_people=len(features),
            explained=float(np.mean([part.explained for part in kept])),
        )
        if not (together and n_components):
            return fitted
        return fitted._rotated(features, covariates, n_components, shrinkage if whiten else None)

    def _rotated(
        self,
        features: GeneVectors,
        covariates: np.ndarray | None,
        n_components: int,
        shrinkage: float | None,
    ) -> Self:
        """With principal axes of each model's columns."""
        from dataclasses import replace

        rotations, shares = [], []
        for columns in self._side_by_side(features, covariates, features.mask):
            x = columns.astype(np.float64)
            limit = min(n_components, len(x) // 2, x.shape[1])
            rotation, share = principal_axes(x, limit, shrinkage=shrinkage)
            rotations.append(rotation)
            shares.append(share)
        return replace(self, rotations=tuple(rotations), explained=float(np.mean(shares)))

    # -- what comes out ----------------------------------------------------------------------

    @property
    def together(self) -> bool:
        """Whether the genes come out as one vector a person."""
        return self.rotations is not None

    @property
    def models(self) -> tuple[str, ...]:
        """DNA models, in order."""
        return tuple(self.widths)

    @property
    def used(self) -> tuple[Gene, ...]:
        """The genes that come out: those that vary."""
        return tuple(g for g, part in zip(self.genes, self.parts, strict=True) if part is not None)

    @property
    def n_components(self) -> tuple[int, ...]:
        """Components of each gene that comes out."""
        return tuple(part.dim_out for part in self.parts if part is not None)

    @property
    def covariates(self) -> tuple[str, ...]:
        """Columns of the design matrix that `transform` must be given; often none."""
        return next(part.covariates for part in self.parts if part is not None)

    @property
    def dim_in(self) -> int:
        """Numbers that a person comes with."""
        return sum(self.widths[gene.model] for gene in self.genes)

    @property
    def dim_out(self) -> int:
        """Numbers that a person leaves with."""
        if self.rotations is None:
            return sum(self.n_components)
        return sum(self._widths_out())

    @property
    def n_dropped(self) -> int:
        """Numbers left out because they do not vary."""
        widths = [self.widths[gene.model] for gene in self.genes]
        return sum(
            width if part is None else part.n_dropped
            for width, part in zip(widths, self.parts, strict=True)
        )

    # -- use ---------------------------------------------------------------------------------

    def transform(
        self,
        features: GeneVectors,
        covariates: np.ndarray | None = None,
        *,
        mask: np.ndarray | None = None,
    ) -> np.ndarray | GeneArrays:
        """Condition the genes of anyone.

        Args:
            features: With all genes that it was fitted on, in any order; other genes are not
                looked at.
            covariates: [n, c], exactly where it was fitted with covariates.
            mask: bool [s], or [n, s]: genes to look at, in the order of `genes`. Where false, a
                gene counts as one that the person lacks (LOGO: one false).

        Returns:
            Genes together: float32 [n, dim_out]. Apart: genes of `used`, float32 [n, s, k].

        Raises:
            UserError: A gene or model that is not there, vectors of another width, values that are
                not finite, people without any gene, or covariates that do not fit.
        """
        known = self._known(features, mask)
        if self.rotations is not None:
            blocks = self._side_by_side(features, covariates, known)
            rotated = [
                block if axes is None else block @ axes
                for block, axes in zip(blocks, self.rotations, strict=True)
            ]
            return np.concatenate(rotated, axis=1).astype(np.float32)
        used = [part is not None for part in self.parts]
        shape = (len(features), sum(used), max(self.n_components))
        x = np.zeros(shape, dtype=np.float32)
        for out, (_, values) in enumerate(self._each(features, covariates, known)):
            x[:, out, : values.shape[1]] = values
        return GeneArrays(x, np.ascontiguousarray(known[:, used]))

    def without_each(
        self, features: GeneVectors, covariates: np.ndarray | None = None
    ) -> Iterator[tuple[Gene, np.ndarray | GeneArrays]]:
        """What `transform` gives with one gene hidden, for gene after gene of `used`.

        Raises:
            UserError: As `transform`; also if a person has only the gene that is hidden.
        """
        known = self._known(features, None)
        used = np.array([part is not None for part in self.parts])
        if n_bare := int((known[:, used].sum(axis=1) < 2).sum()):
            raise UserError(
                f"{n_bare} of {len(known)} people have only one of the genes: hiding it leaves "
                "none; leave these people out."
            )
        whole = self.transform(features, covariates)
        if isinstance(whole, GeneArrays):
            for column, gene in enumerate(self.used):
                mask = whole.mask.copy()
                mask[:, column] = False
                yield gene, GeneArrays(whole.x, mask)
            return
        assert self.rotations is not None
        columns = dict.fromkeys(self.models, 0)
        starts, start = {}, 0
        for model, axes, width in zip(self.models, self.rotations, self._widths_out(), strict=True):
            starts[model] = (start, axes)
            start += width
        for gene, values in self._each(features, covariates, known):
            first = columns[gene.model]
            columns[gene.model] += values.shape[1]
            start, axes = starts[gene.model]
            own = slice(first, first + values.shape[1])
            hidden = whole.copy()
            if axes is None:
                hidden[:, start + own.start : start + own.stop] = 0
            else:
                hidden[:, start : start + axes.shape[1]] -= (values @ axes[own]).astype(np.float32)
            yield gene, hidden

    def _widths_out(self) -> list[int]:
        """Columns of each model where genes stand side by side."""
        assert self.rotations is not None
        counts = dict.fromkeys(self.models, 0)
        for gene, n in zip(self.used, self.n_components, strict=True):
            counts[gene.model] += n
        return [
            count if axes is None else axes.shape[1]
            for count, axes in zip(counts.values(), self.rotations, strict=True)
        ]

    def _known(self, features: GeneVectors, mask: np.ndarray | None) -> np.ndarray:
        """Which genes of whom count, bool [n, s] in the order of `genes`."""
        if missing := [model for model in self.models if model not in features.sources]:
            raise UserError(
                f"no vectors of {missing[0]}: expected those of {' and '.join(self.models)}, which "
                "the model was trained on."
            )
        for model, width in self.widths.items():
            if (given := features.widths[model]) != width:
                raise UserError(
                    f"{model} vectors are {given} wide: expected {width}, made by the same "
                    "checkpoint as those that the model was trained on."
                )
        place = {gene: i for i, gene in enumerate(features.genes)}
        if absent := [gene for gene in self.genes if gene not in place]:
            raise UserError(
                f"{len(absent)} of {len(self.genes)} genes that the model was trained on are not "
                f"in these vectors, for example {absent[0].model}'s {absent[0].name}: make them, "
                "or hand over a table with all genes and a mask."
            )
        known = features.mask[:, [place[gene] for gene in self.genes]]
        if mask is not None:
            chosen = np.asarray(mask)
            if chosen.dtype != np.bool_ or chosen.shape not in (known.shape[1:], known.shape):
                raise UserError(
                    f"the mask of genes is {chosen.dtype} of shape {chosen.shape}: expected bool "
                    f"({known.shape[1]},) or {known.shape}, true for genes to look at."
                )
            known = known & chosen
        varying = [part is not None for part in self.parts]
        if n_empty := int((~known[:, varying].any(axis=1)).sum()):
            raise UserError(
                f"{n_empty} of {len(known)} people have none of the {sum(varying)} genes: expected "
                "at least one of each person; leave these people out."
            )
        return known

    def _each(self, features: GeneVectors, covariates: np.ndarray | None, known: np.ndarray) -> Any:
        """Gene after gene that varies: float32 [n, k], zeros where not known."""
        places = {
            model: {name: i for i, name in enumerate(source.genes)}
            for model, source in features.sources.items()
        }
        for gene, part, has in zip(self.genes, self.parts, known.T, strict=True):
            if part is None:
                continue
            values = features.column(gene, places[gene.model][gene.name])
            _check_finite(values[has], gene)
            out = np.zeros((len(features), part.dim_out), dtype=np.float32)
            out[has] = part.transform(
                values[has], None if covariates is None else np.asarray(covariates)[has]
            )
            yield gene, out

    def _side_by_side(
        self, features: GeneVectors, covariates: np.ndarray | None, known: np.ndarray
    ) -> list[np.ndarray]:
        """All genes of each model, float32 [n, columns]."""
        blocks: dict[str, list[np.ndarray]] = {model: [] for model in self.models}
        for gene, values in self._each(features, covariates, known):
            blocks[gene.model].append(values)
        empty = np.zeros((len(features), 0), dtype=np.float32)
        return [np.concatenate([empty, *own], axis=1) for own in blocks.values()]

    # -- files -------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """JSON values, and under "arrays" the NumPy arrays (for safetensors)."""
        parts = [None if part is None else part.to_dict() for part in self.parts]
        arrays = {
            f"{i}.{key}": array
            for i, part in enumerate(parts)
            if part is not None
            for key, array in part.pop("arrays").items()
        }
        axes = self.rotations or ()
        # safetensors writes the memory as it lies, whatever the strides.
        arrays |= {
            f"rotation.{i}": np.ascontiguousarray(a) for i, a in enumerate(axes) if a is not None
        }
        return {
            "kind": "genes",
            "widths": dict(self.widths),
            "genes": [list(gene) for gene in self.genes],
            "parts": parts,
            "together": self.together,
            "n_people": self.n_people,
            "explained": self.explained,
            "arrays": arrays,
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """The conditioner that `to_dict` described."""
        arrays: dict[str, dict[str, np.ndarray]] = {}
        for name, array in values["arrays"].items():
            head, _, tail = name.partition(".")
            arrays.setdefault(head, {})[tail] = array
        parts = tuple(
            None if part is None else Conditioner.from_dict({**part, "arrays": arrays[str(i)]})
            for i, part in enumerate(values["parts"])
        )
        rotation = arrays.get("rotation", {})
        axes = tuple(rotation.get(str(i)) for i in range(len(values["widths"])))
        return cls(
            widths=values["widths"],
            genes=tuple(Gene(*gene) for gene in values["genes"]),
            parts=parts,
            rotations=axes if values["together"] else None,
            n_people=values["n_people"],
            explained=values["explained"],
        )


def describe_genes(conditioner: GeneConditioner, *, name: str) -> None:
    """Say which genes are left out."""
    gone = [g.name for g, p in zip(conditioner.genes, conditioner.parts, strict=True) if p is None]
    if gone:
        example = ", ".join(dict.fromkeys(gone[:3]))
        say(
            f"{name}: {len(gone)} of {len(conditioner.genes)} genes do not vary among training "
            f"people, or fewer than {_LEAST_PEOPLE} of them have it: left out ({example})."
        )


def _check_finite(values: np.ndarray, gene: Gene) -> None:
    if bad := int((~np.isfinite(values).all(axis=1)).sum()):
        raise UserError(
            f"{gene.model} vectors of {gene.name} hold NaN or infinite values in {bad} of "
            f"{len(values)} rows: mask these, or make them again."
        )
