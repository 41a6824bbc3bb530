"""Embeddings as a long Parquet table: one row a person and gene.

    eid | subject | subject_id      text (whole numbers are taken as they are)
    gene | gene_id                  not needed where provenance says "level": "subject"
    vector | embedding              list of floats
    source_model | model_name       optional; rows of other models are left out, and counted
    layer                           optional; one must be named where there are several

Shape legend: n people, w stored width, r rows.
"""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from brainfusion.genetics.checks import text_ids
from brainfusion.genetics.models import REGISTRY, plain_name
from brainfusion.genetics.source import Source, choose_layer
from brainfusion.runtime import logs
from brainfusion.runtime.errors import UserError

if TYPE_CHECKING:
    import polars as pl

ALIASES = {
    "subject": ("subject", "eid", "subject_id"),
    "gene": ("gene", "gene_id"),
    "vector": ("vector", "embedding"),
    "source_model": ("source_model", "model_name"),
    "layer": ("layer",),
}


def open_long(
    files: list[Path], *, model: str, checkpoint: str, layer: str | None, level: str
) -> Source:
    """Open a table, or the parts of one.

    Raises:
        UserError: Absent columns, ids that were numbers with a decimal point, several vectors of
            one person and gene, vectors of several widths, no rows of the model.
    """
    import polars as pl

    where = files[0]
    table = _read(files)
    if "gene" not in table.columns:
        if level != "subject":
            raise UserError(
                f'{where}: no gene column (gene or gene_id); declare "level": "subject" in '
                "provenance.json if each person has one vector."
            )
        table = table.with_columns(gene=pl.lit("all"))
    if "source_model" in table.columns:
        table = _rows_of_model(table, model, checkpoint, where=where)
    if "layer" in table.columns:
        available = [str(value) for value in table["layer"].unique().sort().drop_nulls()]
        layer = choose_layer(available, layer, where=where)
        table = table.filter(table["layer"].cast(pl.String) == layer)
    subject_ids, rows = _codes(table["subject"], what="subject", where=where)
    gene_ids, columns = _codes(table["gene"], what="gene", where=where)
    pairs = rows * len(gene_ids) + columns
    if n_repeated := len(pairs) - len(np.unique(pairs)):
        raise UserError(
            f"{where}: {n_repeated} rows repeat a person and gene: one vector each is expected; "
            "average a person's two haplotypes first."
        )
    vectors, present, dtype = _vectors(table["vector"], where=where)

    def load(column: int) -> tuple[np.ndarray, str]:
        wanted = np.flatnonzero((columns == column) & present)
        values = np.full((len(subject_ids), vectors.shape[1]), np.nan, dtype=np.float32)
        values[rows[wanted]] = vectors[position[wanted]]
        return values, dtype

    position = np.cumsum(present) - 1  # absent vectors have no row in `vectors`
    return Source(subjects=subject_ids, genes=gene_ids, layer=layer, load=load)


def _read(files: list[Path]) -> "pl.DataFrame":
    import polars as pl

    parts = []
    for file in files:
        try:
            columns = list(pl.read_parquet_schema(file))
            renamed = _renames(columns, where=file)
            parts.append(pl.read_parquet(file, columns=list(renamed)).rename(renamed))
        except (pl.exceptions.ComputeError, OSError) as error:
            text = " ".join(str(error).split())[:120]
            raise UserError(
                f"{file} cannot be read as Parquet ({text}): write it again."
            ) from error
        if parts[-1].schema != parts[0].schema:
            raise UserError(f"{file}: columns or types differ from those of {files[0]}.")
    return pl.concat(parts)


def _renames(columns: list[str], *, where: Path) -> dict[str, str]:
    renamed = {}
    for name, aliases in ALIASES.items():
        found = [alias for alias in aliases if alias in columns]
        if len(found) > 1:
            raise UserError(f"{where}: columns {' and '.join(found)} mean the same: keep one.")
        if found:
            renamed[found[0]] = name
        elif name in ("subject", "vector"):
            raise UserError(
                f"{where}: no {name} column; expected {' or '.join(aliases)}, found "
                f"{', '.join(columns[:8])}."
            )
    return renamed


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
    names = column.cast(pl.String).unique(maintain_order=True)
    ids = text_ids(names.to_list(), what=what, where=str(where))
    place = pl.DataFrame({"name": list(ids), "place": np.arange(len(ids))})
    codes = pl.DataFrame({"name": column.cast(pl.String)}).join(
        place, on="name", how="left", maintain_order="left"
    )
    return ids, codes["place"].to_numpy()


def _vectors(column: "pl.Series", *, where: Path) -> tuple[np.ndarray, np.ndarray, str]:
    """float32 [r with a vector, w], which of the rows have one, and the type as stored."""
    import polars as pl

    if isinstance(column.dtype, pl.Array):
        column = column.arr.to_list()
    inner = column.dtype.inner if isinstance(column.dtype, pl.List) else None
    if inner is None or not inner.is_numeric():  # type: ignore[union-attr]
        raise UserError(f"{where}: vectors are {column.dtype}, expected a list of floats.")
    lengths = column.list.len().fill_null(0).to_numpy()
    present = lengths > 0
    widths = np.unique(lengths[present])
    if len(widths) != 1:
        raise UserError(f"{where}: vectors of several widths ({', '.join(map(str, widths[:4]))}).")
    dtype = str(inner).lower() if inner.is_float() else "float32"  # type: ignore[union-attr]
    flat = column.filter(pl.Series(present)).explode().cast(pl.Float32)
    values = flat.fill_null(float("nan")).to_numpy()
    return values.reshape(-1, int(widths[0])), present, dtype
