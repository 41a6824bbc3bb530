"""`brainfusion probe`: predict phenotypes from features and from embeddings.

Ridge and logistic probes with nested cross-validation, on the people whom the alignment was not
trained on, beside a row from the confounds alone. Writes <workspace>/probes.json.
"""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import polars as pl
import tyro

from brainfusion.cli.options import at_least, parse
from brainfusion.cli.pairs import connectomes, dna_models, dna_name, load_pairs, read_haplotypes
from brainfusion.cli.retrieve import ensure_alignment
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
    """Columns of subjects.parquet to predict; all phenotypes, age and sex by default."""
    confounds: tuple[str, ...] = ("age", "sex", "site", "motion")
    """Columns that are predicted from alone, and residualised in the fold."""
    n_folds: int = 5
    """Outer folds; families stay together, and all representations share them."""
    permutations: int = 199
    """Permutations for each p-value."""
    bootstrap: int = 500
    """Bootstrap samples of families for each interval."""
    seed: int = 0
    """Seeds folds, permutations and bootstrap."""

    def __post_init__(self) -> None:
        at_least(self, 1, "permutations")
        at_least(self, 2, "bootstrap")


def main(argv: list[str]) -> int:
    """Probe the people on whom the alignment was not trained."""
    options = parse(ProbeOptions, argv, prog="brainfusion probe", description=__doc__ or "")
    workspace = Workspace.of(options.place)
    run_dir = ensure_alignment(workspace, options.brain, dna_models(options.dna))
    cohort = workspace.open_cohort()
    targets = _targets(options, cohort.subjects)
    table = _probe(options, workspace, cohort, run_dir, targets)
    with atomic_file(workspace.root / "probes.parquet") as aside:
        table.write_parquet(aside)
    write_json(workspace.root / "probes.json", _rows(table))
    print(_text(table))
    say(f"written: {workspace.root / 'probes.json'}")
    return 0


def _probe(
    options: ProbeOptions, workspace: Workspace, cohort: Cohort, run_dir: Path, targets: list[str]
) -> pl.DataFrame:
    dna = dna_models(options.dna)
    haplotypes = read_haplotypes(run_dir)
    pairs = load_pairs(workspace, cohort, brain=options.brain, dna=dna, haplotypes=haplotypes)
    held_out = np.array([label != "train" for label in pairs.labels])
    subjects = [s for s, kept in zip(pairs.subjects, held_out, strict=True) if kept]
    say(
        f"probing {len(subjects)} people on whom the alignment was not trained: "
        f"{', '.join(targets)}"
    )
    features = {
        f"{options.brain} features": pairs.brain[held_out],
        "connectome": connectomes(cohort, pairs)[held_out],
        f"{dna_name(dna)} vectors": pairs.dna[held_out],
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
    from brainfusion.eval.probes import TargetError, probe

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
                )
        except TargetError as error:
            if options.targets:
                raise
            say(f"left out: {error}")
            targets = [name for name in targets if name != error.target]
    raise UserError(
        "subjects.parquet has no column that can be predicted: add age, sex or phenotypes, as "
        "numbers or two labels."
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


def _rows(table: pl.DataFrame) -> list[dict]:
    """Rows for JSON, which has no NaN."""
    return [
        {
            key: None if isinstance(value, float) and value != value else value
            for key, value in row.items()
        }
        for row in table.to_dicts()
    ]


def _text(table: pl.DataFrame) -> str:
    lines = [
        f"{'target':<12} {'from':<34} {'metric':<7} {'value':>7} {'95% interval':>18} {'p':>7} "
        f"{'n':>5}"
    ]
    for row in table.to_dicts():
        interval = f"[{row['ci_low']:.3f}, {row['ci_high']:.3f}]"
        lines.append(
            f"{row['target']:<12} {row['features']:<34} {row['metric']:<7} {row['value']:>7.3f} "
            f"{interval:>18} {row['p_value']:>7.3f} {row['n']:>5}"
        )
    return "\n".join(lines)
