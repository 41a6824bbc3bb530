"""Alarms that save a cohort: what silently destroys the differences between people.

All people share more than 99.9 % of their sequence, so pooled embeddings differ between people by
about 1e-3 of their size. A bfloat16 holds 8 significant bits (2^-8 = 4e-3): on real haplotypes it
kept 17 to 45 % of the between-person variance, float16 69 to 93 %, float32 all of it.

Shape legend: n people, g genes, h width.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from brainfusion.genetics.statistics import SIGNIFICANT_BITS, GeneFigures, coarsest
from brainfusion.runtime.errors import UserError

MAX_MISSING = 0.5
"""Share of absent vectors above which a table is refused."""
MAX_TWINS = 0.25
"""Share of people with the very same vectors in all genes above which an alarm rings."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Alarm:
    """Something that reading found, its figure, and what to do about it."""

    name: str
    figure: float
    finding: str
    cure: str

    def __str__(self) -> str:
        return f"{self.name}: {self.finding}; {self.cure}"


def find_alarms(
    figures: Sequence[GeneFigures],
    n_genes_present: np.ndarray,
    *,
    where: str,
    undeclared: Sequence[str] = (),
    n_twins: int = 1,
) -> list[Alarm]:
    """All alarms that the vectors of a table give.

    Args:
        figures: One a gene.
        n_genes_present: Genes with a vector, a person: int [n].
        where: The file or folder, for errors.
        undeclared: Provenance that should be there and is not.
        n_twins: People in the largest group with the same vectors in all genes.

    Raises:
        UserError: Everyone has the same vectors, or most vectors are absent.
    """
    n = len(n_genes_present)
    n_vectors = n * len(figures)
    _refuse_empty(figures, n, 1.0 - int(n_genes_present.sum()) / max(1, n_vectors), where=where)
    alarms = [*_variance_alarms(figures), *_missing_alarms(n_genes_present, n_vectors)]
    if n_twins > max(2.0, MAX_TWINS * n):
        alarms.append(
            Alarm(
                name="repeated people",
                figure=n_twins / n,
                finding=f"{n_twins} of {n} people have the same vectors in all {len(figures)} "
                "genes",
                cure="expected of a few short genes; otherwise their own variants were not "
                "applied, or rows were copied: extract these people again",
            )
        )
    if undeclared:
        alarms.append(
            Alarm(
                name="undeclared",
                figure=len(undeclared),
                finding=f"provenance does not say {', '.join(undeclared)}",
                cure="add it to provenance.json, so that unlike tables are never mixed",
            )
        )
    return alarms


def mixture_alarms(covariates: Mapping[str, Mapping[str, int]]) -> list[Alarm]:
    """An alarm for each thing of which the files name several (devices, versions, windows ...).

    The same sequence gives other values on another GPU or with another block size
    (ArcInstitute/evo2#178, #196), by as much as people differ.

    Args:
        covariates: What -> value -> how many rows or files say so.
    """
    alarms = []
    for name, counts in covariates.items():
        if len(counts) < 2:
            continue
        total = sum(counts.values())
        most = max(counts, key=lambda value: counts[value])
        share = 1.0 - counts[most] / total
        listed = ", ".join(f"{value} {count / total:.0%}" for value, count in counts.items())
        alarms.append(
            Alarm(
                name=f"mixed {name}",
                figure=share,
                finding=f"{len(counts)} values of {name} in one table ({listed})",
                cure=f"extract all with '{most}', or keep {name} as a covariate: the difference "
                "between them may be as large as that between people",
            )
        )
    return alarms


def indel_alarms(share: float | None, *, unit_bp: int) -> list[Alarm]:
    """An alarm where tokens of several bases meet sequences with insertions and deletions.

    One deletion shifts the frame of all non-overlapping 6-mers behind it, half of a gene's tokens
    on average; a single-base variant changes one in a thousand.

    Args:
        share: Vectors whose sequence carries an indel; None if nothing is known of it.
        unit_bp: Base pairs a token.
    """
    if unit_bp < 2 or not share:
        return []
    return [
        Alarm(
            name="indel carriers",
            figure=share,
            finding=f"{share:.1%} of the vectors come from a sequence with an insertion or "
            f"deletion, which shifts all {unit_bp}-mers behind it",
            cure="apply single-base variants only (declare indels 'none'), or keep the flag as a "
            "covariate: carriers differ from the rest by an artefact",
        )
    ]


def padding_alarms(share: float, *, model: str) -> list[Alarm]:
    """An alarm where a model without an attention mask read padded sequences.

    Args:
        share: Of the sequences, those with padding.
        model: The family; only Caduceus reads padding as sequence, from both sides.
    """
    if model != "caduceus" or not share:
        return []
    return [
        Alarm(
            name="padded batches",
            figure=share,
            finding=f"{share:.1%} of the sequences were padded, and {model} has no attention mask, "
            "so padding changed their real positions too",
            cure="extract with batches of one, or of equal lengths",
        )
    ]


# -- what storage keeps ----------------------------------------------------------------------------


def variance_kept(vectors: np.ndarray, mask: np.ndarray | None = None) -> dict[str, float]:
    """The share of between-person variance that each way of storing vectors keeps.

    Share: the squared correlation over people between a column and the same column as stored (0 if
    it became constant), averaged over the columns that vary, genes alike.

    Args:
        vectors: float32 [n, h] of one gene, or [n, g, h]; as pooled, before any rounding.
        mask: bool [n] or [n, g], true where there is a vector; all if omitted.

    Returns:
        Keys "float32", "float16", "bfloat16", and the latter two "centred": after subtracting the
        mean of the people from each column, in float32. nan where nothing varies.
    """
    table = vectors[:, None] if vectors.ndim == 2 else vectors
    present = (
        np.ones(table.shape[:2], dtype=bool) if mask is None else mask.reshape(table.shape[:2])
    )
    kept: dict[str, list[float]] = {}
    for gene in range(table.shape[1]):
        exact = np.asarray(table[present[:, gene], gene], dtype=np.float32)
        centre = exact.mean(axis=0, dtype=np.float64).astype(np.float32) if len(exact) else 0.0
        centred = exact - centre
        for name, stored in (
            ("float32", exact),
            ("float16", to_float16(exact)),
            ("bfloat16", to_bfloat16(exact)),
            ("centred float16", to_float16(centred)),
            ("centred bfloat16", to_bfloat16(centred)),
        ):
            kept.setdefault(name, []).append(_shared_variance(exact, stored))
    return {name: _mean_of_known(shares) for name, shares in kept.items()}


def to_bfloat16(values: np.ndarray) -> np.ndarray:
    """float32 rounded to the nearest bfloat16 (ties to even), as float32."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    rounded = (bits + np.uint32(0x7FFF) + odd) & np.uint32(0xFFFF0000)
    return rounded.view(np.float32)


def to_float16(values: np.ndarray) -> np.ndarray:
    """float32 rounded to the nearest float16, as float32; too large values become inf."""
    with np.errstate(over="ignore"):
        return values.astype(np.float16).astype(np.float32)


def _shared_variance(exact: np.ndarray, stored: np.ndarray) -> float:
    if len(exact) < 2:
        return float("nan")
    a = exact - exact[0].astype(np.float64)
    b = np.nan_to_num(stored, posinf=0.0, neginf=0.0) - exact[0].astype(np.float64)
    a -= a.mean(axis=0)
    b -= b.mean(axis=0)
    spread = np.square(a).sum(axis=0)
    varies = spread > 0
    if not varies.any():
        return float("nan")
    left = np.square(b).sum(axis=0)
    shared = np.square((a * b).sum(axis=0))
    left_and_varies = (left > 0) & varies
    share = np.zeros(len(spread))
    np.divide(shared, spread * left, out=share, where=left_and_varies)
    return float(share[varies].mean())


def _mean_of_known(shares: Sequence[float]) -> float:
    known = [share for share in shares if not np.isnan(share)]
    return float(np.mean(known)) if known else float("nan")


# -- alarms of the vectors -------------------------------------------------------------------------


def _refuse_empty(figures: Sequence[GeneFigures], n: int, missing: float, *, where: str) -> None:
    if missing > MAX_MISSING:
        raise UserError(
            f"{where}: {missing:.0%} of the vectors are absent, nan, infinite or zero (at most "
            f"{MAX_MISSING:.0%} may be): extract them again, or leave these genes or people out."
        )
    compared = [gene for gene in figures if gene.n_present > 1]
    if compared and all(gene.all_equal for gene in compared):
        raise UserError(
            f"{where}: all people have the same vectors (1 distinct row in {n}): "
            "reference-only extraction, or precision lost before storage; extract from each "
            "person's own sequence (reference plus phased variants) and store float32."
        )


def _variance_alarms(figures: Sequence[GeneFigures]) -> list[Alarm]:
    alarms = []
    varying = [gene for gene in figures if gene.n_present > 1 and not gene.all_equal]
    relative = [gene.ratio * 2.0 ** SIGNIFICANT_BITS.get(gene.stored, 24) for gene in varying]
    if relative and np.median(relative) < 1.0:
        stored = coarsest(gene.stored for gene in varying)
        ratio = float(np.median([gene.ratio for gene in varying]))
        distinct = float(np.median([gene.distinct for gene in varying]))
        alarms.append(
            Alarm(
                name="precision",
                figure=ratio,
                finding=f"median sd/|mean| between people is {ratio:.1e}, below the step of "
                f"{stored} (2^-{SIGNIFICANT_BITS.get(stored, 24)}), and a column has "
                f"{distinct:.2f} distinct values a person: much of what differs was rounded away",
                cure="pool in float32 and store float32, or subtract the reference's embedding "
                "before rounding",
            )
        )
    if flat := sum(gene.all_equal for gene in figures):
        alarms.append(
            Alarm(
                name="constant genes",
                figure=flat / len(figures),
                finding=f"{flat} of {len(figures)} genes are the same in everyone",
                cure="check that their variants were applied, or leave these genes out",
            )
        )
    n_columns = sum(gene.width for gene in varying)
    if n_constant := sum(gene.n_constant for gene in varying):
        alarms.append(
            Alarm(
                name="constant columns",
                figure=n_constant / n_columns,
                finding=f"{n_constant / n_columns:.1%} of the columns are the same in everyone",
                cure="harmless if few; if many, check precision and layer",
            )
        )
    return alarms


def _missing_alarms(n_genes_present: np.ndarray, n_vectors: int) -> list[Alarm]:
    alarms = []
    if n_missing := n_vectors - int(n_genes_present.sum()):
        alarms.append(
            Alarm(
                name="missing vectors",
                figure=n_missing / n_vectors,
                finding=f"{n_missing} of {n_vectors} vectors are absent, nan, infinite or zero",
                cure="they are masked, never imputed; extract them again if they should be there",
            )
        )
    if n_empty := int((n_genes_present == 0).sum()):
        alarms.append(
            Alarm(
                name="people without vectors",
                figure=n_empty / len(n_genes_present),
                finding=f"{n_empty} of {len(n_genes_present)} people have no vector at all",
                cure="they cannot be aligned; leave them out or extract them",
            )
        )
    return alarms
