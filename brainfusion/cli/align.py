"""`brainfusion align`: train the shared space of brain features and DNA embeddings.

People are matched by id and split into train, validation and test by whole families; only training
people are learnt from. Writes the model and the embeddings of all pairs to
<workspace>/align/<brain>-<dna>. Several DNA models make one DNA side: --dna evo2 caduceus.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import polars as pl
import tyro

from brainfusion.alignment.conditioning import design_matrix
from brainfusion.alignment.config import AlignConfig
from brainfusion.alignment.gene_vectors import GeneVectors
from brainfusion.alignment.model import Alignment
from brainfusion.alignment.train import train
from brainfusion.cli.options import parse
from brainfusion.cli.pairs import Pairs, dna_models, dna_name, load_pairs
from brainfusion.cli.workspace import Place, Workspace, check_replaceable, hash_ids, open_cohort
from brainfusion.data.features import write_features
from brainfusion.runtime import distributed, threads
from brainfusion.runtime.distributed import Ranks
from brainfusion.runtime.files import (
    atomic_file,
    atomic_folder,
    check_writable,
    read_json,
    write_json,
)
from brainfusion.runtime.logs import say


@dataclass(frozen=True, kw_only=True, slots=True)
class AlignOptions:
    """Options of `brainfusion align`."""

    brain: str = "brainjepa"
    """Brain features: an encoder's name, or any feature file in <workspace>/features."""
    dna: tuple[str, ...] = ("evo2",)
    """DNA embeddings: one model or several, whose genes then stand side by side."""
    haplotypes: Literal["mean", "sum", "mean-absdiff"] = "mean"
    """How two haplotypes of a gene become one vector, where the store keeps both.
    mean-absdiff: their mean, and beside it their absolute difference."""
    place: tyro.conf.OmitArgPrefixes[Place] = field(default_factory=Place)
    train: tyro.conf.OmitArgPrefixes[AlignConfig] = field(default_factory=AlignConfig)
    control: bool = True
    """Train a second time on shuffled pairs: it must come out at chance."""
    out: Path | None = None
    """Run folder; <workspace>/align/<brain>-<dna> by default."""
    threads: int = 0
    """Threads a process; 0 shares the cores among the ranks."""


def main(argv: list[str]) -> int:
    """Join the two tables, train the projectors, write the embeddings; then the control."""
    options = parse(
        AlignOptions,
        argv,
        prog="brainfusion align",
        description=__doc__ or "",
        config_field="train",
    )
    workspace, dna = Workspace.of(options.place), dna_models(options.dna)
    # The other ranks wait while the main one makes what the demo cohort lacks.
    with distributed.session(timeout_s=3600) as ranks:
        threads.use_threads(options.threads, n_processes=ranks.world_size)
        cohort = open_cohort(workspace, ranks)
        with distributed.main_first(ranks):
            pairs = load_pairs(
                workspace, cohort, brain=options.brain, dna=dna, haplotypes=options.haplotypes
            )
        run_dir = options.out or workspace.align_dir(options.brain, dna_name(dna))
        with _replaced(run_dir, ranks) as folder:
            _run(options, pairs, folder, ranks)
            if options.control:
                if ranks.is_main:
                    say("control: the same with shuffled pairs")
                _run(options, shuffled(pairs, options.train.seed), folder / "control", ranks)
    if ranks.is_main:
        flags = " ".join(workspace.options())
        say(
            f"next: brainfusion retrieve --brain {options.brain} "
            f"--dna {' '.join(dna)} {flags}".rstrip()
        )
    return 0


def shuffled(pairs: Pairs, seed: int) -> Pairs:
    """The same people with one another's DNA, within train, validation and test."""
    rng = np.random.default_rng([seed, 1])
    labels, order = np.array(pairs.labels), np.arange(len(pairs.labels))
    for side in np.unique(labels):
        rows = np.flatnonzero(labels == side)
        order[rows] = rng.permutation(rows)
    return replace(pairs, genes=pairs.genes.take(order))


@contextmanager
def _replaced(run_dir: Path, ranks: Ranks) -> Iterator[Path]:
    """A folder aside that replaces an earlier run when all is done; only the main rank writes."""
    check_replaceable(run_dir, "embeddings")
    if not ranks.is_main:
        yield run_dir
        return
    check_writable(run_dir.parent)
    with atomic_folder(run_dir) as aside:
        yield aside


def _run(options: AlignOptions, pairs: Pairs, run_dir: Path, ranks: Ranks) -> None:
    """Train one alignment and write the embeddings of all pairs."""
    covariates, names = design_matrix(pairs.people, options.train.residualise)
    result = train(
        {"brain": pairs.brain, "dna": pairs.genes},
        pairs.labels,
        config=options.train,
        run_dir=run_dir,
        covariates=covariates if names else None,
        covariate_names=names,
        meta={
            "brain": options.brain,
            "dna": dna_name(list(pairs.genes.sources)),
            "subjects_hash": hash_ids(pairs.subjects),
            "provenance": pairs.provenance,
        },
        ranks=ranks,
    )
    if not ranks.is_main:
        return
    for name, vectors in (("brain", pairs.brain), ("dna", pairs.genes)):
        write_features(
            run_dir / "embeddings" / f"{name}.parquet",
            pairs.subjects,
            result.alignment.embed(name, vectors, covariates if names else None),
            provenance={"kind": "embeddings", "tower": name, **pairs.provenance},
            extra={"split": pairs.labels},
        )
    summary = {**read_json(run_dir / "summary.json"), "flow": pairs.flow}
    if options.train.dna_pool != "concat":
        held_out = np.flatnonzero(np.asarray(pairs.labels) == "test")
        shown = held_out if len(held_out) else np.arange(len(pairs.labels))
        summary["genes_looked_at"] = write_genes(
            run_dir / "genes.parquet",
            result.alignment,
            pairs.genes.take(shown),
            covariates[shown] if names else None,
        )
    write_json(run_dir / "summary.json", summary)


def write_genes(
    path: Path, alignment: Alignment, genes: GeneVectors, covariates: np.ndarray | None
) -> list[dict[str, Any]]:
    """Write which genes the model looks at in these people (docs/formats.md), the first first.

    Returns:
        The first five rows, which are said, too.
    """
    found = alignment.gene_weights(genes, covariates)
    table = pl.DataFrame(
        {
            "model": [gene.model for gene in found.genes],
            "gene": [gene.name for gene in found.genes],
            "weight": found.share,
            "attention": found.attention.mean(axis=0),
            "attention_sd": found.attention.std(axis=0),
            "n_people": found.mask.sum(axis=0),
        }
    ).sort("weight", descending=True)
    with atomic_file(path) as aside:
        table.write_parquet(aside)
    first = table.head(5).to_dicts()
    several = len(genes.sources) > 1
    text = ", ".join(
        f"{row['model'] + ' ' if several else ''}{row['gene']} {row['weight']:.0%}" for row in first
    )
    say(
        f"genes looked at most, of {len(table)} (even would be {1 / len(table):.0%} each): {text}; "
        f"{path.name} has all."
    )
    return first
