"""What a query searches: people, or genes shown alone; built, or opened as it was saved.

Shape legend: n entries, k width of the search.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from brainfusion.cli.query.asker import Asker
from brainfusion.cli.query.genes import check_genes, gene_index, nothing_shown_vectors
from brainfusion.cli.query.options import QueryOptions, Side
from brainfusion.cli.query.run import QueryRun
from brainfusion.cli.query.values import chosen_people, pairs_of, same_values
from brainfusion.eval.retrieval.index import RetrievalIndex
from brainfusion.runtime.errors import UserError
from brainfusion.runtime.files import check_writable
from brainfusion.runtime.logs import say

_KEPT = ("site", "sex", "group")
"""Columns of subjects.parquet that an index of people keeps, to be narrowed by from Python."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Gallery:
    """An index, and what each asker looks for in it."""

    index: RetrievalIndex
    side: Side
    """Which side is searched."""
    among: list[np.ndarray | None]
    """Of each asker: the entries that are searched, bool [n]; none for all."""
    filters: dict[str, Any]
    """What narrows it, as it is printed."""
    zeros: dict[str, np.ndarray]
    """Of genes, by DNA model: the vector float32 [k] of a person of whom nothing is shown."""

    def n_searched(self, asker: int) -> int:
        """Entries that an asker looks among."""
        entries = self.among[asker]
        return len(self.index) if entries is None else int(entries.sum())


def gallery_of(asked: QueryRun, options: QueryOptions, asker: Asker) -> Gallery:
    """What is searched, for those who ask.

    Raises:
        UserError: Unknown columns, values or genes, nobody is left, or an index of another run.
    """
    side: Side = "dna" if asker.side == "brain" else "brain"
    if options.search.save_index is not None:
        _check_free(options.search.save_index)
    if options.gallery != "people":
        check_genes(asked, options.genes)
    if options.gallery == "own-genes":
        owner = options.genes_of or asker.ids[0]
        index = gene_index(asked, [owner], only=options.genes, kind="exact", facts={})
        filters = {"genes of": owner} | ({"genes": list(options.genes)} if options.genes else {})
        return _made(asked, options, index, side, [None], filters)
    people = asked.vectors(side).subjects
    masks, filters = _filters(asked, options, asker, side)
    if options.search.index_from is not None:
        index = _opened(asked, options, options.search.index_from, side)
    else:
        index = _built(asked, options, side, np.logical_or.reduce(masks))
    if options.search.save_index is not None:
        index.save(options.search.save_index)
        say(f"written: {options.search.save_index}, an index of all {len(index):,} entries")
    narrowed = options.among != "all" or options.where or options.same
    whose = index.ids if options.gallery == "people" else index.about["person"].to_list()
    among: list[np.ndarray | None] = []
    for mask in masks:
        searched = {person for person, is_in in zip(people, mask, strict=True) if is_in}
        entries = np.array([not narrowed or person in searched for person in whose])
        if options.genes:
            entries &= index.about["gene"].is_in(list(options.genes)).to_numpy()
        if not entries.any():
            raise UserError(
                f"none of the {len(entries)} entries of the index is left to search: widen "
                "--where, --same, --among or --genes, or save the index again."
            )
        among.append(None if entries.all() else entries)
    return _made(asked, options, index, side, among, filters)


def _made(
    asked: QueryRun,
    options: QueryOptions,
    index: RetrievalIndex,
    side: Side,
    among: list[np.ndarray | None],
    filters: dict[str, Any],
) -> Gallery:
    zeros = {} if options.gallery == "people" else nothing_shown_vectors(asked)
    return Gallery(index=index, side=side, among=among, filters=filters, zeros=zeros)


def _filters(
    asked: QueryRun, options: QueryOptions, asker: Asker, side: Side
) -> tuple[list[np.ndarray], dict[str, Any]]:
    """Who is searched by each asker, bool [people], and what was asked for."""
    table = asked.vectors(side)
    assert table.extra is not None
    mask = np.ones(len(table.subjects), bool)
    if options.among == "test":
        mask = np.array([split == "test" for split in table.extra["split"]])
    if not mask.any():
        raise UserError(f"{asked.run.path} has no test people to search: use --among all.")
    filters: dict[str, Any] = {"among": options.among}
    if options.genes:
        filters["genes"] = list(options.genes)
    if not (options.where or options.same):
        return [mask] * len(asker.ids), filters
    where = pairs_of("--where", options.where)
    rows = np.flatnonzero(mask).tolist()
    people = asked.people([table.subjects[row] for row in rows])
    masks, shared = [], []
    for known in asker.known:
        same = same_values(people, options.same, known)
        own = mask.copy()
        own[rows] = chosen_people(people, where, same)
        masks.append(own)
        shared.append(same)
    filters |= {"where": where} if where else {}
    filters |= {"same": shared[0] if len(shared) == 1 else shared} if options.same else {}
    return masks, filters


# -- the index -------------------------------------------------------------------------------------


def _built(
    asked: QueryRun, options: QueryOptions, side: Side, needed: np.ndarray
) -> RetrievalIndex:
    """An index of those who are searched; of everybody, if it is to be kept."""
    table = asked.vectors(side)
    if options.search.save_index is not None:
        needed = np.ones(len(needed), bool)
    rows = np.flatnonzero(needed).tolist()
    subjects = [table.subjects[row] for row in rows]
    kept = options.search.save_index is not None
    facts = _facts(asked, options, side) if kept else {}
    if options.gallery == "genes":
        only = () if kept else options.genes
        # Equal haplotypes are equal vectors, among which a graph loses its way.
        kind = "exact" if options.search.index == "auto" else options.search.index
        return gene_index(asked, subjects, only=only, kind=kind, facts=facts)
    assert table.extra is not None
    about = {"split": [table.extra["split"][row] for row in rows]}
    if kept:
        people = asked.people(subjects)
        about |= {name: people[name].to_list() for name in _KEPT if name in people.columns}
    return RetrievalIndex.build(
        table.vectors[rows],
        subjects,
        options.search.index,
        queries=asked.sample("brain" if side == "dna" else "dna"),
        about=about,
        facts=facts,
    )


def _facts(asked: QueryRun, options: QueryOptions, side: Side) -> dict[str, Any]:
    """What an index is kept with, and is checked against."""
    return {
        "model_hash": asked.model_hash,
        "gallery": options.gallery,
        "searched": side,
        "score": asked.score,
    }


def _opened(asked: QueryRun, options: QueryOptions, path: Path, side: Side) -> RetrievalIndex:
    """A saved index, of this run and for this kind of question.

    Raises:
        UserError: It is no index, or one of another run or for other questions.
    """
    index, wanted = RetrievalIndex.load(path), _facts(asked, options, side)
    if "model_hash" not in index.facts:
        raise UserError(
            f"{path} does not say which alignment it is of: expected an index that --save-index "
            "has kept."
        )
    for key, own in wanted.items():
        if (kept := index.facts.get(key)) != own:
            what = "another alignment" if key == "model_hash" else "other questions"
            raise UserError(
                f"{path} is an index for {what} ({key.replace('_', ' ')} {kept}, this is {own}): "
                "keep one of this run with --save-index."
            )
    return index


def _check_free(path: Path) -> None:
    """Refuse a folder that is no index, before anything is built."""
    is_index = (path / "index.faiss").is_file() and (path / "meta.json").is_file()
    if path.exists() and not is_index:
        raise UserError(
            f"{path} exists and is no index, so it is not replaced: give another --save-index."
        )
    check_writable(path.parent)
