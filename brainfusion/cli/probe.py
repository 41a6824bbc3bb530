"""`brainfusion probe`: predict phenotypes from features and from embeddings.

Ridge and logistic probes with nested cross-validation, on the people whom the alignment was not
trained on, beside a row from the confounds alone. Numbers with more than two values are continuous
targets, two values are two classes, more labels are as many classes. Several brain encoders or DNA
models of a run are a row each, of the people who have all. Embeddings are compared with the
features that they were made of, late fusion with its parts, features with the connectome. Writes
<workspace>/probes.json and, with a row a metric, probes.parquet; with --cca, cca.json. With --run
they go into the run's own folder.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import polars as pl
import tyro

from brainfusion.cli.gather import home_of
from brainfusion.cli.options import at_least, parse
from brainfusion.cli.probed import Probed, cca, cca_text, read_probed
from brainfusion.cli.runs import WhichRun, check_cohort, find_run
from brainfusion.cli.workspace import Place, Workspace
from brainfusion.runtime.errors import UserError, nearest
from brainfusion.runtime.files import atomic_file, write_json
from brainfusion.runtime.logs import say
from brainfusion.runtime.threads import one_thread

KNOWN_COLUMNS = ("subject", "family", "site", "motion", "group")


@dataclass(frozen=True, kw_only=True, slots=True)
class ProbeOptions:
    """Options of `brainfusion probe`."""

    alignment: tyro.conf.OmitArgPrefixes[WhichRun] = field(default_factory=WhichRun)
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
    learning_curve: tuple[float, ...] = (0.25, 0.5)
    """Shares of the training people to learn from; the whole is always there.
    Without a number behind it, no learning curves."""
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
    run = find_run(workspace, options.alignment)
    cohort = workspace.open_cohort()
    check_cohort(run, cohort)
    targets = _targets(options, cohort.subjects)
    from brainfusion.eval.probing.probes import tidy

    probed = read_probed(workspace, cohort, run)
    home = home_of(workspace, run, by_folder=options.alignment.run is not None)
    table = _probe(options, probed, targets)
    with atomic_file(home / "probes.parquet") as aside:
        tidy(table).write_parquet(aside)
    write_json(home / "probes.json", _rows(table))
    print(_text(table))
    say(f"written: {home / 'probes.json'}")
    if options.cca:
        found = cca(
            probed,
            n_components=options.cca,
            n_pcs=options.cca_pcs,
            confounds=list(options.confounds),
            n_folds=options.n_folds,
            n_permutations=options.cca_permutations,
            n_bootstrap=options.bootstrap,
            seed=options.seed,
        )
        write_json(home / "cca.json", found)
        print(cca_text(found))
        say(f"written: {home / 'cca.json'}")
    return 0


def _probe(options: ProbeOptions, probed: Probed, targets: list[str]) -> pl.DataFrame:
    kept = probed.held_out
    say(f"probing {kept.sum()} people on whom the alignment was not trained: {', '.join(targets)}")
    return _predict(
        options, probed, probed.features(), probed.pairs.people.filter(pl.Series(kept)), targets
    )


def _predict(
    options: ProbeOptions,
    probed: Probed,
    features: dict[str, np.ndarray],
    people: pl.DataFrame,
    targets: list[str],
) -> pl.DataFrame:
    """Probe all targets; one that was not asked for and cannot be predicted is left out and said.

    Raises:
        UserError: A target that was asked for cannot be predicted, or none can.
    """
    from brainfusion.eval.probing.probes import Extras, TargetError, probe

    extras = Extras(
        fusion=[(*probed.brain, *probed.dna)] if options.fusion else (),
        pca=("connectome", *probed.dna) if options.pca else (),
        n_pcs=options.pca or 1,
        neighbours=options.knn,
        learning_curve=options.learning_curve,
        rechoose=options.rechoose,
        compare=_compared(options, probed),
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


def _compared(options: ProbeOptions, probed: Probed) -> list[tuple[str, str]]:
    """Pairs of rows that are tested against each other: is the first better than the second?"""
    features, vectors = list(probed.brain), list(probed.dna)
    pairs = [(name, "connectome") for name in features]
    pairs += [("brain embedding", name) for name in features]
    pairs += [("DNA embedding", name) for name in vectors]
    if options.fusion:
        joined = " + ".join([*features, *vectors])
        pairs += [(joined, name) for name in (*features, *vectors)]
    return pairs


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


def _rows(table: pl.DataFrame) -> list[dict[str, Any]]:
    """Rows for JSON, which has no NaN; what is nested and not there is left out."""
    nested = [name for name, kind in table.schema.items() if kind == pl.List]
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
