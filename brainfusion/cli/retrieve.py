"""`brainfusion retrieve`: score cross-modal retrieval, or ask for the nearest people.

Scores the test people of an alignment in both directions, beside baselines, strata and the control.
With --query ID it answers instead: who are the people whose brains are nearest to this DNA?
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import polars as pl
import tyro

from brainfusion.cli.options import at_least, parse
from brainfusion.cli.pairs import connectomes, families_of, load_pairs
from brainfusion.cli.workspace import Place, Workspace, ensure_features, known_dna
from brainfusion.data.cohort import Cohort
from brainfusion.data.features import Features, read_features
from brainfusion.runtime.errors import UserError
from brainfusion.runtime.files import write_json
from brainfusion.runtime.logs import say
from brainfusion.runtime.threads import one_thread

COVARIATES = ("age", "sex", "site", "motion")
BLOCKS = ("site", "group")
STRATA = ("site", "group", "sex")
DIRECTIONS = {"query_to_gallery": "brain_to_dna", "gallery_to_query": "dna_to_brain"}


@dataclass(frozen=True, kw_only=True, slots=True)
class RetrieveOptions:
    """Options of `brainfusion retrieve`."""

    brain: str = "brainjepa"
    """Brain features of the alignment."""
    dna: str = "evo2"
    """DNA embeddings of the alignment."""
    place: tyro.conf.OmitArgPrefixes[Place] = field(default_factory=Place)
    query: str | None = None
    """A subject id: print the people nearest to this one instead of the scores."""
    query_from: Literal["dna", "brain"] = "dna"
    """Which of the person's two embeddings asks; the other modality is searched."""
    top: int = 10
    """How many people a query prints."""
    among: Literal["test", "all"] = "all"
    """Whom a query searches: the test people, or everybody with a pair."""
    json: bool = False
    """Print JSON instead of a table."""
    permutations: int = 999
    """Permutations of whole families for each p-value."""
    bootstrap: int = 1000
    """Bootstrap samples of families for each interval."""
    seed: int = 0
    """Seeds permutations and bootstrap."""

    def __post_init__(self) -> None:
        at_least(self, 1, "top", "permutations")
        at_least(self, 2, "bootstrap")


def main(argv: list[str]) -> int:
    """Score the test people's retrieval, or answer one query."""
    options = parse(RetrieveOptions, argv, prog="brainfusion retrieve", description=__doc__ or "")
    workspace = Workspace.of(options.place)
    run_dir = ensure_alignment(workspace, options.brain, options.dna)
    if options.query is not None:
        return _answer(options, run_dir)
    cohort = workspace.open_cohort()
    with one_thread():
        scores = score(workspace, cohort, run_dir, options)
    write_json(run_dir / "retrieval.json", scores)
    print(json.dumps(scores, indent=2) if options.json else _table(scores))
    say(f"written: {run_dir / 'retrieval.json'}")
    return 0


def ensure_alignment(workspace: Workspace, brain: str, dna: str) -> Path:
    """An alignment run; on the demo cohort it is made if it is not there."""
    from brainfusion.cli import align

    path = workspace.align_dir(brain, dna)
    if not (path / "embeddings" / "dna.parquet").exists():
        flags = ["--brain", brain, "--dna", dna, *workspace.options()]
        known_dna(dna)
        if not workspace.demo:
            ensure_features(workspace, brain)
            raise UserError(f"{path} does not exist: run 'brainfusion align {' '.join(flags)}'.")
        say(f"{path} is missing: aligning {brain} and {dna}")
        align.main(flags)
    return path


def score(
    workspace: Workspace, cohort: Cohort, run_dir: Path, options: RetrieveOptions
) -> dict[str, Any]:
    """Metrics in both directions with intervals and p-values, the control, baselines, strata."""
    from brainfusion.eval.baselines import baseline_rows
    from brainfusion.eval.design import covariate_matrix
    from brainfusion.eval.retrieval import retrieval_metrics, stratified_auc

    brain, dna, people = _test_embeddings(run_dir, cohort)
    inference: dict[str, Any] = {
        "families": families_of(people),
        "n_permutations": options.permutations,
        "n_bootstrap": options.bootstrap,
        "seed": options.seed,
    }
    blocks = exchangeable(people)
    found = retrieval_metrics(brain, dna, blocks=blocks, **inference)
    ceiling = _attainable(cohort)
    scores: dict[str, Any] = {name: {**found[key], **ceiling} for key, name in DIRECTIONS.items()}
    if (run_dir / "control").exists():
        control_brain, control_dna, _ = _test_embeddings(run_dir / "control", cohort)
        control = retrieval_metrics(control_brain, control_dna, blocks=blocks, **inference)
        scores["shuffled_control"] = _control(control)
    pairs = load_pairs(workspace, cohort, brain=options.brain, dna=options.dna)
    covariates = [c for c in COVARIATES if c in people.columns]
    covariates += [c for c in people.columns if c.startswith("ancestry_")]
    views = {"encoder features": pairs.brain}
    untrained = workspace.features_path(f"{options.brain}-untrained")
    if untrained.exists():
        views["untrained encoder"] = read_features(untrained).select(pairs.subjects)
    views["connectome (Pearson FC, PCA)"] = connectomes(cohort, pairs)
    scores["baselines"] = baseline_rows(
        views,
        pairs.dna,
        labels=pairs.labels,
        covariates=covariate_matrix(pairs.people, covariates) if covariates else None,
        families=pairs.families,
        blocks=exchangeable(pairs.people),
        n_permutations=options.permutations,
        n_bootstrap=options.bootstrap,
        seed=options.seed,
    )
    strata = {f"same {name}": people[name].to_list() for name in STRATA if name in people.columns}
    scores["strata"] = stratified_auc(brain, dna, strata, blocks=blocks, **inference)
    _write_figures(run_dir / "similarity.npz", brain, dna, seed=options.seed)
    return scores


def exchangeable(people: pl.DataFrame) -> list[str] | None:
    """Within what people may be exchanged in a permutation: their site and ancestry group.

    Groups recruited by site look coupled in both modalities without any link in a person.
    """
    known = [name for name in BLOCKS if name in people.columns]
    if not known:
        return None
    text = [pl.col(name).cast(pl.String).fill_null("unknown") for name in known]
    return people.select(pl.concat_str(text, separator="/")).to_series().to_list()


def _test_embeddings(run_dir: Path, cohort: Cohort) -> tuple[np.ndarray, np.ndarray, pl.DataFrame]:
    brain, dna = (_read(run_dir, tower) for tower in ("brain", "dna"))
    assert brain.extra is not None
    keep = (brain.extra["split"] == "test").to_numpy()
    subjects = [subject for subject, kept in zip(brain.subjects, keep, strict=True) if kept]
    people = pl.DataFrame({"subject": subjects}).join(cohort.subjects, on="subject", how="left")
    return brain.vectors[keep], dna.vectors[keep], people


def _read(run_dir: Path, tower: str) -> Features:
    return read_features(run_dir / "embeddings" / f"{tower}.parquet")


def _attainable(cohort: Cohort) -> dict[str, float | None]:
    """The oracle's AUC on the test people, known for simulated cohorts only."""
    truth = cohort.truth() or {}
    return {
        "attainable": truth.get("oracle_g_z", {}).get("auc"),
        "attainable_from_bold": truth.get("oracle_g_bold", {}).get("auc"),
    }


def _control(found: dict[str, Any]) -> dict[str, Any]:
    """The control's two directions as one row: their mean AUC and its null spread."""
    both = [found[key] for key in DIRECTIONS]
    auc = float(np.mean([row["auc"] for row in both]))
    error = float(np.max([row["standard_error"] for row in both]))
    return {
        "auc": auc,
        "standard_error": error,
        "p_value": min(1.0, 2 * min(row["p_value"] for row in both)),
        "chance": 0.5,
        "n_gallery": both[0]["n_gallery"],
        "within_3_standard_errors": bool(abs(auc - 0.5) <= 3 * error),
        **{name: found[key] for key, name in DIRECTIONS.items()},
    }


def _write_figures(path: Path, brain: np.ndarray, dna: np.ndarray, *, seed: int) -> None:
    """What the report draws of the test people: scores, ranks, a map; no ids."""
    similarity = brain @ dna.T
    n = len(similarity)
    pairs, others = np.diag(similarity), similarity[~np.eye(n, dtype=bool)]
    rng = np.random.default_rng(seed)
    centred = np.concatenate([brain, dna]) - np.concatenate([brain, dna]).mean(0)
    axes = np.linalg.svd(centred, full_matrices=False)[2][:2]
    plane = centred @ axes.T
    ranks = [
        (table < np.diag(table)[:, None]).sum(1) / max(n - 1, 1)
        for table in (similarity, similarity.T)
    ]
    np.savez(
        path,
        pairs=pairs,
        non_pairs=rng.choice(others, min(len(others), 20_000), replace=False),
        brain_2d=plane[:n],
        dna_2d=plane[n:],
        ranks_brain_to_dna=ranks[0],
        ranks_dna_to_brain=ranks[1],
    )


def _answer(options: RetrieveOptions, run_dir: Path) -> int:
    """Print the people whose other modality is nearest to this person's."""
    from brainfusion.eval.index import RetrievalIndex

    searched = "brain" if options.query_from == "dna" else "dna"
    asking, gallery = _read(run_dir, options.query_from), _read(run_dir, searched)
    if options.query not in asking.subjects:
        raise UserError(
            f"there is no person '{options.query}' among the {len(asking.subjects)} pairs of "
            f"{run_dir}: give an id of the cohort's subjects.parquet."
        )
    assert gallery.extra is not None
    keep = [
        i for i, s in enumerate(gallery.extra["split"]) if options.among == "all" or s == "test"
    ]
    index = RetrievalIndex.build(gallery.vectors[keep], [gallery.subjects[i] for i in keep])
    vector = asking.vectors[asking.subjects.index(options.query)]
    rows = [row._asdict() for row in index.query(vector, options.top)]
    if options.json:
        print(json.dumps(rows, indent=2))
        return 0
    print(
        f"the {len(rows)} people whose {searched} is nearest to this person's {options.query_from},"
    )
    print(f"of {len(keep)} ({options.among}):")
    for row in rows:
        own = "  <- the same person" if row["id"] == options.query else ""
        print(f"{row['rank']:>4}  {row['id']:<20} cosine {row['score']:.3f}{own}")
    return 0


def _table(scores: dict[str, Any]) -> str:
    rows = [("brain to DNA", scores["brain_to_dna"]), ("DNA to brain", scores["dna_to_brain"])]
    rows += [(row["name"], row) for row in scores["baselines"]]
    rows += [
        (f"{row['name']}, {DIRECTIONS[row['direction']].replace('_', ' ')}", row)
        for row in scores["strata"]
        if row["auc"] is not None
    ]
    if "shuffled_control" in scores:
        rows.append(("shuffled pairs (control), mean of both", scores["shuffled_control"]))
    lines = [f"{'':<42} {'AUC':>6} {'95% interval':>16} {'p':>7} {'chance':>7} {'gallery':>8}"]
    for name, row in rows:
        interval = f"[{row['ci_low']:.3f}, {row['ci_high']:.3f}]" if "ci_low" in row else ""
        lines.append(
            f"{name:<42} {row['auc']:>6.3f} {interval:>16} "
            f"{row.get('p_value', float('nan')):>7.3f} {0.5:>7.3f} {row['n_gallery']:>8}"
        )
    row = scores["brain_to_dna"]
    lines.append(
        f"R@1 {row['recall_at_1']:.3f} (chance {row['recall_at_1_chance']:.3f}), "
        f"R@10 {row['recall_at_10']:.3f} (chance {row['recall_at_10_chance']:.3f}), "
        f"median rank {row['median_rank']:.1f} (chance {row['median_rank_chance']:.1f}); brain "
        f"to DNA, unit: {row['unit']}"
    )
    if row["attainable"] is not None:
        lines.append(f"attainable AUC: {row['attainable']:.3f} (oracle of the simulation)")
    return "\n".join(lines)
