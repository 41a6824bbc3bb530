"""Genotype dosages and scores: one row a person, one column a number.

    .csv, .tsv      a column of ids (any name of `columns.ALIASES`), all other columns numbers
    .raw            plink --export A: FID IID PAT MAT SEX PHENOTYPE, then a column a variant
    .sscore         plink2 --score: #FID IID, counts, then a column a score
    .parquet        the same, of numbers

They are read as one "gene" called "all", as wide as there are numbers. Ids are read as text.

Shape legend: n people, w columns of numbers.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from brainfusion.genetics.columns import ALIASES
from brainfusion.genetics.ids import text_ids
from brainfusion.genetics.source import Block, Source, row_ranges
from brainfusion.runtime import logs
from brainfusion.runtime.errors import UserError

if TYPE_CHECKING:
    import polars as pl

WIDE_SUFFIXES = (".csv", ".tsv", ".raw", ".sscore")
_NOT_NUMBERS = (
    "FID", "#FID", "PAT", "MAT", "SEX", "PHENOTYPE", "PHENO1", "ALLELE_CT",
    "NAMED_ALLELE_DOSAGE_SUM", "DENOM",
)  # fmt: skip
"""What PLINK writes beside variants and scores."""
_MISSING = ["", "NA", "NaN", "nan", "null", "."]


def open_wide(files: list[Path], *, level: str) -> Source:
    """Open a table of numbers.

    Raises:
        UserError: Several files, no ids, text among the numbers, or a declared gene level.
    """
    file = files[0]
    if len(files) > 1:
        raise UserError(
            f"{file.parent}: {len(files)} tables of numbers, expected one: join their columns by "
            "person first (a row that one lacks would be missing in all)."
        )
    if level != "subject":
        raise UserError(
            f'{file}: a table of one number a column has no genes: declare "level": "subject" '
            "in provenance.json."
        )
    table = _read(file)
    columns = table.columns
    ids = [name for name in columns if name in ALIASES["subject"] or name == "#IID"]
    if len(ids) != 1:
        problem = f"columns {' and '.join(ids)} mean the same" if ids else "no column of ids"
        raise UserError(
            f"{file}: {problem}; expected one such as eid, subject or IID, found "
            f"{', '.join(columns[:8])}."
        )
    left_out = [name for name in columns if name in _NOT_NUMBERS]
    names = [name for name in columns if name not in (*ids, *left_out)]
    if left_out:
        logs.say(f"{file}: left out the columns {', '.join(left_out)}")
    numbers, dtype = _numbers(table, names, where=file)
    column = table[ids[0]]
    if column.dtype.is_float():
        raise UserError(
            f"{file}: subject ids are {column.dtype}, which has lost leading zeros: read them as "
            "text where the table was made, and write it again."
        )
    subjects = text_ids(column.to_list(), what="subject", where=str(file))
    _say_missing(numbers, where=file)
    ranges = row_ranges(len(subjects), bytes_per_row=4 * len(names))

    def load(start: int, stop: int) -> Iterator[Block]:
        for rows in ranges[start:stop]:
            raw = numbers[rows].copy()[:, None]
            yield Block(rows=rows, columns=slice(0, 1), raw=raw, dtype=dtype)

    return Source(
        subjects=subjects,
        genes=("all",),
        layer=None,
        width=len(names),
        n_blocks=len(ranges),
        load=load,
    )


def _read(file: Path) -> "pl.DataFrame":
    import polars as pl

    try:
        if file.suffix == ".parquet":
            return pl.read_parquet(file)
        with file.open(encoding="utf-8-sig") as handle:
            header = handle.readline()
        separator = _separator(header)
        return pl.read_csv(
            file,
            separator=separator,
            null_values=_MISSING,
            schema_overrides=dict.fromkeys(_ids_in(header, separator), pl.String),
            infer_schema_length=None,
        )
    except (pl.exceptions.PolarsError, OSError, UnicodeDecodeError) as error:
        text = " ".join(str(error).split())[:120]
        raise UserError(
            f"{file} cannot be read as a table ({text}): expected one row a person and the same "
            "number of columns in each."
        ) from error


def _separator(header: str) -> str:
    return max((",", "\t", ";", " "), key=header.count)


def _ids_in(header: str, separator: str) -> list[str]:
    """The columns of the header that must be read as text."""
    names = [name.strip().strip('"') for name in header.strip().split(separator)]
    return [name for name in names if name in (*ALIASES["subject"], "#IID", "FID", "#FID")]


def _numbers(table: "pl.DataFrame", names: list[str], *, where: Path) -> tuple[np.ndarray, str]:
    import polars as pl

    if not names:
        raise UserError(f"{where}: no column of numbers beside the ids.")
    texts = [name for name in names if not table[name].dtype.is_numeric()]
    if texts:
        raise UserError(
            f"{where}: {len(texts)} of {len(names)} columns are no numbers ({', '.join(texts[:3])}"
            f"{' ...' if len(texts) > 3 else ''}): leave them out."
        )
    floats = {str(table[name].dtype).lower() for name in names if table[name].dtype.is_float()}
    dtype = "float16" if floats == {"float16"} else "float32"
    return table.select(pl.col(names).cast(pl.Float32)).to_numpy().astype(np.float32), dtype


def _say_missing(numbers: np.ndarray, *, where: Path) -> None:
    missing = np.isnan(numbers)
    if n_people := int(missing.any(axis=1).sum()):
        logs.say(
            f"{where}: {missing.mean():.2%} of the numbers are missing, in {n_people} of "
            f"{len(numbers)} people, who are masked: impute them where genotypes are called"
        )
