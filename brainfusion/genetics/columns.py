"""The columns of a table of one row a vector: what they are called, and what they say.

Shape legend: r rows, w stored width.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from brainfusion.genetics.ids import text_ids
from brainfusion.genetics.layout import Wanted
from brainfusion.genetics.long import LongTable, long_source
from brainfusion.genetics.models import FREE, REGISTRY, plain_name
from brainfusion.genetics.source import COVARIATES, Findings, Source, choose_layer
from brainfusion.runtime import logs
from brainfusion.runtime.errors import UserError

if TYPE_CHECKING:
    import polars as pl

ALIASES = {
    "subject": (
        "subject", "eid", "subject_id", "participant", "participant_id", "sample", "sample_id",
        "iid", "IID", "individual_id", "person_id",
    ),
    "gene": ("gene", "gene_id", "gene_name", "gene_symbol", "ensembl_id", "region"),
    "vector": ("vector", "embedding", "embeddings", "vectors"),
    "source_model": ("source_model", "model_name", "model"),
    "layer": ("layer", "layer_name"),
    "haplotype": ("haplotype", "hap", "phase"),
    "strand": ("strand",),
    "indel": ("indel", "indels", "has_indel", "n_indels"),
    "length_bp": ("length_bp", "seq_len_bp"),
}  # fmt: skip
"""What columns are called."""

_REVERSE = ("rc", "rev", "reverse", "-", "-1", "minus", "r")


def renames(columns: list[str], *, where: Path) -> dict[str, str]:
    """Column -> the key of `ALIASES` that it is.

    Raises:
        UserError: Two columns that mean the same, or none of people or vectors.
    """
    renamed = {}
    for name, aliases in ALIASES.items():
        found = [alias for alias in aliases if alias in columns]
        if len(found) > 1:
            raise UserError(f"{where}: columns {' and '.join(found)} mean the same: keep one.")
        if found:
            renamed[found[0]] = name
        elif name in ("subject", "vector"):
            raise UserError(
                f"{where}: no {name} column; expected {' or '.join(aliases[:2])}, found "
                f"{', '.join(columns[:8])}."
            )
    return renamed


@dataclass(frozen=True, kw_only=True)
class RowVectors:
    """The vectors of a table's rows."""

    read: Callable[[int], Iterator[np.ndarray]]
    """(first row) -> float32 pieces [., w] from there to the end, nan where absent."""
    width: int
    dtype: str
    """The type as stored."""
    parts: tuple[int, ...]
    """Row numbers at which parts of the table begin, and r."""


def source_of_rows(
    table: "pl.DataFrame", vectors: RowVectors, wanted: Wanted, *, where: Path
) -> Source:
    """A source from the id columns of all rows (named as the keys of `ALIASES`) and their vectors.

    Raises:
        UserError: As `tables.open_long`.
    """
    layout = wanted.layout
    if layout.pool is not None:
        raise UserError(
            f"{where}: token level is declared, but a table holds one vector a row: correct level "
            "in provenance.json, or give the arrays of positions."
        )
    table, layer = _wanted_rows(table.with_row_index("row"), wanted, where=where)
    subject_ids, rows = _codes(table["subject"], what="subject", where=where)
    gene_ids, columns = _codes(table["gene"], what="gene", where=where)
    haplotypes = _pair(table, "haplotype", where=where)
    strands = _pair(table, "strand", where=where)
    if (strands is not None) != layout.has_strands:
        found, should = ("no ", "not ") if strands is None else ("a ", "")
        raise UserError(
            f'{where}: there is {found}column strand of two words, so "strands" in '
            f'provenance.json should {should}be "pair".'
        )
    if layout.has_haplotypes and haplotypes is None:
        raise UserError(
            f"{where}: haplotypes=2 is declared, but there is no column haplotype of two words."
        )
    extras = np.zeros(len(table), dtype=np.int64)
    pairs = [codes for codes in (haplotypes, strands) if codes is not None]
    for codes in pairs:
        extras = 2 * extras + codes
    kept = table["row"].to_numpy().astype(np.int64)
    is_whole = len(kept) == vectors.parts[-1]
    return long_source(
        LongTable(
            where=where,
            subjects=subject_ids,
            genes=gene_ids,
            rows=rows,
            columns=columns,
            extras=extras,
            pair_axes=(2,) * len(pairs),
            has_haplotypes=haplotypes is not None,
            has_strands=strands is not None,
            width=vectors.width,
            dtype=vectors.dtype,
            layer=layer,
            parts=tuple(int(place) for place in np.searchsorted(kept, vectors.parts)),
            vectors=vectors.read if is_whole else _only(vectors.read, kept),
            findings=_findings(table),
        )
    )


def _wanted_rows(
    table: "pl.DataFrame", wanted: Wanted, *, where: Path
) -> tuple["pl.DataFrame", str | None]:
    """The rows of the model and the layer that are asked for, and the layer."""
    import polars as pl

    if "gene" not in table.columns:
        if wanted.level != "subject":
            raise UserError(
                f'{where}: no gene column (gene or gene_id); declare "level": "subject" in '
                "provenance.json if each person has one vector."
            )
        table = table.with_columns(gene=pl.lit("all"))
    if "source_model" in table.columns and wanted.model not in FREE:
        table = _rows_of_model(table, wanted.model, wanted.checkpoint, where=where)
    layer = wanted.layer
    if "layer" in table.columns:
        available = [str(value) for value in table["layer"].unique().sort().drop_nulls()]
        layer = choose_layer(available, layer, where=where)
        if available:
            table = table.filter(table["layer"].cast(pl.String) == layer)
    return table, layer


def _only(
    vectors: Callable[[int], Iterator[np.ndarray]], kept: np.ndarray
) -> Callable[[int], Iterator[np.ndarray]]:
    """Pieces of the rows that are kept, numbered anew."""

    def read(start: int) -> Iterator[np.ndarray]:
        if start >= len(kept):
            return
        row = int(kept[start])
        for piece in vectors(row):
            low, high = np.searchsorted(kept, [row, row + len(piece)])
            if high > low:
                yield piece[kept[low:high] - row]
            row += len(piece)
            if high == len(kept):
                return

    return read


def _findings(table: "pl.DataFrame") -> Findings:
    import polars as pl

    findings = Findings()
    for name in COVARIATES:
        if name in table.columns:
            counts = table[name].cast(pl.String).drop_nulls().value_counts(sort=True)
            findings.covariates[name] = Counter(dict(counts.iter_rows()))
    if "length_bp" in table.columns:
        findings.lengths_bp = {int(length) for length in table["length_bp"].drop_nulls().unique()}
    if "indel" in table.columns:
        flags = table["indel"].drop_nulls().cast(pl.Int64)
        findings.n_flagged, findings.n_indels = len(flags), int((flags != 0).sum())
    return findings


def _pair(table: "pl.DataFrame", name: str, *, where: Path) -> np.ndarray | None:
    """0 or 1 a row, for a column of two words; None without one, or with one word only."""
    import polars as pl

    if name not in table.columns:
        return None
    column = table[name].cast(pl.String)
    words = sorted(column.drop_nulls().unique().to_list())
    if column.null_count() or len(words) > 2:
        raise UserError(
            f"{where}: column {name} has {len(words)} different words and {column.null_count()} "
            "empty rows, expected 2 words."
        )
    if len(words) < 2:
        return None
    second = words[1] if name == "haplotype" else next((w for w in words if w in _REVERSE), None)
    if second is None:
        raise UserError(f"{where}: strands are called {' and '.join(words)}, expected + and -.")
    return (column == second).to_numpy().astype(np.int64)


def _rows_of_model(
    table: "pl.DataFrame", model: str, checkpoint: str, *, where: Path
) -> "pl.DataFrame":
    found = [str(value) for value in table["source_model"].unique().sort()]
    others = {name for family in REGISTRY.values() for name in family} - {plain_name(checkpoint)}

    def is_ours(source: str) -> bool:
        short = plain_name(source)
        return short in (model, plain_name(checkpoint)) or (
            short.lower().startswith(model) and short not in others
        )

    ours = [source for source in found if is_ours(source)]
    if len(ours) != 1:
        problem = "no rows" if not ours else f"rows of {len(ours)} models ({', '.join(ours)})"
        raise UserError(
            f"{where}: {problem} of '{checkpoint}' by column source_model; it has "
            f"{', '.join(found[:6])}. Declare the checkpoint by the name in the table."
        )
    kept = table.filter(table["source_model"] == ours[0])
    if len(kept) < len(table):
        logs.say(f"{where}: left out {len(table) - len(kept)} rows of other models than {ours[0]}")
    return kept


def _codes(column: "pl.Series", *, what: str, where: Path) -> tuple[tuple[str, ...], np.ndarray]:
    """The distinct ids in order of appearance, and each row's place among them [r]."""
    import polars as pl

    if column.dtype.is_float():
        raise UserError(
            f"{where}: {what} ids are {column.dtype}, which has lost leading zeros and joins with "
            "nobody: read the ids as text where the table was made, and write it again."
        )
    if column.dtype not in (pl.String, pl.Categorical) and not column.dtype.is_integer():
        raise UserError(f"{where}: {what} ids are {column.dtype}, expected text.")
    written = column.cast(pl.String).unique(maintain_order=True)
    ids = text_ids(written.to_list(), what=what, where=str(where))
    place = pl.DataFrame({"name": written, "place": np.arange(len(ids))})
    codes = pl.DataFrame({"name": column.cast(pl.String)}).join(
        place, on="name", how="left", maintain_order="left"
    )
    return ids, codes["place"].to_numpy()
