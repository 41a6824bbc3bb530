"""What is in one array of a file: its axes checked, tokens pooled, flags of its rows read.

Shape legend: n people, g genes, r rows that are read, l positions, w stored width; "lead" axes are
those before positions or chunks and width: people, genes, 2 haplotypes, 2 strands.
"""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from brainfusion.genetics.containers import Container, Rows
from brainfusion.genetics.layout import Layout
from brainfusion.genetics.source import Block, Findings, Source, row_ranges
from brainfusion.genetics.tokens import spans_of_lengths, spans_of_mask
from brainfusion.runtime.errors import UserError


def stacked_source(
    container: Container,
    name: str,
    *,
    subjects: tuple[str, ...],
    genes: tuple[str, ...] | None,
    layer: str | None,
    layout: Layout,
) -> Source:
    """All people and genes in one array [n, g, ...]; without genes [n, ...].

    Raises:
        UserError: A shape that does not fit the ids or what is declared.
    """
    array, where = container.arrays[name], container.path
    n, n_genes = len(subjects), 1 if genes is None else len(genes)
    check_rows(array, n, where=where)
    has_gene_axis = genes is not None and (
        n_genes > 1 or (array.shape[1:2] == (1,) and len(array.shape) >= 3 + _n_inner(layout))
    )
    if has_gene_axis and (len(array.shape) < 3 or array.shape[1] != n_genes):
        raise UserError(
            f"{where}: an array of shape {array.shape} for {n} people and {n_genes} genes; "
            f"expected [{n}, {n_genes}, width]."
        )
    lead = (n, n_genes) if has_gene_axis else (n,)
    check_axes(array.shape[len(lead) :], layout, where=where)
    mask = container.sides.get("mask")
    if mask is not None and mask.size != n * n_genes:
        raise UserError(f"{where}: mask of shape {mask.shape}, expected {n, n_genes}.")
    row_bytes = 4 * int(np.prod(array.shape[1:]))
    ranges = row_ranges(n, bytes_per_row=row_bytes)

    def load(start: int, stop: int) -> Iterator[Block]:
        for rows in ranges[start:stop]:
            raw, findings = read_piece(
                container, array, rows, n_lead=len(lead), layout=layout, count_file=rows.start == 0
            )
            if not has_gene_axis:
                raw = raw[:, None]
            if mask is not None:
                raw[~mask.reshape(n, n_genes)[rows].astype(bool)] = np.nan
            dtype = layout.pool.dtype(array.dtype) if layout.pool else array.dtype
            yield Block(
                rows=rows, columns=slice(0, n_genes), raw=raw, dtype=dtype, findings=findings
            )

    return Source(
        subjects=subjects,
        genes=("all",) if genes is None else genes,
        layer=layer,
        width=array.shape[-1],
        n_blocks=len(ranges),
        load=load,
        has_haplotypes=layout.has_haplotypes,
        has_strands=layout.has_strands,
        steps=(layout.pool.step,) if layout.pool else (),
    )


def read_piece(
    container: Container,
    array: Rows,
    rows: slice,
    *,
    n_lead: int,
    layout: Layout,
    count_file: bool = True,
) -> tuple[np.ndarray, Findings]:
    """Some rows of an array, positions pooled: float32 [r, ..., w] (chunks stay).

    Args:
        container: The file, with what stands beside the array.
        array: [rows, ...].
        rows: Which to read.
        n_lead: Axes of people and genes at the front; those of pairs follow.
        layout: What is declared; only pair axes that are in the array.
        count_file: Whether what the file says of itself is counted now.

    Raises:
        UserError: Positions whose true lengths are not known, or do not fit.
    """
    values = array.read(rows.start, rows.stop)
    findings = _findings(container, array, rows, array.shape[:n_lead], count_file=count_file)
    if layout.pool is None:
        return values, findings
    lead = values.shape[:-2]
    spans = _spans(container, array, rows, lead, layout)
    flat = values.reshape(-1, *values.shape[-2:])
    if spans is None and flat.shape[0] > 1 and layout.pool.length_bp is None:
        raise UserError(
            f"{container.path}: positions of {flat.shape[0]} sequences without their lengths, so "
            "padding cannot be told from sequence: add 'lengths' (tokens, special ones included) "
            "or 'attention_mask', or length_bp to provenance.json where all have one length."
        )
    pooled = layout.pool(flat, spans, where=str(container.path))
    findings.n_sequences += len(flat)
    if spans is not None:
        findings.n_padded += int((spans[:, 1] - spans[:, 0] < flat.shape[1]).sum())
    return pooled.reshape(*lead, pooled.shape[-1]), findings


def check_rows(array: Rows, n: int, *, where: Path) -> None:
    """Refuse an array that has not one row a person.

    Raises:
        UserError: As above, with both numbers.
    """
    if not array.shape or array.shape[0] != n:
        raise UserError(
            f"{where}: {array.shape[0] if array.shape else 0} rows (shape {array.shape}) for "
            f"{n} subject ids; expected one row a person."
        )


def check_axes(inner: tuple[int, ...], layout: Layout, *, where: Path) -> None:
    """Hold the axes behind people and genes against what is declared.

    Raises:
        UserError: No axis of two where one is declared, or no axis of positions.
    """
    pairs = layout.pair_axes
    if inner[: len(pairs)] != pairs or len(inner) <= len(pairs):
        names = " and ".join(
            name
            for name, there in (
                ("haplotypes", layout.has_haplotypes),
                ("strands", layout.has_strands),
            )
            if there
        )
        raise UserError(
            f"{where}: an axis of two for {names or 'nothing'} is declared, but behind people and "
            f"genes the shape is {inner}: correct provenance.json."
        )
    if layout.pool is not None and len(inner) != len(pairs) + 2:
        raise UserError(
            f"{where}: token level is declared, but behind people and genes the shape is {inner}; "
            f"expected {[*pairs, 'positions', 'width']}: correct level in provenance.json."
        )


def agreed(
    inside: tuple[str, ...] | None, beside: tuple[str, ...] | None, what: str, *, where: Path
) -> tuple[str, ...] | None:
    """Ids from the file or, without any in it, from beside it.

    Raises:
        UserError: Both are there and differ.
    """
    if inside is not None and beside is not None and inside != beside:
        raise UserError(f"{where}: its {what} ids are not those of {where.parent / f'{what}s.*'}.")
    return beside if inside is None else inside


def no_subjects(file: Path) -> UserError:
    """The error for rows without ids."""
    return UserError(
        f"{file}: rows without ids are not joined to people by position: put the ids into "
        f"{file.parent / 'subjects.txt'}, one a line, in row order; or, where files are people's "
        'and not genes\', declare "files": "{subject}" in provenance.json.'
    )


def _n_inner(layout: Layout) -> int:
    return len(layout.pair_axes) + (layout.pool is not None)


def _spans(
    container: Container, array: Rows, rows: slice, lead: tuple[int, ...], layout: Layout
) -> np.ndarray | None:
    """Spans, int [b, 2], of the rows' sequences, or None where the file says nothing of lengths."""
    assert layout.pool is not None
    n_positions = array.shape[-2]
    lengths, mask = container.sides.get("lengths"), container.sides.get("attention_mask")
    if mask is not None:
        spans = spans_of_mask(mask, where=str(container.path))
    elif lengths is not None:
        spans = spans_of_lengths(np.atleast_1d(lengths), n_positions, layout.pool.padding)
    else:
        return None
    known = spans.shape[:-1]
    if known[: len(lead)] != (array.shape[0], *lead[1:])[: len(known)]:
        raise UserError(
            f"{container.path}: lengths (or attention_mask) of shape {known} for sequences of "
            f"shape {(array.shape[0], *lead[1:])}: give one length a sequence."
        )
    spans = spans[rows]
    spans = spans.reshape(*spans.shape[:-1], *(1,) * (len(lead) - len(known)), 2)
    return np.broadcast_to(spans, (*lead, 2)).reshape(-1, 2)


def _findings(
    container: Container, array: Rows, rows: slice, lead: tuple[int, ...], *, count_file: bool
) -> Findings:
    findings = Findings()
    if count_file:
        said = {**container.covariates, "dtype": array.dtype}
        findings.covariates = {key: Counter([value]) for key, value in said.items()}
        if (length := container.sides.get("length_bp")) is not None:
            findings.lengths_bp = {int(value) for value in np.unique(length)}
    flags = container.sides.get("indels")
    if flags is not None:
        if flags.shape != lead[: flags.ndim]:
            raise UserError(
                f"{container.path}: indels of shape {flags.shape}, expected one flag a vector, "
                f"{lead}."
            )
        flags = np.atleast_1d(flags)
        here = flags[rows] if len(flags) > 1 else flags
        findings.n_flagged, findings.n_indels = here.size, int((here != 0).sum())
    return findings
