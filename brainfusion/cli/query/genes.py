"""Galleries of genes: each gene of some people shown alone, as an index.

Shape legend: n people, k width of the search.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from brainfusion.alignment.genes.alone import each_gene_alone, known_genes, nothing_shown
from brainfusion.alignment.genes.vectors import GeneVectors
from brainfusion.cli.query.run import QueryRun
from brainfusion.eval.retrieval.index import Kind, RetrievalIndex
from brainfusion.runtime.errors import UserError, nearest
from brainfusion.runtime.logs import Progress

LARGEST_GIB = 8.0
"""Vectors of a gallery that are held at once."""


def check_genes(asked: QueryRun, names: Sequence[str]) -> None:
    """Refuse genes that no DNA model of the run can show.

    Raises:
        UserError: As above; the nearest is named.
    """
    known = {gene.name for genes in _known(asked).values() for gene in genes}
    for name in names:
        if name not in known:
            raise UserError(
                f"--genes {name}: no gene of that name varies in this run. "
                f"{nearest(name, sorted(known)[:40])}"
            )


def gene_index(
    asked: QueryRun,
    subjects: Sequence[str],
    *,
    only: Sequence[str],
    kind: Kind,
    facts: Mapping[str, Any],
) -> RetrievalIndex:
    """Every gene of every one of these people, shown alone.

    Entries are "gene", "model/gene" if there are several models, and "gene/person" of several
    people; their columns model, gene and person are there to be narrowed by.

    Args:
        asked: The run.
        subjects: Whose genes.
        only: Names of genes; all if there are none.
        kind: Of the index.
        facts: Kept with the index.

    Raises:
        UserError: Nobody has a gene, or there are more than fit into memory.
    """
    one_person, several = len(subjects) == 1, len(_models(asked)) > 1
    vectors: list[np.ndarray] = []
    columns: dict[str, list[str]] = {"model": [], "gene": [], "person": []}
    for spec, genes in _known(asked).items():
        wanted = [gene for gene in genes if not only or gene.name in only]
        people, owners = _people_with(asked, spec, subjects)
        _check_size(asked, len(owners) * len(wanted))
        if not owners or not wanted:
            continue
        progress = Progress("genes shown alone", len(wanted))
        shown = each_gene_alone(
            asked.alignment,
            people,
            asked.covariates(owners),
            name=asked.modality("dna", spec),
            only=wanted,
        )
        for n_done, (gene, rows, embedded) in enumerate(shown, start=1):
            vectors.append(asked.scored("dna", embedded))
            columns["model"] += [gene.model] * len(rows)
            columns["gene"] += [gene.name] * len(rows)
            columns["person"] += [owners[row] for row in rows]
            progress.update(n_done)
    if not vectors:
        whose = f"'{subjects[0]}'" if one_person else f"any of these {len(subjects)} people"
        raise UserError(
            f"the cohort has no DNA of {whose}: give ids of people whom 'brainfusion import --dna' "
            "has found."
        )
    ids = [
        "/".join([*([model] if several else []), gene, *([] if one_person else [person])])
        for model, gene, person in zip(*columns.values(), strict=True)
    ]
    return RetrievalIndex.build(
        np.concatenate(vectors),
        ids,
        kind,
        queries=asked.sample("brain"),
        about=columns,
        facts=facts,
    )


def nothing_shown_vectors(asked: QueryRun) -> dict[str, np.ndarray]:
    """By DNA model, the vector float32 [k] of a person all of whose genes are hidden."""
    found = {}
    for spec in asked.run.dna:
        shown = nothing_shown(asked.alignment, name=asked.modality("dna", spec))
        found |= dict.fromkeys(spec.split("+"), asked.scored("dna", shown)[0])
    return found


def _known(asked: QueryRun) -> dict[str, tuple]:
    """The genes that can be shown, by DNA modality."""
    return {
        spec: known_genes(asked.alignment, name=asked.modality("dna", spec))
        for spec in asked.run.dna
    }


def _models(asked: QueryRun) -> list[str]:
    return [model for spec in asked.run.dna for model in spec.split("+")]


def _people_with(
    asked: QueryRun, spec: str, subjects: Sequence[str]
) -> tuple[GeneVectors, list[str]]:
    """Genes of those who have a modality, and who they are."""
    tables = {model: asked.dna_table(model) for model in spec.split("+")}
    owners = list(subjects)
    for table in tables.values():
        has = {table.subjects[row] for row in np.flatnonzero(table.mask.any(axis=1))}
        owners = [person for person in owners if person in has]
    chosen = {model: table.select(owners) for model, table in tables.items()}
    return GeneVectors.of(chosen), owners


def _check_size(asked: QueryRun, n: int) -> None:
    width = asked.vectors("dna").vectors.shape[1]
    if (gib := n * width * 4 / 2**30) > LARGEST_GIB:
        raise UserError(
            f"a gallery of {n:,} genes of people takes {gib:.1f} GiB, and {LARGEST_GIB:g} GiB are "
            "held at most: narrow it with --where, --same, --among test or --genes."
        )
