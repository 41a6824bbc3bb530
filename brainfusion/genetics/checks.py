"""Alarms that save a cohort: what silently destroys the differences between people.

All people share more than 99.9 % of their sequence, so pooled embeddings differ between people by
about 1e-3 of their size. A bfloat16 holds 8 significant bits (2^-8 = 4e-3): on real haplotypes it
kept 17 to 45 % of the between-person variance, float16 69 to 93 %, float32 all of it.

Shape legend: n people, g genes, h width.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from brainfusion.runtime.errors import UserError

SIGNIFICANT_BITS = {"bfloat16": 8, "float16": 11, "float32": 24, "float64": 53}
MAX_MISSING = 0.5
"""Share of absent vectors above which a table is refused."""

_BLOCK_ROWS = 1024
_N_SAMPLED_COLUMNS = 16
_ENSEMBL = re.compile(r"ENS[A-Z]*G\d{11}(\.\d+)?")


@dataclass(frozen=True, kw_only=True, slots=True)
class Alarm:
    """Something that reading found, its figure, and what to do about it."""

    name: str
    figure: float
    finding: str
    cure: str

    def __str__(self) -> str:
        return f"{self.name}: {self.finding}; {self.cure}"


@dataclass(frozen=True, kw_only=True, slots=True)
class GeneFigures:
    """What the alarms need to know of one gene's vectors."""

    n_present: int
    ratio: float
    """Median over columns of (sd between people) / |mean|; nan with fewer than two people."""
    n_constant: int
    """Columns in which all people have the same number."""
    width: int
    stored: str
    """The coarsest type that the vectors went through."""
    distinct: float
    """Median over columns of distinct values / people."""

    @property
    def all_equal(self) -> bool:
        """Whether at least two people have a vector, and all the same one."""
        return self.n_present > 1 and self.n_constant == self.width


# -- vectors ---------------------------------------------------------------------------------------


def resolution(values: np.ndarray) -> str:
    """The coarsest type that holds every one of these float32 values exactly.

    Vectors that were stored as bfloat16 or float16 and then written as float32 give themselves
    away: their last 16 (13) bits are zero.
    """
    rest = {"bfloat16": 0xFFFF, "float16": 0x1FFF}
    for start in range(0, len(values), _BLOCK_ROWS):
        # Absent vectors are nan, whose bits mean nothing.
        block = np.nan_to_num(values[start : start + _BLOCK_ROWS], nan=0.0, posinf=0.0, neginf=0.0)
        bits = np.ascontiguousarray(block, dtype=np.float32).view(np.uint32)
        rest = {dtype: low for dtype, low in rest.items() if not np.any(bits & np.uint32(low))}
        if not rest:
            return "float32"
    # All zeros in 16 bits means all zeros in 13 too: bfloat16 is the coarser of the two.
    return next(iter(rest))


def coarsest(dtypes: Iterable[str]) -> str:
    """The type with the fewest significant bits."""
    return min(dtypes, key=lambda dtype: SIGNIFICANT_BITS.get(dtype, 24))


def clean(vectors: np.ndarray) -> np.ndarray:
    """Zero, in place, rows of [n, h] with nan, inf or only zeros; the mask [n] of the others."""
    mask = np.isfinite(vectors).all(axis=1) & (vectors != 0).any(axis=1)
    vectors[~mask] = 0.0
    return mask


def describe(vectors: np.ndarray, mask: np.ndarray, *, stored: str) -> GeneFigures:
    """The figures of one gene: vectors float32 [n, h], mask bool [n]. Streams in blocks of rows."""
    rows = np.flatnonzero(mask)
    width, n = vectors.shape[1], len(rows)
    if n < 2:
        return GeneFigures(
            n_present=n, ratio=np.nan, n_constant=0, width=width, stored=stored, distinct=1.0
        )
    # Differences from one person are exact where sums of nearly equal numbers are not.
    first = vectors[rows[0]]
    total, squares = np.zeros(width), np.zeros(width)
    for start in range(0, n, _BLOCK_ROWS):
        offset = vectors[rows[start : start + _BLOCK_ROWS]].astype(np.float64) - first
        total += offset.sum(axis=0)
        squares += np.square(offset).sum(axis=0)
    mean = np.abs(first + total / n)
    sd = np.sqrt(np.maximum(squares - total**2 / n, 0.0) / (n - 1))
    constant = squares == 0
    ratio = np.where(constant, 0.0, sd / np.maximum(mean, np.finfo(np.float32).tiny))
    sample = np.linspace(0, width - 1, min(width, _N_SAMPLED_COLUMNS)).astype(np.int64)
    n_distinct = [len(np.unique(vectors[rows, column])) for column in sample]
    return GeneFigures(
        n_present=n,
        ratio=float(np.median(ratio)),
        n_constant=int(constant.sum()),
        width=width,
        stored=stored,
        distinct=float(np.median(n_distinct)) / n,
    )


def find_alarms(
    figures: Sequence[GeneFigures], mask: np.ndarray, *, where: str, undeclared: Sequence[str] = ()
) -> list[Alarm]:
    """All alarms of a table.

    Args:
        figures: One a gene.
        mask: bool [n, g].
        where: The file or folder, for errors.
        undeclared: Provenance that should be there and is not.

    Raises:
        UserError: Everyone has the same vectors, or most vectors are absent.
    """
    _refuse_empty(figures, mask, where=where)
    alarms = [*_variance_alarms(figures), *_missing_alarms(mask)]
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


def _refuse_empty(figures: Sequence[GeneFigures], mask: np.ndarray, *, where: str) -> None:
    missing = 1.0 - float(mask.mean()) if mask.size else 1.0
    if missing > MAX_MISSING:
        raise UserError(
            f"{where}: {missing:.0%} of the vectors are absent, nan, infinite or zero (at most "
            f"{MAX_MISSING:.0%} may be): extract them again, or leave these genes or people out."
        )
    compared = [gene for gene in figures if gene.n_present > 1]
    if compared and all(gene.all_equal for gene in compared):
        raise UserError(
            f"{where}: all people have the same vectors (1 distinct row in {mask.shape[0]}): "
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


def _missing_alarms(mask: np.ndarray) -> list[Alarm]:
    alarms = []
    if n_missing := int(mask.size - np.count_nonzero(mask)):
        alarms.append(
            Alarm(
                name="missing vectors",
                figure=n_missing / mask.size,
                finding=f"{n_missing} of {mask.size} vectors are absent, nan, infinite or zero",
                cure="they are masked, never imputed; extract them again if they should be there",
            )
        )
    if n_empty := int((~mask.any(axis=1)).sum()):
        alarms.append(
            Alarm(
                name="people without vectors",
                figure=n_empty / mask.shape[0],
                finding=f"{n_empty} of {mask.shape[0]} people have no vector at all",
                cure="they cannot be aligned; leave them out or extract them",
            )
        )
    return alarms


# -- ids -------------------------------------------------------------------------------------------


def text_ids(values: Sequence[object] | np.ndarray, *, what: str, where: str) -> tuple[str, ...]:
    """Ids as text, checked.

    Args:
        values: Text or whole numbers.
        what: "subject" or "gene".
        where: The file, for errors.

    Raises:
        UserError: Absent, duplicate or empty ids, or ids that were numbers with a decimal point on
            the way: leading zeros are then lost, and "1000234.0" joins with nobody.
    """
    if isinstance(values, np.ndarray) and values.dtype.kind not in "USiuTO":
        raise UserError(
            f"{where}: {what} ids are {values.dtype}, which has lost leading zeros: write them as "
            "text, for example ids.astype(str) of what was read with dtype=str."
        )
    if isinstance(values, np.ndarray) and values.dtype.kind == "S":
        values = np.char.decode(values, "utf-8")
    ids = tuple(values.tolist() if isinstance(values, np.ndarray) else values)
    if any(not isinstance(value, (str, int)) or isinstance(value, bool) for value in ids):
        raise UserError(f"{where}: {what} ids must be text; some are absent or of another type.")
    names = tuple(str(value) for value in ids)
    if not names:
        raise UserError(f"{where}: no {what}s.")
    if n_bad := sum(not name or name != name.strip() for name in names):
        raise UserError(
            f"{where}: {n_bad} {what} ids are empty or begin or end with a space: correct them."
        )
    if what == "subject":
        _check_subjects(names, where=where)
    else:
        _check_genes(names, where=where)
    if n_twice := len(names) - len(set(names)):
        seen: set[str] = set()
        twice = list(dict.fromkeys(name for name in names if name in seen or seen.add(name)))
        raise UserError(
            f"{where}: {n_twice} duplicate {what} ids ({', '.join(twice[:3])}"
            f"{' ...' if len(twice) > 3 else ''}): one row each is expected; average a person's "
            "haplotypes, and keep one of repeated rows."
        )
    return names


def _check_subjects(names: tuple[str, ...], *, where: str) -> None:
    if n_float := sum(re.fullmatch(r"-?\d+\.0+", name) is not None for name in names):
        raise UserError(
            f"{where}: {n_float} subject ids end in '.0': they were read as numbers on the way, "
            "which drops leading zeros too. Read the id column as text (pandas dtype=str, polars "
            "pl.String) and write the file again."
        )
    if n_negative := sum(re.fullmatch(r"-\d+", name) is not None for name in names):
        raise UserError(
            f"{where}: {n_negative} subject ids are negative numbers, as withdrawn people are "
            "marked: leave these rows out."
        )


def _check_genes(names: tuple[str, ...], *, where: str) -> None:
    matches = [_ENSEMBL.fullmatch(name) for name in names]
    n_ensembl = sum(match is not None for match in matches)
    if any(match is not None and match.group(1) for match in matches):
        raise UserError(
            f"{where}: Ensembl gene ids carry versions (such as {names[0]}): drop what follows the "
            "point, since versions differ between releases."
        )
    if 0 < n_ensembl < len(names):
        raise UserError(
            f"{where}: {n_ensembl} of {len(names)} gene ids are Ensembl's, the others are not: use "
            "one namespace, so that a gene is not counted twice."
        )
