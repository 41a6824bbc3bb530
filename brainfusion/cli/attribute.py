"""`brainfusion attribute`: which genes, networks and parcels does retrieval rest on?

Hides one gene (or network, or parcel) of the test people at a time and measures how much retrieval
loses, without training again; --retrain trains again without each gene, as the run was trained. A
network or parcel is made flat in the recordings, which are then embedded again by every encoder of
the run: parcels cost one embedding each, so they are only done when asked for. --target asks of a
phenotype instead: how much worse it is predicted from the DNA without a gene. Writes
attribution.json and attribution.parquet into the alignment's folder; `brainfusion report` draws
them.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import polars as pl
import tyro

from brainfusion.cli.attribution.attributed import Attributed, read_attributed
from brainfusion.cli.attribution.hidden import BrainUnits, Hidden, genes
from brainfusion.cli.attribution.retrained import check_retrainable, retrained
from brainfusion.cli.attribution.targets import known_targets, target_tables
from brainfusion.cli.options import at_least, parse
from brainfusion.cli.published import PublishedOptions
from brainfusion.cli.runs import WhichRun, check_cohort, find_run
from brainfusion.cli.workspace import Place, Workspace
from brainfusion.runtime import distributed, threads
from brainfusion.runtime.errors import UserError
from brainfusion.runtime.files import atomic_file, write_json
from brainfusion.runtime.logs import say

What = Literal["genes", "networks", "parcels"]


@dataclass(frozen=True, kw_only=True, slots=True)
class AttributeOptions:
    """Options of `brainfusion attribute`."""

    alignment: tyro.conf.OmitArgPrefixes[WhichRun] = field(default_factory=WhichRun)
    place: tyro.conf.OmitArgPrefixes[Place] = field(default_factory=Place)
    what: tuple[What, ...] = ("genes", "networks")
    """What is hidden: genes, functional networks of the atlas, single parcels."""
    retrain: bool = False
    """Genes: train again without each, in place of hiding it from the trained model."""
    target: tuple[str, ...] = ()
    """Columns of subjects.parquet, numbers or two values:
    how much of the R2 with which DNA predicts each is lost without a gene."""
    confounds: tuple[str, ...] = ("age", "sex", "site", "motion")
    """Of --target: columns that are taken out in the fold;
    ancestry_1 and so on where DNA may predict by ancestry."""
    n_folds: int = 5
    """Of --target: outer folds; families stay together."""
    checkpoint: tuple[Path, ...] = ()
    """Checkpoints of ours, or authors' files, that the brain features were made with;
    <workspace>/pretrain/<encoder> and the run's own folder are looked into in any case."""
    published: tyro.conf.OmitArgPrefixes[PublishedOptions] = field(default_factory=PublishedOptions)
    people: int = 1000
    """Test people at most; more cost more time."""
    bootstrap: int = 1000
    """Bootstrap samples of families for each interval."""
    seed: int = 0
    """Seeds folds and bootstrap, and which people are taken if there are more."""
    device: str = "auto"
    """Where recordings are embedded: auto, cpu or cuda."""
    threads: int = 0
    """Threads; 0 takes all cores."""

    def __post_init__(self) -> None:
        at_least(self, 2, "people", "bootstrap")
        at_least(self, 3, "n_folds")
        if not self.what and not self.target:
            raise UserError("--what names nothing: expected genes, networks or parcels.")
        if self.retrain and "genes" not in self.what:
            raise UserError("--retrain is of genes: add genes to --what, or leave it out.")


def main(argv: list[str]) -> int:
    """Hide one unit after another, and write what each is worth."""
    options = parse(AttributeOptions, argv, prog="brainfusion attribute", description=__doc__ or "")
    threads.use_threads(options.threads, n_processes=1)
    workspace = Workspace.of(options.place)
    run = find_run(workspace, options.alignment)
    cohort = workspace.open_cohort()
    check_cohort(run, cohort)
    asked = read_attributed(workspace, cohort, run, people=options.people, seed=options.seed)
    targets = known_targets(asked, options.target)
    if options.retrain:
        check_retrainable(asked)
    with distributed.session(options.device) as ranks:
        units = BrainUnits(
            asked=asked,
            device=ranks.device,
            checkpoints=options.checkpoint,
            published=options.published,
        )
        if {"networks", "parcels"} & set(options.what):
            _ = units.encoders  # what is missing is known before genes are worked on
        results, tables = _attribute(options, asked, units)
    found = target_tables(
        asked,
        targets,
        confounds=options.confounds,
        n_folds=options.n_folds,
        n_bootstrap=options.bootstrap,
        seed=options.seed,
    )
    for target, (facts, table) in found.items():
        results.setdefault("targets", {})[target] = {**facts, "rows": table.to_dicts()}
        tables.append(table.with_columns(pl.lit(f"genes: {target}").alias("kind")))
        print(_text(f"genes: {target}", table, lost="R2 lost"))
    write_json(run.path / "attribution.json", results)
    with atomic_file(run.path / "attribution.parquet") as aside:
        pl.concat(tables, how="diagonal").write_parquet(aside)
    say(f"written: {run.path / 'attribution.json'}, attribution.parquet")
    say(f"next: brainfusion report {' '.join(run.flags(workspace))}".rstrip())
    return 0


def _attribute(
    options: AttributeOptions, asked: Attributed, units: BrainUnits
) -> tuple[dict[str, Any], list[pl.DataFrame]]:
    """What attribution.json says of everything that is hidden from the alignment, and its rows."""
    from brainfusion.eval.attribution import contributions

    ways: dict[str, Callable[[], Hidden]] = {
        "genes": lambda: (retrained if options.retrain else genes)(asked),
        "networks": units.networks,
        "parcels": units.parcels,
    }
    results: dict[str, Any] = {"n_people": len(asked.rows), "retrained": options.retrain}
    tables = []
    for what in dict.fromkeys(options.what):
        table = contributions(
            (asked.vectors("brain"), asked.vectors("dna")),
            ways[what](),
            families=asked.families,
            n_bootstrap=options.bootstrap,
            seed=options.seed,
        )
        results[what] = {"rows": table.to_dicts()}
        if what != "genes":
            results[what] |= _of_the_atlas(asked, units)
        tables.append(table.with_columns(pl.lit(what).alias("kind")))
        print(_text(what, table, lost="AUC lost"))
    return results, tables


def _of_the_atlas(asked: Attributed, units: BrainUnits) -> dict[str, Any]:
    """What the report needs of parcels: from what they were hidden, and where they lie."""
    facts: dict[str, Any] = {"hidden_from": units.hidden_from}
    atlas = asked.cohort.atlas
    if atlas.xyz_mm is not None:
        facts["parcels"] = list(atlas.parcels)
        facts["networks"] = None if atlas.networks is None else list(atlas.networks)
        facts["xyz_mm"] = np.round(atlas.xyz_mm, 1).tolist()
    return facts


def _text(what: str, table: pl.DataFrame, *, lost: str) -> str:
    from brainfusion.eval.attribution import found
    from brainfusion.eval.report.rows import p_exact

    kept, width = found(table), max(28, *(len(unit) for unit in table["unit"].head(10)))
    lines = [f"{what:<{width}} {lost:>9} {'95% interval':>18} {'p':>8} {'q (FDR)':>8}"]
    for row in table.head(10).iter_rows(named=True):
        interval = f"[{row['ci_low']:+.3f}, {row['ci_high']:+.3f}]"
        lines.append(
            f"{row['unit']:<{width}} {row['drop']:>+9.4f} {interval:>18} "
            f"{p_exact(row['p_value']):>8} {p_exact(row['q_value']):>8}"
        )
    kind = what.split(":")[0]
    one = kind.removesuffix("s")
    if len(table) > 10:
        lines.append(f"... and {len(table) - 10} more")
    return "\n".join(
        [*lines, f"{len(kept)} of {len(table)} {kind} matter at a false discovery rate of 5%."]
        if len(kept)
        else [*lines, f"no {one} matters at a false discovery rate of 5% ({len(table)} tested)."]
    )
