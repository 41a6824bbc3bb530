"""Per-gene PCA, fitted on training people only and read block by block.

A gene of few training people is solved exactly from their Gram matrix, a gene of narrow vectors
exactly from its covariance, accumulated in float64 (Pebay 2008, SAND2008-6212: moments of blocks
add up). Where both are large, blocks are merged as sklearn's `IncrementalPCA` does (Ross 2008),
which is close to exact for the first components.

Shape legend: n people, g genes, h width, k components.
"""

import dataclasses
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from brainfusion.genetics.features import GeneticFeatures, Provenance
from brainfusion.runtime.errors import UserError
from brainfusion.runtime.files import atomic_folder, read_json, write_json
from brainfusion.runtime.logs import Progress

FORMAT = 1
MAX_EXACT = 4096
"""The largest matrix that is decomposed exactly."""

_BLOCK_ROWS = 1024
_RANK_TOLERANCE = 1e-10
"""Variance, relative to the largest, below which a component is rounding: it is left at zero."""


@dataclass(frozen=True, kw_only=True, eq=False)
class GenePCA:
    """The principal components of each gene."""

    genes: tuple[str, ...]
    means: np.ndarray
    """float32 [g, h], of the training people."""
    components: np.ndarray
    """float32 [g, k, h], orthonormal, by falling variance; the largest loading is positive. Zero
    beyond the rank that a gene's training people have."""
    variances: np.ndarray
    """float64 [g, k], of the training people's scores (divided by people - 1)."""
    shares: np.ndarray
    """float64 [g], the share of a gene's variance that all k explain; zero if it has none."""
    n_people: int
    """Training people."""
    subjects_hash: str
    """Of their ids, in order."""
    haplotypes: str
    """How two haplotypes had become one vector."""
    provenance: dict[str, Any]
    """Of the features that it was fitted on."""

    @property
    def n_components(self) -> int:
        """Numbers that a gene becomes."""
        return self.components.shape[1]

    @classmethod
    def fit(
        cls, features: GeneticFeatures, subjects: Sequence[str], *, n_components: int
    ) -> "GenePCA":
        """Fit on the named people; nobody else's vectors are read.

        Raises:
            UserError: More components than numbers in a vector, or fewer than two people.
        """
        if not 1 <= n_components <= features.width:
            raise UserError(
                f"{n_components} components of vectors of {features.width} numbers: expected 1 to "
                f"{features.width}."
            )
        training = features.select(subjects)
        if training.n_subjects < 2:
            raise UserError(f"PCA needs 2 training people or more, got {training.n_subjects}.")
        g, h = features.n_genes, features.width
        means = np.zeros((g, h), dtype=np.float32)
        components = np.zeros((g, n_components, h), dtype=np.float32)
        variances, shares = np.zeros((g, n_components)), np.zeros(g)
        progress = Progress("PCA, genes", g)
        for gene in range(g):
            rows = np.flatnonzero(training.mask[:, gene])
            if len(rows) > 1:
                mean, loadings, spread, total = _decompose(training, gene, rows, n_components)
                means[gene], components[gene], variances[gene] = mean, loadings, spread
                shares[gene] = spread.sum() / total if total > 0 else 0.0
            progress.update(gene + 1)
        return cls(
            genes=features.genes,
            means=means,
            components=components,
            variances=variances,
            shares=shares,
            n_people=training.n_subjects,
            subjects_hash=_hash_ids(subjects),
            haplotypes=features.haplotypes,
            provenance=features.provenance.to_dict(),
        )

    def transform(self, features: GeneticFeatures) -> GeneticFeatures:
        """Scores of anybody's vectors, [n, g, k] in memory; a gene that is absent stays so.

        Raises:
            UserError: Genes, widths or haplotypes that it was not fitted on.
        """
        self._check(features)
        chosen = features.select(features.subjects, self.genes)
        scores = np.zeros((chosen.n_subjects, len(self.genes), self.n_components), np.float32)
        for gene in range(len(self.genes)):
            rows = np.flatnonzero(chosen.mask[:, gene])
            for part, block in _blocks(chosen, gene, rows):
                scores[part, gene] = (block - self.means[gene]) @ self.components[gene].T
        step = f"PCA to {self.n_components} a gene, fitted on {self.n_people} people"
        provenance: Provenance = dataclasses.replace(
            chosen.provenance, steps=(*chosen.provenance.steps, step)
        )
        return dataclasses.replace(
            chosen, vectors=scores, mask=np.array(chosen.mask), provenance=provenance
        )

    def save(self, path: Path) -> None:
        """Write the folder `path`: an array a file, and `pca.json`."""
        with atomic_folder(path) as folder:
            for name in _ARRAYS:
                np.save(folder / f"{name}.npy", getattr(self, name), allow_pickle=False)
            facts = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
            facts = {key: value for key, value in facts.items() if key not in _ARRAYS}
            write_json(folder / "pca.json", {"format": FORMAT, **facts, "genes": list(self.genes)})

    @classmethod
    def load(cls, path: Path) -> "GenePCA":
        """Read what `save` wrote.

        Raises:
            UserError: It is not there, incomplete, or of another format.
        """
        names = ("pca.json", *(f"{name}.npy" for name in _ARRAYS))
        if missing := [name for name in names if not (path / name).exists()]:
            raise UserError(f"the PCA {path} lacks {', '.join(missing)}: fit it again.")
        facts = read_json(path / "pca.json")
        if facts.pop("format", None) != FORMAT:
            raise UserError(f"{path / 'pca.json'}: not of format {FORMAT}: fit it again.")
        arrays = {name: np.load(path / f"{name}.npy", allow_pickle=False) for name in _ARRAYS}
        return cls(**{**facts, "genes": tuple(facts["genes"])}, **arrays)

    def _check(self, features: GeneticFeatures) -> None:
        if n_absent := len(set(self.genes) - set(features.genes)):
            raise UserError(
                f"{n_absent} of the {len(self.genes)} genes of this PCA are not in the features: "
                "fit it again on these genes."
            )
        ours = (self.means.shape[1], self.haplotypes)
        if ours != (features.width, features.haplotypes):
            raise UserError(
                f"vectors of {features.width} numbers, haplotypes '{features.haplotypes}', but the "
                f"PCA was fitted on {ours[0]}, '{ours[1]}': fit it again."
            )


_ARRAYS = ("means", "components", "variances", "shares")


def _decompose(
    features: GeneticFeatures, gene: int, rows: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    """Mean [h], loadings [k, h], variances [k] and the total variance of one gene."""
    n, h = len(rows), features.width
    # Differences from one person are exact where sums of nearly equal numbers are not.
    shift = features.column(gene, rows[:1])[0].astype(np.float64)
    if n <= min(h, MAX_EXACT):
        x = features.column(gene, rows) - shift
        mean = x.mean(axis=0)
        x -= mean
        values, vectors = _largest(x @ x.T / (n - 1), k)
        loadings = (x.T @ vectors).T
        total = float(np.square(x).sum()) / (n - 1)
    elif h <= MAX_EXACT:
        sums, squares = np.zeros(h), np.zeros((h, h))
        for _, block in _blocks(features, gene, rows):
            x = block - shift
            sums += x.sum(axis=0)
            squares += x.T @ x
        mean = sums / n
        covariance = (squares - n * np.outer(mean, mean)) / (n - 1)
        values, vectors = _largest(covariance, k)
        loadings = vectors.T
        total = float(np.trace(covariance))
    else:
        mean, values, loadings, total = _incremental(features, gene, rows, shift, k)
    return shift + mean, *_ordered(values, loadings, k), total


def _largest(matrix: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The largest eigenvalues and their vectors (in columns), at most k, falling."""
    from scipy.linalg import eigh

    size = len(matrix)
    values, vectors = eigh(matrix, subset_by_index=[max(size - k, 0), size - 1])
    return values[::-1], vectors[:, ::-1]


def _incremental(
    features: GeneticFeatures, gene: int, rows: np.ndarray, shift: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    from sklearn.decomposition import IncrementalPCA

    model = IncrementalPCA(n_components=k)
    # Each block needs as many rows as there are components: the last, short one joins another.
    step = max(_BLOCK_ROWS, 2 * k)
    starts = list(range(0, len(rows), step))
    if len(starts) > 1 and len(rows) - starts[-1] < k:
        starts.pop()
    for start, stop in zip(starts, [*starts[1:], len(rows)], strict=True):
        model.partial_fit(features.column(gene, rows[start:stop]) - shift)
    mean, variances, spread, loadings = (
        np.asarray(fitted)
        for fitted in (model.mean_, model.var_, model.explained_variance_, model.components_)
    )
    total = float(variances.sum()) * len(rows) / (len(rows) - 1)
    return mean, spread, loadings, total


def _ordered(values: np.ndarray, loadings: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Loadings [k, h] of unit length and one sign, and variances [k]; zeros beyond the rank."""
    out, variances = np.zeros((k, loadings.shape[1])), np.zeros(k)
    kept = np.flatnonzero(values > _RANK_TOLERANCE * max(values[0], 0.0))
    loadings = loadings[kept] / np.linalg.norm(loadings[kept], axis=1, keepdims=True)
    largest = np.abs(loadings).argmax(axis=1)
    loadings *= np.sign(loadings[np.arange(len(kept)), largest])[:, None]
    out[: len(kept)], variances[: len(kept)] = loadings, values[kept]
    return out, variances


def _blocks(
    features: GeneticFeatures, gene: int, rows: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Rows and their vectors of one gene, float32, in blocks."""
    for start in range(0, len(rows), _BLOCK_ROWS):
        part = rows[start : start + _BLOCK_ROWS]
        yield part, features.column(gene, part)


def _hash_ids(subjects: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(subjects).encode()).hexdigest()[:16]
