"""Which stretch of DNA belongs to which gene: a BED file, or a table that says how it counts.

- BED (`.bed`, `.bed.gz`): chromosome, start, end, gene, score, strand; start counts from 0 and end
  is not included, by the format's definition
- TSV, CSV or Parquet with a header: gene, chromosome, start, end, strand; whether start counts from
  0 (end not included) or from 1 (end included) must be said, since nobody can tell from the numbers

Inside, starts count from 0 and ends are not included.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import polars as pl

from brainfusion.data.parquet import read_table
from brainfusion.genetics.extraction.fasta import open_text
from brainfusion.genetics.ids import text_ids
from brainfusion.runtime.errors import UserError, nearest

Coordinates = Literal["0-based", "1-based"]

_ALIASES = {
    "gene": ("gene", "gene_id", "gene_name", "name", "symbol", "ensembl_id"),
    "chromosome": ("chromosome", "chrom", "chr", "#chrom", "contig", "seqname"),
    "start": ("start", "chromstart", "start_position", "tx_start", "gene_start"),
    "end": ("end", "stop", "chromend", "end_position", "tx_end", "gene_end"),
    "strand": ("strand",),
}
_STRANDS = {"+": "+", "1": "+", "+1": "+", "-": "-", "-1": "-"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Region:
    """A gene's place on the forward strand of the reference."""

    gene: str
    chromosome: str
    start: int
    """First base, counted from 0."""
    end: int
    """Behind the last base."""
    strand: str
    """"+" or "-"."""

    @property
    def length_bp(self) -> int:
        """Bases of the reference."""
        return self.end - self.start


def read_regions(path: Path, *, coordinates: Coordinates | None = None) -> list[Region]:
    """Read the regions of all genes, in the file's order.

    Args:
        path: BED, TSV, CSV or Parquet.
        coordinates: How a table counts; a BED file counts from 0 and needs none.

    Raises:
        UserError: An unreadable file, an absent column, bad numbers, or coordinates that are not
            said or cannot be.
    """
    if ".bed" in path.suffixes[-2:]:
        if coordinates == "1-based":
            raise UserError(
                f"{path} is BED, which counts from 0 by definition, but 1-based is asked for: "
                "leave --coordinates out, or write the table as TSV if its starts count from 1."
            )
        table, first = _read_bed(path), 0
    else:
        if coordinates is None:
            raise UserError(
                f"{path}: say how it counts: --coordinates 1-based (as in Ensembl, GTF, VCF: the "
                "end is included) or 0-based (as in BED and UCSC tables: it is not)."
            )
        table, first = _read_named(path), int(coordinates == "1-based")
    genes = text_ids(table["gene"].to_list(), what="gene", where=str(path))
    return [
        _region(genes[row], values, first, where=f"{path}, row {row + 1}")
        for row, values in enumerate(table.iter_rows(named=True))
    ]


def _region(gene: str, values: dict[str, str | None], first: int, *, where: str) -> Region:
    try:
        start, end = int(values["start"] or ""), int(values["end"] or "")
    except ValueError as error:
        raise UserError(
            f"{where}: start {values['start']!r} and end {values['end']!r}, expected whole numbers."
        ) from error
    start -= first
    if not 0 <= start < end:
        raise UserError(
            f"{where}: gene {gene} from {values['start']} to {values['end']} is no stretch: "
            f"expected {'1 <= start <= end' if first else '0 <= start < end'}."
        )
    strand = _STRANDS.get(values["strand"] or "")
    if strand is None:
        raise UserError(f"{where}: strand {values['strand']!r} of gene {gene}, expected + or -.")
    chromosome = values["chromosome"]
    if not chromosome:
        raise UserError(f"{where}: gene {gene} has no chromosome.")
    return Region(gene=gene, chromosome=chromosome, start=start, end=end, strand=strand)


def _read_bed(path: Path) -> pl.DataFrame:
    with open_text(path) as handle:
        lines = [line.rstrip("\n") for line in handle if line.strip()]
    rows = [line.split("\t") for line in lines if not line.startswith(("#", "track ", "browser "))]
    if not rows:
        raise UserError(f"{path}: no regions.")
    if n_short := sum(len(row) < 6 for row in rows):
        raise UserError(
            f"{path}: {n_short} of {len(rows)} rows have fewer than 6 columns; expected "
            "chromosome, start, end, gene, score, strand, separated by tabs."
        )
    names = ("chromosome", "start", "end", "gene", "score", "strand")
    columns = {name: [row[place] for row in rows] for place, name in enumerate(names)}
    return pl.DataFrame(columns).drop("score")


def _read_named(path: Path) -> pl.DataFrame:
    if path.suffix == ".parquet":
        table = read_table(path, absent="expected a table of genes.")
    elif path.suffix in (".tsv", ".txt", ".csv"):
        separator = "," if path.suffix == ".csv" else "\t"
        try:
            table = pl.read_csv(path, separator=separator, infer_schema=False)
        except pl.exceptions.PolarsError as error:
            raise UserError(f"{path} is not a readable table ({error}).") from error
    else:
        raise UserError(f"{path}: expected regions as .bed, .bed.gz, .tsv, .csv or .parquet.")
    if table.is_empty():
        raise UserError(f"{path}: no regions.")
    by_lower = {column.lower(): column for column in table.columns}
    chosen = {}
    for name, aliases in _ALIASES.items():
        found = [by_lower[alias] for alias in aliases if alias in by_lower]
        if not found:
            raise UserError(
                f"{path}: no column '{name}' (nor {', '.join(aliases[1:]) or 'another name'}); "
                f"expected gene, chromosome, start, end, strand. {nearest(name, table.columns)}"
            )
        chosen[name] = pl.col(found[0]).cast(pl.String)
    return table.select(**chosen)
