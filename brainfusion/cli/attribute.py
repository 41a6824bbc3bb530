"""`brainfusion attribute`: which genes, networks and parcels does retrieval rest on?

Hides one gene (or network, or parcel) of the test people at a time and measures how much retrieval
loses, without training again; --retrain trains again without each gene. A network or parcel is made
flat in the recordings, which are then embedded again: parcels cost one embedding each, so they are
only done when asked for. Writes attribution.json and attribution.parquet into the alignment's
folder; `brainfusion report` draws them.
"""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import polars as pl
import tyro

from brainfusion.alignment.conditioning import design_matrix
from brainfusion.alignment.config import AlignConfig
from brainfusion.alignment.genes.leave_out import without_each_gene
from brainfusion.alignment.genes.vectors import Gene, GeneArray, GeneSource, GeneVectors
from brainfusion.alignment.model import Alignment, load
from brainfusion.cli.options import at_least, parse
from brainfusion.cli.pairs import Pairs, dna_models, families_of, load_pairs, read_haplotypes
from brainfusion.cli.runs import ensure_alignment
from brainfusion.cli.workspace import Place, Workspace, ensure_features, ensure_pretrained
from brainfusion.data.cohort import Cohort
from brainfusion.data.features import read_features
from brainfusion.runtime import config as configs
from brainfusion.runtime import threads
from brainfusion.runtime.errors import UserError
from brainfusion.runtime.files import atomic_file, write_json
from brainfusion.runtime.logs import Progress, say

if TYPE_CHECKING:
    from brainfusion.encoders.checkpoints import Pretrained

What = Literal["genes", "networks", "parcels"]


@dataclass(frozen=True, kw_only=True, slots=True)
class AttributeOptions:
    """Options of `brainfusion attribute`."""

    brain: str = "brainjepa"
    """Brain features of the alignment."""
    dna: tuple[str, ...] = ("evo2",)
    """DNA embeddings of the alignment: one model or several."""
    place: tyro.conf.OmitArgPrefixes[Place] = field(default_factory=Place)
    what: tuple[What, ...] = ("genes", "networks")
    """What is hidden: genes, functional networks of the atlas, single parcels."""
    retrain: bool = False
    """Genes: train again without each, in place of hiding it from the trained model."""
    people: int = 1000
    """Test people at most; more cost more time."""
    bootstrap: int = 1000
    """Bootstrap samples of families for each interval."""
    seed: int = 0
    """Seeds the bootstrap, and which people are taken if there are more."""
    threads: int = 0
    """Threads; 0 takes all cores."""

    def __post_init__(self) -> None:
        at_least(self, 2, "people", "bootstrap")
        if not self.what:
            raise UserError("--what names nothing: expected genes, networks or parcels.")


@dataclass(frozen=True, kw_only=True, eq=False)
class _Setting:
    """The trained alignment and the test people that it is asked about."""

    options: AttributeOptions
    workspace: Workspace
    cohort: Cohort
    run_dir: Path
    alignment: Alignment
    pairs: Pairs
    rows: np.ndarray
    """Of the pairs: the test people."""
    covariates: np.ndarray | None
    """Of all pairs."""

    def vectors(self, side: str, embeddings: np.ndarray) -> np.ndarray:
        """What retrieval scores: the head's vectors where there is a head."""
        head = self.alignment.head
        return embeddings if head is None else head.vectors(side, embeddings)

    def brain(self, features: np.ndarray) -> np.ndarray:
        """Scored vectors of the test people's brain features."""
        return self.vectors("brain", self.alignment.embed_brain(features, self.own_covariates))

    @property
    def own_covariates(self) -> np.ndarray | None:
        """Of the test people."""
        return None if self.covariates is None else self.covariates[self.rows]

    @property
    def genes(self) -> GeneVectors:
        """Of the test people."""
        return self.pairs.genes.take(self.rows)

    @property
    def subjects(self) -> list[str]:
        """Ids of the test people."""
        return [self.pairs.subjects[row] for row in self.rows]


def main(argv: list[str]) -> int:
    """Hide one unit after another, and write what each is worth."""
    from brainfusion.eval.attribution import contributions, found

    options = parse(AttributeOptions, argv, prog="brainfusion attribute", description=__doc__ or "")
    threads.use_threads(options.threads, n_processes=1)
    setting = _setting(options)
    whole = _whole(setting)
    families = families_of(setting.pairs.people[setting.rows])
    results: dict[str, Any] = {"n_people": len(setting.rows), "retrained": options.retrain}
    tables = []
    for what in dict.fromkeys(options.what):
        hidden = {"genes": _genes, "networks": _networks, "parcels": _parcels}[what](setting, whole)
        table = contributions(
            whole, hidden, families=families, n_bootstrap=options.bootstrap, seed=options.seed
        )
        results[what] = _facts(setting, what, table.to_dicts())
        tables.append(table.with_columns(pl.lit(what).alias("kind")))
        print(_text(what, table, found(table)))
    write_json(setting.run_dir / "attribution.json", results)
    with atomic_file(setting.run_dir / "attribution.parquet") as aside:
        pl.concat(tables).write_parquet(aside)
    say(f"written: {setting.run_dir / 'attribution.json'}, attribution.parquet")
    say(f"next: brainfusion report {' '.join(setting.workspace.options())}".rstrip())
    return 0


def _setting(options: AttributeOptions) -> _Setting:
    workspace, dna = Workspace.of(options.place), dna_models(options.dna)
    run_dir = ensure_alignment(workspace, options.brain, dna)
    cohort, alignment = workspace.open_cohort(), load(run_dir)
    haplotypes = read_haplotypes(run_dir)
    pairs = load_pairs(workspace, cohort, brain=options.brain, dna=dna, haplotypes=haplotypes)
    rows = np.flatnonzero(np.asarray(pairs.labels) == "test")
    if len(rows) < 2:
        raise UserError(f"{len(rows)} test people with both modalities: expected 2 or more.")
    if len(rows) > options.people:
        say(f"{options.people} of {len(rows)} test people are looked at (--people).")
        chosen = np.random.default_rng(options.seed).choice(len(rows), options.people, False)
        rows = rows[np.sort(chosen)]
    names = alignment.conditioners["brain"].covariates
    columns = list(dict.fromkeys(name.split("=")[0] for name in names))
    covariates = design_matrix(pairs.people, columns, names=names)[0] if names else None
    return _Setting(
        options=options,
        workspace=workspace,
        cohort=cohort,
        run_dir=run_dir,
        alignment=alignment,
        pairs=pairs,
        rows=rows,
        covariates=covariates,
    )


def _whole(setting: _Setting) -> tuple[np.ndarray, np.ndarray]:
    """Scored vectors of both modalities with nothing hidden."""
    dna = setting.alignment.embed_dna(setting.genes, setting.own_covariates)
    brain = setting.brain(setting.pairs.brain[setting.rows])
    return brain, setting.vectors("dna", dna)


Hidden = Iterator[tuple[str, np.ndarray, np.ndarray]]


def _genes(setting: _Setting, whole: tuple[np.ndarray, np.ndarray]) -> Hidden:
    several = len(setting.pairs.genes.sources) > 1
    step = _retrained if setting.options.retrain else _masked
    for gene, brain, dna in step(setting, whole[0]):
        yield f"{gene.model} {gene.name}" if several else gene.name, brain, dna


def _masked(setting: _Setting, brain: np.ndarray) -> Iterator[tuple[Gene, np.ndarray, np.ndarray]]:
    progress = _progress("hiding genes", len(setting.pairs.genes.genes))
    left_out = without_each_gene(setting.alignment, setting.genes, setting.own_covariates)
    for gene, dna in left_out:
        yield gene, brain, setting.vectors("dna", dna)
        progress()


def _retrained(setting: _Setting, _: np.ndarray) -> Iterator[tuple[Gene, np.ndarray, np.ndarray]]:
    """The same training without one gene, gene after gene."""
    from brainfusion.alignment.train import train

    pairs = setting.pairs
    values = configs.read_yaml(setting.run_dir / "config.yaml")
    config = configs.from_dict(AlignConfig, values)
    names = setting.alignment.conditioners["brain"].covariates
    genes = pairs.genes.genes
    progress = _progress("training without each gene", len(genes))
    for gene in genes:
        less = without_gene(pairs.genes, gene)
        with tempfile.TemporaryDirectory() as folder:
            alignment = train(
                {"brain": pairs.brain, "dna": less},
                pairs.labels,
                config=config,
                run_dir=Path(folder),
                covariates=setting.covariates,
                covariate_names=names,
            ).alignment
        brain = alignment.embed_brain(pairs.brain[setting.rows], setting.own_covariates)
        dna = alignment.embed_dna(less.take(setting.rows), setting.own_covariates)
        if alignment.head is not None:
            brain = alignment.head.vectors("brain", brain)
            dna = alignment.head.vectors("dna", dna)
        yield gene, brain, dna
        progress()


def without_gene(genes: GeneVectors, gene: Gene) -> GeneVectors:
    """The same people without one gene; a model that had only this one is left out."""
    sources: dict[str, GeneSource] = dict(genes.sources)
    source = sources[gene.model]
    kept = [i for i, name in enumerate(source.genes) if name != gene.name]
    if not kept:
        del sources[gene.model]
        return GeneVectors(sources=sources, rows=genes.rows)
    every = np.arange(len(source.mask))
    vectors = np.stack([source.column(i, every) for i in kept], axis=1)
    names = tuple(source.genes[i] for i in kept)
    sources[gene.model] = GeneArray(genes=names, vectors=vectors, mask=source.mask[:, kept])
    return GeneVectors(sources=sources, rows=genes.rows)


def _networks(setting: _Setting, whole: tuple[np.ndarray, np.ndarray]) -> Hidden:
    pretrained = _pretrained(setting)
    atlas = pretrained.atlas
    networks = atlas.networks or _named_networks(setting.cohort, atlas.parcels)
    if networks is None:
        raise UserError(
            f"the atlas '{atlas.name}' does not say which network a parcel belongs to: add "
            "'networks' to its atlas.json, or ask for --what genes parcels."
        )
    groups = {name: np.flatnonzero(np.asarray(networks) == name) for name in sorted(set(networks))}
    return _occluded(setting, whole, pretrained, groups)


def _named_networks(cohort: Cohort, parcels: Sequence[str]) -> list[str] | None:
    """The networks of the encoder's parcels as the cohort's atlas has them, by name."""
    if cohort.atlas.networks is None:
        return None
    known = dict(zip(cohort.atlas.parcels, cohort.atlas.networks, strict=True))
    return [known.get(parcel, "unknown") for parcel in parcels]


def _parcels(setting: _Setting, whole: tuple[np.ndarray, np.ndarray]) -> Hidden:
    pretrained = _pretrained(setting)
    groups = {name: np.array([i]) for i, name in enumerate(pretrained.atlas.parcels)}
    return _occluded(setting, whole, pretrained, groups)


def _pretrained(setting: _Setting) -> "Pretrained":
    """The encoder that made the brain features."""
    from brainfusion.encoders import ENCODERS
    from brainfusion.encoders.checkpoints import load_pretrained

    brain = setting.options.brain
    if brain not in ENCODERS:
        raise UserError(
            f"brain features '{brain}' were not made by an encoder that is here, so no parcel can "
            "be hidden from it: ask for --what genes."
        )
    return load_pretrained(ensure_pretrained(setting.workspace, brain))


def _occluded(
    setting: _Setting,
    whole: tuple[np.ndarray, np.ndarray],
    pretrained: "Pretrained",
    groups: dict[str, np.ndarray],
) -> Hidden:
    """Groups of parcels hidden from the encoder that made the features of this alignment."""
    from brainfusion.encoders.embed import EmbedSettings
    from brainfusion.encoders.occlusion import features_without

    workspace, brain = setting.workspace, setting.options.brain
    made = read_features(ensure_features(workspace, brain)).provenance
    if made.get("checkpoint_hash") != pretrained.hash:
        raise UserError(
            f"features '{brain}' were made by another checkpoint than {pretrained.path}: embed "
            f"again with 'brainfusion embed --model {brain}', and align again."
        )
    settings = EmbedSettings(pooling=made["pooling"], precision=made["precision"])
    progress = _progress("hiding parcels", len(groups))
    for name, features in features_without(
        pretrained, setting.cohort, setting.subjects, groups, settings
    ):
        yield name, setting.brain(features), whole[1]
        progress()


def _progress(what: str, total: int) -> Callable[[], None]:
    progress, done = Progress(what, total), [0]

    def step() -> None:
        done[0] += 1
        progress.update(done[0])

    return step


def _facts(setting: _Setting, what: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What the report needs: the rows, and where parcels lie."""
    facts: dict[str, Any] = {"rows": rows}
    atlas = setting.cohort.atlas
    if what != "genes" and atlas.xyz_mm is not None:
        facts["parcels"] = list(atlas.parcels)
        facts["networks"] = None if atlas.networks is None else list(atlas.networks)
        facts["xyz_mm"] = np.round(atlas.xyz_mm, 1).tolist()
    return facts


def _text(what: str, table: pl.DataFrame, kept: pl.DataFrame) -> str:
    from brainfusion.eval.report.rows import p_exact

    lines = [f"{what:<28} {'AUC lost':>9} {'95% interval':>18} {'p':>8} {'q (FDR)':>8}"]
    for row in table.head(10).iter_rows(named=True):
        interval = f"[{row['ci_low']:+.3f}, {row['ci_high']:+.3f}]"
        lines.append(
            f"{row['unit']:<28} {row['drop']:>+9.4f} {interval:>18} {p_exact(row['p_value']):>8} "
            f"{p_exact(row['q_value']):>8}"
        )
    one = what.removesuffix("s")
    if len(table) > 10:
        lines.append(f"... and {len(table) - 10} more")
    return "\n".join(
        [*lines, f"{len(kept)} of {len(table)} {what} matter at a false discovery rate of 5%."]
        if len(kept)
        else [*lines, f"no {one} matters at a false discovery rate of 5% ({len(table)} tested)."]
    )
