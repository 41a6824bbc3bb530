"""Embeddings as a long Parquet table: one row a person and gene.

    eid | subject | participant ...    text (whole numbers are taken as they are)
    gene | gene_id | gene_name ...     not needed where provenance says "level": "subject"
    vector | embedding                 list of floats
    source_model | model_name          optional; rows of other models are left out, and counted
    layer                              optional; one must be named where there are several
    haplotype, strand                  optional; two words each
    indel                              optional; whether the sequence carries one
    length_bp                          optional; checked
    device, reference_version ...      optional; several values are an alarm

Shape legend: n people, w stored width, r rows.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from brainfusion.genetics.columns import ALIASES, RowVectors, renames, source_of_rows
from brainfusion.genetics.layout import Wanted
from brainfusion.genetics.source import COVARIATES, Source
from brainfusion.runtime.errors import UserError

if TYPE_CHECKING:
    import polars as pl

_BATCH_BYTES = 16 * 2**20
_BUFFER_BYTES = 2**20


def open_long(files: list[Path], wanted: Wanted) -> Source:
    """Open a table, or the parts of one.

    Raises:
        UserError: Absent columns, ids that were numbers with a decimal point, several vectors of
            one person and gene, vectors of several widths, no rows of the model.
    """
    import polars as pl

    tables = [_read_ids(file) for file in files]
    for file, table in zip(files, tables, strict=True):
        if table.schema != tables[0].schema:
            raise UserError(f"{file}: columns or types differ from those of {files[0]}.")
    column = _VectorColumn(files, [len(table) for table in tables])
    vectors = RowVectors(
        read=column.read, width=column.width, dtype=column.dtype, parts=column.starts
    )
    return source_of_rows(pl.concat(tables), vectors, wanted, where=files[0])


def is_wide(file: Path) -> bool:
    """Whether a Parquet file is a table of one number a column, and not of vectors."""
    import polars as pl

    try:
        schema = pl.read_parquet_schema(file)
    except (pl.exceptions.ComputeError, OSError):
        return False  # said in the words of a long table
    if any(name in schema for name in ALIASES["vector"]):
        return False
    n_numbers = sum(kind.is_numeric() for kind in schema.values())
    return n_numbers >= 1 and not any(kind.is_nested() for kind in schema.values())


def _read_ids(file: Path) -> "pl.DataFrame":
    """All columns that are known but the vectors."""
    import polars as pl

    try:
        columns = list(pl.read_parquet_schema(file))
        renamed = renames(columns, where=file)
        wanted = [column for column, name in renamed.items() if name != "vector"]
        others = [column for column in COVARIATES if column in columns and column not in renamed]
        return pl.read_parquet(file, columns=[*wanted, *others]).rename(
            {column: renamed[column] for column in wanted}
        )
    except (pl.exceptions.ComputeError, OSError) as error:
        text = " ".join(str(error).split())[:120]
        raise UserError(f"{file} cannot be read as Parquet ({text}): write it again.") from error


# -- vectors ---------------------------------------------------------------------------------------


class _VectorColumn:
    """The vector column of a table's parts, read forward in batches."""

    def __init__(self, files: list[Path], lengths: list[int]) -> None:
        self._files = files
        self.starts = tuple(int(start) for start in np.cumsum([0, *lengths]))
        self.dtype = "float32"
        self._batch_rows = 256
        self.width = 0
        for file in files:  # the first vector gives the width
            for column in self._columns(file, range(self._open(file).num_row_groups)):
                lengths_here = self._lengths(column)
                if lengths_here.any():
                    self.width = int(lengths_here[lengths_here > 0][0])
                    break
            if self.width:
                break
        else:
            raise UserError(f"{files[0]}: no vector in any row.")
        self._batch_rows = max(1, _BATCH_BYTES // (4 * self.width))

    def read(self, start: int) -> Iterator[np.ndarray]:
        """float32 pieces [., w] of the rows from `start` to the end, nan where absent."""
        for file, first, stop in zip(self._files, self.starts, self.starts[1:], strict=False):
            if stop <= start:
                continue
            metadata = self._open(file).metadata
            row, groups = first, []
            for group in range(metadata.num_row_groups):
                n_rows = metadata.row_group(group).num_rows
                if row + n_rows <= start and not groups:
                    row += n_rows
                    continue
                groups.append(group)
            for column in self._columns(file, groups):
                n = len(column)
                skipped = min(max(0, start - row), n)
                row += n
                if skipped < n:
                    yield self._values(column, where=file)[skipped:]

    def _open(self, file: Path) -> Any:
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            # Buffered: otherwise a row group's whole column is held, or stays mapped.
            return pq.ParquetFile(file, buffer_size=_BUFFER_BYTES, pre_buffer=False)
        except (pa.ArrowInvalid, OSError) as error:
            text = " ".join(str(error).split())[:120]
            raise UserError(
                f"{file} cannot be read as Parquet ({text}): write it again."
            ) from error

    def _columns(self, file: Path, groups: Any) -> Iterator[Any]:
        import pyarrow as pa

        parquet = self._open(file)
        name = next(c for c in parquet.schema_arrow.names if c in ALIASES["vector"])
        kind = parquet.schema_arrow.field(name).type
        is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind)
        is_list = is_list or pa.types.is_fixed_size_list(kind)
        inner = kind.value_type if is_list else None
        if inner is None or not (pa.types.is_floating(inner) or pa.types.is_integer(inner)):
            raise UserError(f"{file}: vectors are {kind}, expected a list of floats.")
        if pa.types.is_floating(inner):
            self.dtype = {"halffloat": "float16", "float": "float32"}.get(str(inner), "float64")
        batches = parquet.iter_batches(
            batch_size=self._batch_rows, row_groups=list(groups), columns=[name], use_threads=False
        )
        for batch in batches:
            yield batch.column(0)

    def _lengths(self, column: Any) -> np.ndarray:
        import pyarrow.compute as pc

        lengths = pc.call_function("list_value_length", [column])
        return pc.fill_null(lengths, 0).to_numpy(zero_copy_only=False)

    def _values(self, column: Any, *, where: Path) -> np.ndarray:
        lengths = self._lengths(column)
        present = lengths > 0
        if widths := sorted({int(length) for length in lengths[present]} - {self.width}):
            raise UserError(f"{where}: vectors of several widths ({self.width}, {widths[0]}).")
        values = np.full((len(column), self.width), np.nan, dtype=np.float32)
        if not present.all():
            column = column.filter(_arrow_mask(present))
        flat = column.flatten().to_numpy(zero_copy_only=False)
        values[present] = flat.reshape(-1, self.width)
        return values


def _arrow_mask(present: np.ndarray) -> Any:
    import pyarrow as pa

    return pa.array(present)
