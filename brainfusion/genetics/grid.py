"""Folders of one file a gene, a person, or a person and gene (and haplotype, and strand).

What a file is, its name says (`genetics.names`). Files of people are put together a block of people
at a time; files of genes are read a block of rows at a time.

Shape legend: n people, g genes, c chunks, w stored width.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from pathlib import Path

import numpy as np

from brainfusion.genetics.containers import Container, open_container
from brainfusion.genetics.layout import Layout, Wanted
from brainfusion.genetics.names import Names, check_pairs, ids_of_names
from brainfusion.genetics.pieces import (
    agreed,
    check_axes,
    check_rows,
    no_subjects,
    read_piece,
)
from brainfusion.genetics.source import (
    MAX_BLOCK_BYTES,
    Block,
    Findings,
    Source,
    choose_layer,
    row_ranges,
)
from brainfusion.genetics.statistics import coarsest
from brainfusion.runtime import logs
from brainfusion.runtime.errors import UserError

_Reader = Callable[[Container], tuple[np.ndarray, Findings]]


def open_grid(
    names: Names,
    wanted: Wanted,
    *,
    subjects: tuple[str, ...] | None,
    genes: tuple[str, ...] | None,
) -> Source:
    """Read a folder of files.

    Raises:
        UserError: Ids that are absent or do not fit the files, layers or shapes that differ.
    """
    with names.without_people():
        return _open(names, wanted, subjects=subjects, genes=genes)


def _open(
    names: Names,
    wanted: Wanted,
    *,
    subjects: tuple[str, ...] | None,
    genes: tuple[str, ...] | None,
) -> Source:
    paths = list(names.paths.values())
    first = open_container(paths[0])
    chosen = choose_layer([key for key in first.arrays if key], wanted.layer, where=paths[0])
    key = "" if "" in first.arrays else chosen or ""
    layout = wanted.layout
    check_pairs(names, layout, where=names.root)
    inner = replace(
        layout,
        has_haplotypes=layout.has_haplotypes and "haplotype" not in names.fields,
        has_strands=layout.has_strands and "strand" not in names.fields,
    )
    folder = _Folder(names=names, key=key, first=first, layout=layout, inner=inner)
    if "subject" not in names.fields:
        subjects = agreed(first.subjects, subjects, "subject", where=paths[0])
        if subjects is None:
            raise no_subjects(paths[0])
        gene_ids = ids_of_names(names.values(1), genes, "gene", where=names.root)
        return folder.by_gene(subjects, gene_ids, layer=chosen)
    subject_ids = ids_of_names(names.values(0), subjects, "subject", where=names.root)
    if "gene" in names.fields:
        gene_ids = ids_of_names(names.values(1), genes, "gene", where=names.root)
    elif wanted.level == "subject":
        gene_ids = {"all": ""}
    else:
        genes = agreed(first.genes, genes, "gene", where=paths[0]) if genes is None else genes
        if genes is None:
            raise UserError(
                f"{paths[0]}: which genes? Put their names into genes.txt beside the files, one a "
                'line, or declare "level": "subject" if each person has one vector.'
            )
        gene_ids = dict.fromkeys(genes, "")
    return folder.by_subject(subject_ids, gene_ids, layer=chosen)


@dataclass(frozen=True, kw_only=True)
class _Folder:
    """How a file's array becomes a piece of a block."""

    names: Names
    key: str
    first: Container
    layout: Layout
    """Of a block."""
    inner: Layout
    """Of a file."""

    def by_gene(
        self, subjects: tuple[str, ...], genes: dict[str, str], *, layer: str | None
    ) -> Source:
        """One file a gene: [n, ...]."""
        shape = self.first.arrays[self.key].shape
        row_bytes = 4 * int(np.prod(shape[1:])) * (2 ** len(self._outer_pairs))
        ranges = row_ranges(len(subjects), bytes_per_row=row_bytes)
        parts = [(column, rows) for column in range(len(genes)) for rows in ranges]
        written = list(genes.values())

        def load(start: int, stop: int) -> Iterator[Block]:
            opened: dict[Path, Container] = {}
            opened_for = -1
            for column, rows in parts[start:stop]:
                if column != opened_for:  # mapped files hold on to the pages that were read
                    opened, opened_for = {}, column
                pieces, findings, dtype = [], Findings(), "float32"
                for pair in self._files_of_vector:
                    path = self.names.paths.get(("", written[column], *pair))
                    if path is None:
                        raise UserError(
                            f"{self.names.root}: gene {list(genes)[column]} lacks a file of "
                            "a haplotype or strand: give both, or move the other away."
                        )
                    if path not in opened:
                        opened[path] = self._open(path, subjects)
                    container = opened[path]
                    array = container.arrays[self.key]
                    piece, found = read_piece(
                        container,
                        array,
                        rows,
                        n_lead=1,
                        layout=self.inner,
                        count_file=rows.start == 0,
                    )
                    pieces.append(_masked(piece, container, rows))
                    findings.add(found)
                    dtype = array.dtype
                raw = self._paired(pieces, axis=1)[:, None]
                columns = slice(column, column + 1)
                yield self._block(rows, columns, raw, dtype, findings)

        return self._source(subjects, tuple(genes), layer, len(parts), load)

    def by_subject(
        self, subjects: dict[str, str], genes: dict[str, str], *, layer: str | None
    ) -> Source:
        """One file a person [g, ...], or a person and gene [...]."""
        width = self.first.arrays[self.key].shape[-1]
        vector_bytes = 4 * width * int(np.prod(self.layout.pair_axes, dtype=int))
        ranges = row_ranges(len(subjects), bytes_per_row=len(genes) * vector_bytes)
        columns = [slice(0, len(genes))]
        if "gene" in self.names.fields and len(genes) * vector_bytes > MAX_BLOCK_BYTES:
            columns = row_ranges(len(genes), bytes_per_row=vector_bytes)
        parts = list(product(ranges, columns))
        written, gene_items = list(subjects.values()), list(genes.items())
        self._say_absent(len(subjects) * (len(genes) if "gene" in self.names.fields else 1))

        def load(start: int, stop: int) -> Iterator[Block]:
            for rows, here in parts[start:stop]:
                findings, dtypes = Findings(), set()
                wanted = dict(gene_items[here])
                with self.names.without_people():
                    people = [
                        self._person(subject, wanted, width, findings, dtypes)
                        for subject in written[rows]
                    ]
                dtype = coarsest(dtypes) if dtypes else "float32"
                yield self._block(rows, here, _stacked(people), dtype, findings)

        return self._source(tuple(subjects), tuple(genes), layer, len(parts), load)

    def _person(
        self,
        subject: str,
        genes: dict[str, str],
        width: int,
        findings: Findings,
        dtypes: set[str],
    ) -> np.ndarray:
        """One person's vectors [g, pairs, (c,) w], nan where a file is absent.

        What the files say is added to `findings`, and their types to `dtypes`.
        """

        def pieces(gene: str, absent: tuple[int, ...], read: _Reader) -> list[np.ndarray]:
            found = []
            for pair in self._files_of_vector:
                path = self.names.paths.get((subject, gene, *pair))
                if path is None:
                    shape = (*absent, *self.inner.pair_axes, width)
                    found.append(np.full(shape, np.nan, dtype=np.float32))
                    continue
                container = self._open(path, None)
                piece, said = read(container)
                found.append(piece)
                findings.add(said)
                dtypes.add(container.arrays[self.key].dtype)
            return found

        if "gene" not in self.names.fields:
            names = tuple(genes)
            people = pieces("", (len(genes),), lambda container: self._genes_of(container, names))
            return self._paired(people, axis=1)
        return _stacked(
            [self._paired(pieces(gene, (), self._one_vector), axis=0) for gene in genes.values()]
        )

    def _genes_of(
        self, container: Container, genes: tuple[str, ...]
    ) -> tuple[np.ndarray, Findings]:
        """A person's file [g, ...], its genes in our order."""
        array = container.arrays[self.key]
        inside = container.genes or genes
        if genes == ("all",) and container.genes is None:
            piece, findings = self._one_vector(container)
            return piece[None], findings
        if not array.shape or array.shape[0] != len(inside):
            raise UserError(
                f"{container.path}: {array.shape[0] if array.shape else 0} rows (shape "
                f"{array.shape}) for {len(inside)} genes; expected one row a gene."
            )
        check_axes(array.shape[1:], self.inner, where=container.path)
        piece, findings = read_piece(
            container, array, slice(0, len(inside)), n_lead=1, layout=self.inner
        )
        piece = _masked(piece, container, slice(0, len(inside)))
        if inside == genes:
            return piece, findings
        if unknown := set(inside) - set(genes):
            raise UserError(
                f"{container.path}: {len(unknown)} genes that {self.first.path} has not "
                f"({', '.join(sorted(unknown)[:3])}): all people need the same genes."
            )
        place = {gene: row for row, gene in enumerate(genes)}
        ordered = np.full((len(genes), *piece.shape[1:]), np.nan, dtype=np.float32)
        ordered[[place[gene] for gene in inside]] = piece
        return ordered, findings

    def _one_vector(self, container: Container) -> tuple[np.ndarray, Findings]:
        """The vector of one person and gene, or its chunks: [pairs, (c,) w]."""
        array = container.arrays[self.key]
        n_inner = len(self.inner.pair_axes) + (self.inner.pool is not None) + 1
        if len(array.shape) < n_inner or (array.shape[0] != 1 and len(array.shape) > n_inner + 1):
            raise UserError(
                f"{container.path}: an array of shape {array.shape} for one person and gene; "
                'expected [width], or [1, positions, width] with "level": "token".'
            )
        if len(array.shape) == n_inner:  # give it a first axis to read rows of
            whole = array.all()[None]
            array = replace(
                array, shape=(1, *array.shape), read=lambda start, stop: whole[start:stop]
            )
        n_rows = array.shape[0]
        if n_rows == 1:
            check_axes(array.shape[1:], self.inner, where=container.path)
        piece, findings = read_piece(
            container, array, slice(0, n_rows), n_lead=1, layout=self.inner
        )
        return (piece[0] if n_rows == 1 else piece), findings

    def _open(self, path: Path, subjects: tuple[str, ...] | None) -> Container:
        container = self.first if path == self.first.path else open_container(path)
        array = container.arrays.get(self.key)
        if array is None:
            known = ", ".join(container.arrays) or "none"
            raise UserError(
                f"{path}: no layer '{self.key}', as in {self.first.path} (has {known})."
            )
        if subjects is not None:
            if container.subjects is not None and container.subjects != subjects:
                raise UserError(f"{path}: its people are not those of {self.first.path}, in order.")
            check_rows(array, len(subjects), where=path)
            check_axes(array.shape[1:], self.inner, where=path)
        if array.shape[-1] != self.first.arrays[self.key].shape[-1]:
            raise UserError(
                f"{path}: vectors of width {array.shape[-1]}, but {self.first.path} has "
                f"{self.first.arrays[self.key].shape[-1]}: files of several layers or models?"
            )
        return container

    @cached_property
    def _outer_pairs(self) -> list[list[str]]:
        """The words of haplotype and strand that names say, forward strand first."""
        pairs = []
        if "haplotype" in self.names.fields:
            pairs.append(self.names.values(2))
        if "strand" in self.names.fields:
            pairs.append(self.names.values(3))
        return pairs

    @cached_property
    def _files_of_vector(self) -> list[tuple[str, str]]:
        """(haplotype, strand) of the files that make up one vector, in the order of the axes."""
        return list(product(self.names.values(2), self.names.values(3)))

    def _paired(self, pieces: Sequence[np.ndarray], *, axis: int) -> np.ndarray:
        """Pieces of a haplotype and strand each, as axes of two."""
        outer = [len(words) for words in self._outer_pairs]
        if not outer:
            return pieces[0]
        stack = _stacked(pieces)
        return np.moveaxis(
            stack.reshape(*outer, *stack.shape[1:]),
            range(len(outer)),
            range(axis, axis + len(outer)),
        )

    def _say_absent(self, n_vectors: int) -> None:
        n_absent = n_vectors * len(self._files_of_vector) - len(self.names.paths)
        if n_absent:
            where = self.names.root
            logs.say(f"{where}: {n_absent} files are absent; their vectors are masked")

    def _block(
        self, rows: slice, columns: slice, raw: np.ndarray, dtype: str, findings: Findings
    ) -> Block:
        pool = self.layout.pool
        return Block(
            rows=rows,
            columns=columns,
            raw=np.ascontiguousarray(raw, dtype=np.float32),
            dtype=dtype if pool is None else pool.dtype(dtype),
            findings=findings,
        )

    def _source(
        self,
        subjects: tuple[str, ...],
        genes: tuple[str, ...],
        layer: str | None,
        n_blocks: int,
        load: Callable[[int, int], Iterator[Block]],
    ) -> Source:
        pool = self.layout.pool
        return Source(
            subjects=subjects,
            genes=genes,
            layer=layer,
            width=self.first.arrays[self.key].shape[-1],
            n_blocks=n_blocks,
            load=load,
            has_haplotypes=self.layout.has_haplotypes,
            has_strands=self.layout.has_strands,
            steps=(pool.step,) if pool else (),
        )


def _masked(piece: np.ndarray, container: Container, rows: slice) -> np.ndarray:
    mask = container.sides.get("mask")
    if mask is not None:
        piece[~mask.reshape(-1)[rows].astype(bool)] = np.nan
    return piece


def _stacked(pieces: Sequence[np.ndarray]) -> np.ndarray:
    """Pieces on a new first axis; chunks are padded with zeros to the longest."""
    n_axes = max(piece.ndim for piece in pieces)
    if len({piece.shape for piece in pieces}) > 1:
        longest = max(piece.shape[-2] for piece in pieces if piece.ndim == n_axes)
        pieces = [_padded(piece, n_axes, longest) for piece in pieces]
    return np.stack(pieces)


def _padded(piece: np.ndarray, n_axes: int, n_chunks: int) -> np.ndarray:
    if piece.ndim < n_axes:
        piece = piece[..., None, :]  # one chunk
    widths = [(0, 0)] * piece.ndim
    widths[-2] = (0, n_chunks - piece.shape[-2])
    return np.pad(piece, widths)
