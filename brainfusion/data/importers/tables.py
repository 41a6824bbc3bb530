"""Tables: of people (Parquet, CSV, TSV), and of one recording's numbers, with or without header.

Shape legend: p parcels, t TRs.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import polars as pl

from brainfusion.runtime.errors import UserError, nearest

_NULLS = ["", "NA", "N/A", "n/a", "nan", "NaN", "null"]
_INDEX_NAMES = ("", "Unnamed: 0")


def read_table(path: Path, *, text: Sequence[str] = ()) -> tuple[list[str], pl.DataFrame]:
    """Read a Parquet, CSV or TSV table with a header; the columns `text` stay text.

    Raises:
        UserError: The file is absent, of another form, or broken.
    """
    if not path.is_file():
        raise UserError(f"{path} does not exist: expected a Parquet, CSV or TSV table.")
    try:
        if path.suffix == ".parquet":
            table = pl.read_parquet(path)
        elif path.suffix in (".csv", ".tsv"):
            separator = "," if path.suffix == ".csv" else "\t"
            columns = pl.read_csv(path, separator=separator, n_rows=0).columns
            table = pl.read_csv(
                path,
                separator=separator,
                null_values=_NULLS,
                infer_schema_length=None,
                schema_overrides={name: pl.String for name in columns if name in text},
            )
        else:
            raise UserError(f"{path} is no table: expected .parquet, .csv or .tsv.")
    except pl.exceptions.PolarsError as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path} cannot be read as a table ({reason}): check it.") from error
    return table.columns, table


def read_numbers(
    path: Path, *, drop_columns: Sequence[str] = (), orientation: str = "auto"
) -> tuple[np.ndarray, tuple[str, ...] | None, str | None]:
    """Read one recording from a text table.

    A first row that is not numeric holds parcel names, one a column; one that counts 0, 1, 2, ...
    holds positions and is left out. With `orientation` "parcels-first", names are a first column of
    text. Names that repeat stay as they are.

    Args:
        path: The file; the separator is a tab, comma, semicolon or white space, as found.
        drop_columns: Columns that are no parcels, by name or by position from 0.
        orientation: What the user said about the axes.

    Returns:
        Values float64 with NaN for empty cells, parcel names or None, and the orientation where
        the file says it ("trs-first" when columns are named).

    Raises:
        UserError: Ragged rows, text among numbers, an unnamed column, or an unknown column to drop.
    """
    cells = _cells(path)
    header = _header(cells.row(0))
    if header is not None or _counts_up(cells.row(0)):
        cells = cells.slice(1)
    if orientation == "parcels-first":
        return _named_rows(path, cells, header, drop_columns)
    keep = _keep(path, header, cells.width, drop_columns)
    values = _numbers(path, cells.select(cells.columns[i] for i in keep), header, keep)
    if header is None:
        return values, None, None
    names = tuple(header[i] for i in keep)
    if unnamed := [i for i, name in zip(keep, names, strict=True) if name in _INDEX_NAMES]:
        raise UserError(
            f"{path}: column {unnamed[0]} has no name (a row index?): expected a parcel's name; "
            f"add --drop-columns {unnamed[0]} if it is no parcel."
        )
    return values, names, "trs-first"


def _cells(path: Path) -> pl.DataFrame:
    """All cells as text; empty ones and NaN are null."""
    try:
        with path.open(encoding="utf-8-sig") as handle:
            first = handle.readline()
            counts = {separator: first.count(separator) for separator in "\t,;"}
            separator = max(counts, key=lambda key: counts[key])
            if not counts[separator]:
                return _split(path, [first, *handle])
        cells = pl.read_csv(path, separator=separator, has_header=False, infer_schema=False)
    except (pl.exceptions.PolarsError, UnicodeDecodeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{path} is no table of numbers ({reason}): expected equally long rows of one "
            "recording."
        ) from error
    return cells.with_columns(pl.all().str.strip_chars())


def _split(path: Path, lines: list[str]) -> pl.DataFrame:
    rows = [line.split() for line in lines if line.strip() and not line.startswith("#")]
    widths = {len(row) for row in rows}
    if len(widths) != 1:
        raise UserError(
            f"{path} is no table of numbers ({len(widths)} different row lengths): expected "
            "equally long rows of one recording."
        )
    return pl.DataFrame(rows, schema=[f"column_{i + 1}" for i in range(widths.pop())], orient="row")


def _header(first: Sequence[str | None]) -> list[str] | None:
    """The first row as names, when any of its cells is no number."""
    return None if all(map(_is_number, first)) else [name or "" for name in first]


def _counts_up(first: Sequence[str | None]) -> bool:
    """Whether a first row holds column positions, as pandas writes them."""
    words = [str(word) for word in first]
    return len(words) > 2 and words in (
        [str(i) for i in range(len(words))],
        [str(i + 1) for i in range(len(words))],
    )


def _is_number(cell: str | None) -> bool:
    if cell is None or cell in _NULLS:
        return True
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _keep(
    path: Path, header: list[str] | None, n_columns: int, drop_columns: Sequence[str]
) -> list[int]:
    dropped = set()
    for name in drop_columns:
        if header is not None and name in header:
            dropped |= {i for i, other in enumerate(header) if other == name}
        elif name.isdecimal() and int(name) < n_columns:
            dropped.add(int(name))
        else:
            known = header[:10] if header else [f"0 to {n_columns - 1}"]
            raise UserError(f"{path} has no column '{name}' to drop. {nearest(name, known)}")
    return [i for i in range(n_columns) if i not in dropped]


def _numbers(
    path: Path, cells: pl.DataFrame, header: list[str] | None, keep: Sequence[int]
) -> np.ndarray:
    if cells.is_empty() or not cells.width:
        raise UserError(f"{path} holds no numbers: expected one recording.")
    given = cells.select(pl.when(pl.all().is_in(_NULLS)).then(None).otherwise(pl.all()).name.keep())
    numbers = given.select(pl.all().cast(pl.Float64, strict=False))
    n_text = [
        a - b for a, b in zip(numbers.null_count().row(0), given.null_count().row(0), strict=True)
    ]
    if any(n_text):
        i = next(i for i, count in enumerate(n_text) if count)
        name = f"column {keep[i]}" + (f" ('{header[keep[i]]}')" if header else "")
        raise UserError(
            f"{path}: {name} holds text in {n_text[i]} rows, expected numbers: if it is no parcel "
            f"add --drop-columns {keep[i]}; if it names parcels, --orientation parcels-first."
        )
    return numbers.fill_null(float("nan")).to_numpy()


def _named_rows(
    path: Path, cells: pl.DataFrame, header: list[str] | None, drop_columns: Sequence[str]
) -> tuple[np.ndarray, tuple[str, ...] | None, str | None]:
    """A table with one parcel a row: a first column of text holds their names."""
    if cells.is_empty():
        raise UserError(f"{path} holds no numbers: expected one recording.")
    first = cells.to_series(0)
    named = not all(map(_is_number, first)) and "0" not in drop_columns
    if header is not None and not named and not drop_columns:
        # The header of a table with TRs as rows names parcels: the flag would transpose it.
        raise UserError(
            f"{path}: the first row names {len(header)} columns ('{header[0]}', ...), which are "
            "TRs with --orientation parcels-first: leave the flag out if they are parcels, or take "
            "the header away."
        )
    keep = _keep(path, header, cells.width, drop_columns)
    if named:
        keep = [i for i in keep if i]
    values = _numbers(path, cells.select(cells.columns[i] for i in keep), header, keep)
    names = tuple(str(name or "") for name in first) if named else None
    return values, names, "parcels-first"
