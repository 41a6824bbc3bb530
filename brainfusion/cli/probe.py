"""`brainfusion probe`: predict phenotypes from features and from embeddings.

Ridge and logistic probes with nested cross-validation, on the people whom the alignment was not
trained on, beside a row from the confounds alone. Numbers with more than two values are continuous
targets, two values are two classes, more labels are as many classes. Writes <workspace>/probes.json
and, with a row a metric, probes.parquet; with --cca, cca.json.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import tyro

from brainfusion.cli.options import at_least, parse
from brainfusion.cli.pairs import (
    Pairs,
    connectomes,
    dna_models,
    dna_name,
    load_pairs,
    read_haplotypes,
)
from brainfusion.cli.runs import ensure_alignment
from brainfusion.cli.scoring import read_embeddings
from brainfusion.cli.workspace import Place, Workspace
from brainfusion.data.cohort import Cohort
from brainfusion.runtime.errors import UserError, nearest
from brainfusion.runtime.files import atomic_file, write_json
from brainfusion.runtime.logs import say
from brainfusion.runtime.threads import one_thread

KNOWN_COLUMNS = ("subject", "family", "site", "motion", "group")


@dataclass(frozen=True, kw_only=True, slots=True)
class ProbeOptions:
    """Options of `brainfusion probe`."""

    brain: str = "brainjepa"
    """Brain features to probe."""
    dna: tuple[str, ...] = ("evo2",)
    """DNA embeddings to probe: one model or several."""
    place: tyro.conf.OmitArgPrefixes[Place] = field(default_factory=Place)
    targets: tuple[str, ...] = ()
    """Columns of subjects.parquet to predict, numbers or labels;
    all phenotypes, age and sex by default."""
    confounds: tuple[str, ...] = ("age", "sex", "site", "motion")
    """Columns that are predicted from alone, and residualised in the fold."""
    n_folds: int = 5
    """Outer folds; families stay together, and all representations share them."""
    permutations: int = 199
    """Permutations for each p-value."""
    bootstrap: int = 500
    """Bootstrap samples of families for each interval."""
    fusion: bool = True
    """Whether brain features and DNA vectors are joined by what their probes predict."""
    pca: int = 0
    """Principal components to which connectome and DNA are reduced for one more row; 0 for none."""
    knn: bool = False
    """Whether k nearest neighbours predict as well."""
    learning_curve: tuple[float, ...] = ()
    """Shares of the training people to learn from, such as 0.25 0.5; the whole is always there."""
    rechoose: bool = False
    """Whether the penalty is chosen again for each permutation of labels, which is slower;
    for numbers it always is."""
    cca: int = 0
    """Canonical components of brain features and DNA vectors to test, confounds taken out;
    0 for none."""
    cca_pcs: int = 0
    """Principal components of each side that go in; 0 for an eighth of the people, at most 128."""
    cca_permutations: int = 999
    """Permutations for their p-values."""
    seed: int = 0
    """Seeds folds, permutations and bootstrap."""

    def __post_init__(self) -> None:
        at_least(self, 0, "pca", "cca", "cca_pcs")
        at_least(self, 1, "permutations", "cca_permutations")
        at_least(self, 2, "bootstrap")


def main(argv: list[str]) -> int:
    """Probe the people on whom the alignment was not trained."""
    options = parse(ProbeOptions, argv, prog="brainfusion probe", description=__doc__ or "")
    workspace = Workspace.of(options.place)
    run_dir = ensure_alignment(workspace, options.brain, dna_models(options.dna))
    cohort = workspace.open_cohort()
    targets = _targets(options, cohort.subjects)
    from brainfusion.eval.probing.probes import tidy

    dna = dna_models(options.dna)
    haplotypes = read_haplotypes(run_dir)
    pairs = load_pairs(workspace, cohort, brain=options.brain, dna=dna, haplotypes=haplotypes)
    table = _probe(options, cohort, pairs, run_dir, targets)
    with atomic_file(workspace.root / "probes.parquet") as aside:
        tidy(table).write_parquet(aside)
    write_json(workspace.root / "probes.json", _rows(table))
    print(_text(table))
    say(f"written: {workspace.root / 'probes.json'}")
    if options.cca:
        found = _cca(options, pairs)
        write_json(workspace.root / "cca.json", found)
        print(_cca_text(found))
        say(f"written: {workspace.root / 'cca.json'}")
    return 0


def _probe(
    options: ProbeOptions, cohort: Cohort, pairs: Pairs, run_dir: Path, targets: list[str]
) -> pl.DataFrame:
    held_out = np.array([label != "train" for label in pairs.labels])
    subjects = [s for s, kept in zip(pairs.subjects, held_out, strict=True) if kept]
    say(
        f"probing {len(subjects)} people on whom the alignment was not trained: "
        f"{', '.join(targets)}"
    )
    features = {
        f"{options.brain} features": pairs.brain[held_out],
        "connectome": connectomes(cohort, pairs)[held_out],
        f"{dna_name(dna_models(options.dna))} vectors": pairs.dna[held_out],
        "brain embedding": read_embeddings(run_dir, "brain").select(subjects),
        "DNA embedding": read_embeddings(run_dir, "dna").select(subjects),
    }
    return _predict(options, features, pairs.people.filter(pl.Series(held_out)), targets)


def _predict(
    options: ProbeOptions, features: dict[str, np.ndarray], people: pl.DataFrame, targets: list[str]
) -> pl.DataFrame:
    """Probe all targets; one that was not asked for and cannot be predicted is left out and said.

    Raises:
        UserError: A target that was asked for cannot be predicted, or none can.
    """
    from brainfusion.eval.probing.probes import Extras, TargetError, probe

    brain, connectome, dna, *_ = features
    extras = Extras(
        fusion=[(brain, dna)] if options.fusion else (),
        pca=(connectome, dna) if options.pca else (),
        n_pcs=options.pca or 1,
        neighbours=options.knn,
        learning_curve=options.learning_curve,
        rechoose=options.rechoose,
    )
    while targets:
        try:
            with one_thread():
                return probe(
                    features,
                    people,
                    targets,
                    confounds=options.confounds,
                    n_folds=options.n_folds,
                    n_permutations=options.permutations,
                    n_bootstrap=options.bootstrap,
                    seed=options.seed,
                    extras=extras,
                )
        except TargetError as error:
            if options.targets:
                raise
            say(f"left out: {error}")
            targets = [name for name in targets if name != error.target]
    raise UserError(
        "subjects.parquet has no column that can be predicted: add age, sex or phenotypes, as "
        "numbers or labels."
    )


def _targets(options: ProbeOptions, subjects: pl.DataFrame) -> list[str]:
    known = [
        name
        for name in subjects.columns
        if name not in KNOWN_COLUMNS and not name.startswith("ancestry_")
    ]
    for name in options.targets:
        if name not in subjects.columns:
            raise UserError(f"subjects.parquet has no column '{name}'. {nearest(name, known)}")
    return list(options.targets) or known


def _cca(options: ProbeOptions, pairs: Pairs) -> dict[str, Any]:
    """The permutation test of brain features against DNA vectors: nothing in it was trained."""
    from brainfusion.eval.cca_permutation import cca_test
    from brainfusion.eval.design import covariate_matrix

    n, people = len(pairs.labels), pairs.people
    n_pcs = options.cca_pcs or min(128, max(n // 8, 1))
    confounds = [name for name in options.confounds if name in people.columns]
    say(f"CCA of {n} people, {n_pcs} principal components a side")
    found = cca_test(
        pairs.brain,
        pairs.dna,
        nuisance=covariate_matrix(people, confounds),
        families=pairs.families,
        blocks=people["site"].to_list() if "site" in people.columns else None,
        n_components=options.cca,
        n_pcs=n_pcs,
        n_permutations=options.cca_permutations,
        n_folds=options.n_folds,
        n_held_out_permutations=min(options.cca_permutations, 199),
        n_bootstrap=options.bootstrap,
        seed=options.seed,
    )
    return {
        "brain": options.brain,
        "dna": dna_name(dna_models(options.dna)),
        "n": found.n,
        "n_pcs": list(found.n_columns),
        "n_permutations": options.cca_permutations,
        "confounds": confounds,
        "components": found.rows(),
    }


def _cca_text(found: dict[str, Any]) -> str:
    lines = [f"{'component':<10} {'fitted':>7} {'p (family-wise)':>16} {'held out':>9} {'p':>7}"]
    lines += [
        f"{row['component']:<10} {row['correlation']:>7.3f} {row['p_family_wise']:>16.3f} "
        f"{row['held_out']:>9.3f} {row['p_held_out']:>7.3f}"
        for row in found["components"]
    ]
    return "\n".join(lines)


def _rows(table: pl.DataFrame) -> list[dict[str, Any]]:
    """Rows for JSON, which has no NaN; what is nested and not there is left out."""
    nested = ("metrics", "reliability", "learning_curve")
    rows = []
    for row in table.to_dicts():
        out = {key: _number(value) for key, value in row.items() if key not in nested}
        for name in nested:
            if row[name]:
                out[name] = [
                    {key: v for key, v in one.items() if _number(v) is not None}
                    for one in row[name]
                ]
        rows.append(out)
    return rows


def _number(value: Any) -> Any:
    return None if isinstance(value, float) and value != value else value


def _text(table: pl.DataFrame) -> str:
    width = max(34, *(len(name) for name in table["features"]))
    lines = [
        f"{'target':<12} {'from':<{width}} {'metric':<7} {'value':>7} {'95% interval':>18} "
        f"{'p':>7} {'q':>7} {'n':>5}"
    ]
    for row in table.to_dicts():
        interval = f"[{row['ci_low']:.3f}, {row['ci_high']:.3f}]"
        lines.append(
            f"{row['target']:<12} {row['features']:<{width}} {row['metric']:<7} "
            f"{row['value']:>7.3f} {interval:>18} {row['p_value']:>7.3f} {row['q_value']:>7.3f} "
            f"{row['n']:>5}"
        )
    lines.append("q: p adjusted for the number of targets (Benjamini-Hochberg), row by row.")
    return "\n".join(lines)
