"""Every score of an alignment's test people, beside what it has to be held against."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from brainfusion.cli.pairs import connectomes, families_of, load_pairs, read_haplotypes
from brainfusion.cli.workspace import Workspace
from brainfusion.data.cohort import Cohort
from brainfusion.data.features import Features, read_features

COVARIATES = ("age", "sex", "site", "motion")
BLOCKS = ("site", "group")
STRATA = ("site", "group", "sex")
DIRECTIONS = {"query_to_gallery": "brain_to_dna", "gallery_to_query": "dna_to_brain"}


def score(
    workspace: Workspace,
    cohort: Cohort,
    run_dir: Path,
    *,
    brain: str,
    dna: Sequence[str],
    n_permutations: int,
    n_bootstrap: int,
    seed: int,
) -> dict[str, Any]:
    """Metrics in both directions with intervals and p-values, the control, baselines, strata.

    The rows are those of `retrieval` in results.json (docs/formats.md). What the report draws of
    the test people is written to similarity.npz beside them.
    """
    from brainfusion.eval.baselines import baseline_rows
    from brainfusion.eval.design import covariate_matrix
    from brainfusion.eval.retrieval import retrieval_metrics, stratified_auc

    queries, gallery, people = _test_embeddings(run_dir, cohort)
    draws = {"n_permutations": n_permutations, "n_bootstrap": n_bootstrap, "seed": seed}
    inference: dict[str, Any] = {
        "families": families_of(people),
        "blocks": exchangeable(people),
        **draws,
    }
    found = retrieval_metrics(queries, gallery, **inference)
    ceiling = _attainable(cohort)
    scores: dict[str, Any] = {name: {**found[key], **ceiling} for key, name in DIRECTIONS.items()}
    if (run_dir / "control").exists():
        control_brain, control_dna, _ = _test_embeddings(run_dir / "control", cohort)
        control = retrieval_metrics(control_brain, control_dna, **inference)
        scores["shuffled_control"] = _control(control)
    haplotypes = read_haplotypes(run_dir)
    pairs = load_pairs(workspace, cohort, brain=brain, dna=dna, haplotypes=haplotypes)
    covariates = [c for c in COVARIATES if c in people.columns]
    covariates += [c for c in people.columns if c.startswith("ancestry_")]
    views = {"encoder features": pairs.brain}
    untrained = workspace.features_path(f"{brain}-untrained")
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
        **draws,
    )
    strata = {f"same {name}": people[name].to_list() for name in STRATA if name in people.columns}
    scores["strata"] = stratified_auc(queries, gallery, strata, **inference)
    _write_figures(run_dir / "similarity.npz", queries, gallery, seed=seed)
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


def read_embeddings(run_dir: Path, tower: str) -> Features:
    """The embeddings of an alignment: `tower` is "brain" or "dna"."""
    return read_features(run_dir / "embeddings" / f"{tower}.parquet")


def _test_embeddings(run_dir: Path, cohort: Cohort) -> tuple[np.ndarray, np.ndarray, pl.DataFrame]:
    brain, dna = (read_embeddings(run_dir, tower) for tower in ("brain", "dna"))
    assert brain.extra is not None
    keep = (brain.extra["split"] == "test").to_numpy()
    subjects = [subject for subject, kept in zip(brain.subjects, keep, strict=True) if kept]
    people = pl.DataFrame({"subject": subjects}).join(cohort.subjects, on="subject", how="left")
    return brain.vectors[keep], dna.vectors[keep], people


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
