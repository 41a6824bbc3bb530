"""`brainfusion align`: train the shared space of brain features and DNA embeddings.

People are matched by id and split into train, validation and test by whole families; only training
people are learnt from. Writes the model and the embeddings of all pairs to
<workspace>/align/<brain>-<dna>. Several names of a side are several modalities in one space, any of
which a person may lack: --brain brainjepa brainlm --dna evo2 caduceus. Models joined by a plus are
one modality, their genes side by side: --dna evo2+caduceus. Called again after it was stopped, it
goes on from the last checkpoint, to the bit; SIGTERM and SIGUSR1 make it save and leave with exit
code 75.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import polars as pl
import tyro

from brainfusion.alignment.conditioning import design_matrix
from brainfusion.alignment.config import AlignConfig
from brainfusion.alignment.genes.vectors import GeneVectors
from brainfusion.alignment.linear import fit_linear
from brainfusion.alignment.modalities import side_mean
from brainfusion.alignment.model import Alignment
from brainfusion.alignment.train import train
from brainfusion.cli.modalities import (
    Modalities,
    brain_features,
    dna_models,
    load_modalities,
    load_tables,
    side_name,
)
from brainfusion.cli.negatives import Negatives, chosen_rule, facts, pair_ids
from brainfusion.cli.options import at_least, parse
from brainfusion.cli.runs import AlignmentRun
from brainfusion.cli.unfinished import unfinished
from brainfusion.cli.workspace import Place, Workspace, hash_ids, open_cohort
from brainfusion.data.features import write_features
from brainfusion.runtime import checkpoint, distributed, threads
from brainfusion.runtime.distributed import Ranks
from brainfusion.runtime.errors import CheckpointError, UserError
from brainfusion.runtime.files import atomic_file, read_json, write_json
from brainfusion.runtime.logs import say
from brainfusion.runtime.signals import STOPPED, Stopped


@dataclass(frozen=True, kw_only=True, slots=True)
class AlignOptions:
    """Options of `brainfusion align`."""

    brain: tuple[str, ...] = ("brainjepa",)
    """Brain features: an encoder's name, or any feature file in <workspace>/features.
    Several are several modalities."""
    dna: tuple[str, ...] = ("evo2",)
    """DNA embeddings: one model or several, each a modality;
    evo2+caduceus is one modality with the genes of both side by side."""
    haplotypes: Literal["mean", "sum", "mean-absdiff"] = "mean"
    """How two haplotypes of a gene become one vector, where the store keeps both.
    mean-absdiff: their mean, and beside it their absolute difference."""
    place: tyro.conf.OmitArgPrefixes[Place] = field(default_factory=Place)
    method: Literal["infonce", "rcca", "pls", "ridge"] = "infonce"
    """What is fitted: projectors by InfoNCE, or linear maps in closed form."""
    negatives: Negatives = "auto"
    """Who is told apart from whom: everybody (all), unrelated people without the same DNA vector,
    or of those only people of one site. auto: unrelated where the cohort has families."""
    train: tyro.conf.OmitArgPrefixes[AlignConfig] = field(default_factory=AlignConfig)
    control: bool = True
    """Train a second time on shuffled pairs: it must come out at chance."""
    out: Path | None = None
    """Run folder; <workspace>/align/<brain>-<dna> by default."""
    resume: Literal["auto", "never"] = "auto"
    """auto: go on with a run that was stopped. never: forget it and start anew."""
    checkpoint_every: int = 20
    """Steps between checkpoints; 0 for none."""
    threads: int = 0
    """Threads a process; 0 shares the cores among the ranks."""

    def __post_init__(self) -> None:
        at_least(self, 0, "checkpoint_every")


def main(argv: list[str]) -> int:
    """Join the tables, train the projectors, write the embeddings; then the control."""
    options = parse(
        AlignOptions,
        argv,
        prog="brainfusion align",
        description=__doc__ or "",
        config_field="train",
    )
    workspace = Workspace.of(options.place)
    brain, dna = brain_features(options.brain), dna_models(options.dna)
    # The other ranks wait while the main one makes what the demo cohort lacks.
    with distributed.session(timeout_s=3600) as ranks:
        threads.use_threads(options.threads, n_processes=ranks.world_size)
        cohort = open_cohort(workspace, ranks)
        with distributed.main_first(ranks):
            tables = load_tables(
                workspace, cohort, brain=brain, dna=dna, haplotypes=options.haplotypes
            )
        people = load_modalities(tables, cohort)
        options = replace(options, negatives=_negatives(options, people))
        run_dir = options.out or workspace.align_dir(side_name(brain), side_name(dna))
        resume = options.resume == "auto"
        try:
            with unfinished(run_dir, ranks, mark="embeddings", resume=resume) as folder:
                _check_method(options.method, folder)
                _run(options, people, folder, ranks)
                if options.control:
                    if ranks.is_main:
                        say("control: the same with shuffled pairs")
                    order = shuffled_order(
                        people, options.train.seed, within_site=options.negatives == "within-site"
                    )
                    _run(options, people, folder / "control", ranks, order=order)
        except Stopped as stop:
            say(f"asked to stop: saved {stop}; the same command goes on from there.")
            return STOPPED
    if ranks.is_main:
        flags = AlignmentRun.read(run_dir).flags(workspace)
        say(f"next: brainfusion retrieve {' '.join(flags)}")
    return 0


def _negatives(options: AlignOptions, people: Modalities) -> Negatives:
    """The rule of this run; closed forms know pairs only."""
    if options.method == "infonce":
        return chosen_rule(options.negatives, people.people, loss=options.train.loss)
    if options.negatives != "auto":
        say(f"warning: --negatives has no effect with --method {options.method}.")
    return "all"


def shuffled_order(people: Modalities, seed: int, *, within_site: bool = False) -> np.ndarray:
    """Whose DNA each person gets in the control: somebody's of the same split.

    With negatives of the same site only, somebody's of the same site, too: the control has to be
    what the run would be without a link in any person.
    """
    rng = np.random.default_rng([seed, 1])
    blocks, order = np.array(people.labels), np.arange(len(people.labels))
    if within_site:
        site = people.people["site"].cast(pl.String).fill_null("unknown").to_numpy()
        blocks = np.char.add(np.char.add(blocks.astype(str), "/"), site.astype(str))
    for block in np.unique(blocks):
        rows = np.flatnonzero(blocks == block)
        order[rows] = rng.permutation(rows)
    return order


def shuffled(people: Modalities, order: np.ndarray) -> Modalities:
    """The same people with the DNA of others, all of its modalities together."""
    moved = {name: people.present[name][order] for name in people.dna}
    return replace(
        people,
        dna={name: vectors.take(order) for name, vectors in people.dna.items()},
        present={**people.present, **moved},
    )


def _run(
    options: AlignOptions,
    people: Modalities,
    run_dir: Path,
    ranks: Ranks,
    *,
    order: np.ndarray | None = None,
) -> None:
    """Train one alignment, of the DNA in another `order` for a control, and write embeddings."""
    if order is not None:
        people = shuffled(people, order)
    covariates, names = design_matrix(people.people, options.train.residualise)
    ids = pair_ids(options.negatives, people.people, people.dna, people.present, order=order)
    known: dict[str, Any] = {
        "config": options.train,
        "run_dir": run_dir,
        "covariates": covariates if names else None,
        "covariate_names": names,
        "meta": {
            "brain": side_name(brain_features(options.brain)),
            "dna": side_name(dna_models(options.dna)),
            "subjects_hash": hash_ids(people.subjects),
            "provenance": people.provenance,
            **facts(options.negatives, ids),
        },
        "ranks": ranks,
    }
    if options.method == "infonce":
        result = train(
            people.features,
            people.labels,
            present=people.present,
            ids=ids,
            checkpoint_every=options.checkpoint_every,
            resume=options.resume == "auto",
            **known,
        )
    else:
        _check_complete(people, options.method)
        result = fit_linear(people.features, people.labels, method=options.method, **known)
    if not ranks.is_main:
        return
    _write_embeddings(result.alignment, people, run_dir, covariates if names else None)
    summary = {**read_json(run_dir / "summary.json"), "flow": people.flow}
    if options.train.dna_pool != "concat":
        summary["genes_looked_at"] = _write_gene_tables(
            result.alignment, people, run_dir, covariates if names else None
        )
    write_json(run_dir / "summary.json", summary)


def _check_method(method: str, run_dir: Path) -> None:
    """Refuse to write a closed form over a training run that was stopped."""
    if method != "infonce" and checkpoint.steps(run_dir):
        raise CheckpointError(
            f"{run_dir} holds a stopped run of --method infonce, and --method {method} has nothing "
            "to go on with: finish that run first, or forget it by --resume never."
        )


def _check_complete(people: Modalities, method: str) -> None:
    if lacking := [name for name, has in people.present.items() if not has.all()]:
        raise UserError(
            f"--method {method} needs every modality of everybody, and some lack {lacking[0]}: "
            "name one brain encoder and one DNA side (models joined by + are one), or use "
            "--method infonce."
        )


def _write_embeddings(
    alignment: Alignment, people: Modalities, run_dir: Path, covariates: np.ndarray | None
) -> None:
    """Embeddings of both sides, of each modality where a side has several, and score vectors."""
    labels = np.array(people.labels)
    for side, names in people.sides.items():
        embedded = {}
        about = {"kind": "embeddings", "tower": side, **people.provenance}
        for name in names:
            rows, features = np.flatnonzero(people.present[name]), people.features[name]
            own = features.take(rows) if isinstance(features, GeneVectors) else features[rows]
            embedded[name] = alignment.embed(
                name, own, None if covariates is None else covariates[rows]
            )
            if len(names) > 1:
                write_features(
                    run_dir / "embeddings" / f"{name}.parquet",
                    [people.subjects[row] for row in rows],
                    embedded[name],
                    provenance={**about, "modality": name},
                    extra={"split": labels[rows].tolist()},
                )
        whole = side_mean(embedded, {name: people.present[name] for name in names})
        extra: dict[str, Sequence[str]] = {"split": people.labels}
        path = run_dir / "embeddings" / f"{side}.parquet"
        write_features(path, people.subjects, whole, provenance=about, extra=extra)
        if alignment.head is not None:
            write_features(
                run_dir / "scores" / f"{side}.parquet",
                people.subjects,
                alignment.head.vectors(side, whole),
                provenance={**about, "kind": "score vectors"},
                extra=extra,
            )


def _write_gene_tables(
    alignment: Alignment, people: Modalities, run_dir: Path, covariates: np.ndarray | None
) -> list[dict[str, Any]]:
    """A table of genes for each DNA modality; the first rows of each."""
    found = []
    for name, genes in people.dna.items():
        has = people.present[name]
        held_out = np.flatnonzero((np.asarray(people.labels) == "test") & has)
        shown = held_out if len(held_out) else np.flatnonzero(has)
        file = "genes.parquet" if len(people.dna) == 1 else f"genes_{name}.parquet"
        found += write_genes(
            run_dir / file,
            alignment,
            genes.take(shown),
            None if covariates is None else covariates[shown],
            name=name,
        )
    return found


def write_genes(
    path: Path,
    alignment: Alignment,
    genes: GeneVectors,
    covariates: np.ndarray | None,
    *,
    name: str = "dna",
) -> list[dict[str, Any]]:
    """Write which genes the model looks at in these people (docs/formats.md), the first first.

    Returns:
        The first five rows, which are said, too.
    """
    found = alignment.gene_weights(genes, covariates, name=name)
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
