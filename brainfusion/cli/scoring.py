"""Every score of an alignment's test people, beside what it has to be held against."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from brainfusion.cli.pairs import Pairs, connectomes, families_of, load_pairs
from brainfusion.cli.runs import AlignmentRun
from brainfusion.cli.workspace import Workspace
from brainfusion.data.cohort import Cohort
from brainfusion.data.features import Features, read_features
from brainfusion.runtime.files import read_json
from brainfusion.runtime.logs import say

COVARIATES = ("age", "sex", "site", "motion")
BLOCKS = ("site", "group")
DIRECTIONS = {"query_to_gallery": "brain_to_dna", "gallery_to_query": "dna_to_brain"}
_MAX_DRAWN = 20_000
"""Non-pairs whose scores the report draws."""


@dataclass(frozen=True, kw_only=True, eq=False)
class TestPeople:
    """The test people of an alignment, and the vectors whose inner products score their pairs."""

    people: pl.DataFrame
    """Rows of subjects.parquet, [n]."""
    cosine: tuple[np.ndarray, np.ndarray]
    """Unit embeddings of brain and DNA, float32 [n, o]."""
    ratio: tuple[np.ndarray, np.ndarray] | None
    """Score vectors of brain and DNA, float32 [n, k + 2], where the alignment has them."""

    @property
    def vectors(self) -> tuple[np.ndarray, np.ndarray]:
        """Those of the main score: the density ratio's or, without, the cosine's."""
        return self.cosine if self.ratio is None else self.ratio


def score(
    workspace: Workspace,
    cohort: Cohort,
    run: AlignmentRun,
    *,
    n_permutations: int,
    n_bootstrap: int,
    seed: int,
) -> dict[str, Any]:
    """Metrics in both directions with intervals and p-values, the control, baselines, strata.

    The rows are those of `retrieval` in results.json (docs/formats.md). Where the alignment has
    score vectors, the score is their inner product, the log density ratio, and the cosine's metrics
    stand beside it. What the report draws of the test people is written to similarity.npz.
    """
    from brainfusion.eval.retrieval.metrics import retrieval_metrics, stratified_auc

    run_dir = run.path
    test = _test_people(run_dir, cohort)
    draws = {"n_permutations": n_permutations, "n_bootstrap": n_bootstrap, "seed": seed}
    families, blocks = families_of(test.people), exchangeable(test.people)
    inference: dict[str, Any] = {"families": families, "blocks": blocks, **draws}
    found = _with_freely_exchanged(test, retrieval_metrics(*test.vectors, **inference), inference)
    about = {"score": _score_name(test), **_attainable(cohort)}
    scores: dict[str, Any] = {name: {**found[key], **about} for key, name in DIRECTIONS.items()}
    if test.ratio is not None:
        cosine = retrieval_metrics(*test.cosine, **inference)
        scores["cosine"] = {name: cosine[key] for key, name in DIRECTIONS.items()}
    if (run_dir / "control").exists():
        control = _test_people(run_dir / "control", cohort)
        scores["shuffled_control"] = _control(retrieval_metrics(*control.vectors, **inference))
    pairs = load_pairs(workspace, cohort, brain=run.brain, dna=run.dna, haplotypes=run.haplotypes)
    scores["baselines"] = _baselines(workspace, cohort, pairs, brain=run.brain, **draws)
    strata = stratified_auc(*test.vectors, _strata(test.people, families), **inference)
    scores["strata"] = strata
    linear = _attainable_linear(pairs, run_dir, len(families), n_bootstrap=n_bootstrap, seed=seed)
    scores |= {} if linear is None else {"attainable_linear": linear}
    scores["relatives"] = _relatives(pairs)
    _write_figures(run_dir / "similarity.npz", test, seed=seed)
    return scores


def _score_name(test: TestPeople) -> str:
    return "cosine" if test.ratio is None else "density ratio"


def _with_freely_exchanged(
    test: TestPeople, found: dict[str, Any], inference: dict[str, Any]
) -> dict[str, Any]:
    """Adds the naive p-value, of exchanging everybody with everybody, where that is another one."""
    from brainfusion.eval.retrieval.metrics import retrieval_metrics

    families, blocks = inference["families"], inference["blocks"]
    within = [name for name in BLOCKS if name in test.people.columns]
    if len(set(families)) < len(families):
        within.append("family")
    free: dict[str, Any] = {}
    if len(set(blocks or [])) > 1 or "family" in within:
        draws = {name: inference[name] for name in ("n_permutations", "seed")}
        free = retrieval_metrics(*test.vectors, **draws)
    return {
        key: row
        | {"exchanged_within": within}
        | ({"p_value_freely_exchanged": free[key]["p_value"]} if free else {})
        for key, row in found.items()
    }


def _strata(people: pl.DataFrame, families: list[str]) -> dict[str, Any]:
    from brainfusion.eval.retrieval.strata import standard_strata

    strata = standard_strata(people, families)
    if set(BLOCKS) <= set(people.columns):
        # Where sites recruit by ancestry, one of the two alone still leaves the other.
        strata["same site and ancestry group"] = exchangeable(people) or []
    if len(set(families)) == len(families):
        strata.pop("unrelated only", None)
    return strata


def _baselines(
    workspace: Workspace, cohort: Cohort, pairs: Pairs, *, brain: Sequence[str], **draws: int
) -> list[dict[str, Any]]:
    from brainfusion.eval.baselines import baseline_rows
    from brainfusion.eval.design import covariate_matrix

    covariates = [c for c in COVARIATES if c in pairs.people.columns]
    covariates += [c for c in pairs.people.columns if c.startswith("ancestry_")]
    views = {"encoder features": pairs.brain}
    untrained = [workspace.features_path(f"{name}-untrained") for name in brain]
    if all(path.exists() for path in untrained):
        features = [read_features(path).select(pairs.subjects) for path in untrained]
        views["untrained encoder"] = np.concatenate(features, axis=1)
    views["connectome (Pearson FC, PCA)"] = connectomes(cohort, pairs)
    return baseline_rows(
        views,
        pairs.dna,
        labels=pairs.labels,
        covariates=covariate_matrix(pairs.people, covariates) if covariates else None,
        families=pairs.families,
        blocks=exchangeable(pairs.people),
        **draws,
    )


def _attainable_linear(
    pairs: Pairs, run_dir: Path, n_gallery: int, *, n_bootstrap: int, seed: int
) -> dict[str, Any] | None:
    """What a linear-Gaussian model attains, with the same covariates taken out as in the run."""
    from brainfusion.alignment.conditioning import design_matrix
    from brainfusion.eval.attainable import LEAST_PEOPLE, attainable_linear

    if len(pairs.subjects) < LEAST_PEOPLE:
        say(f"attainable by a linear model: not estimated from under {LEAST_PEOPLE} people.")
        return None
    names = read_json(run_dir / "summary.json").get("residualised_on") or ()
    columns = list(dict.fromkeys(name.split("=")[0] for name in names))
    return attainable_linear(
        pairs.brain,
        pairs.dna,
        n_gallery=n_gallery,
        families=pairs.families,
        covariates=design_matrix(pairs.people, columns)[0] if columns else None,
        n_bootstrap=n_bootstrap,
        seed=seed,
    )


def _relatives(pairs: Pairs) -> dict[str, Any]:
    from brainfusion.eval.relatives import alike_in_training

    side = np.asarray(pairs.labels)
    train, test = (np.flatnonzero(side == name) for name in ("train", "test"))
    return alike_in_training(pairs.dna, train, test)


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


def read_scores(run_dir: Path, tower: str) -> Features | None:
    """The score vectors of an alignment; None where pairs are scored by the cosine alone."""
    path = run_dir / "scores" / f"{tower}.parquet"
    return read_features(path) if path.exists() else None


def _test_people(run_dir: Path, cohort: Cohort) -> TestPeople:
    brain, dna = (read_embeddings(run_dir, tower) for tower in ("brain", "dna"))
    assert brain.extra is not None
    with_dna = set(dna.subjects)
    subjects = [
        subject
        for subject, split in zip(brain.subjects, brain.extra["split"], strict=True)
        if split == "test" and subject in with_dna
    ]
    scores = [read_scores(run_dir, tower) for tower in ("brain", "dna")]
    first, second = scores
    return TestPeople(
        people=pl.DataFrame({"subject": subjects}).join(cohort.subjects, on="subject", how="left"),
        cosine=(brain.select(subjects), dna.select(subjects)),
        ratio=(first.select(subjects), second.select(subjects)) if first and second else None,
    )


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


def _write_figures(path: Path, test: TestPeople, *, seed: int) -> None:
    """What the report draws of the test people: scores, ranks, a map; no ids."""
    from brainfusion.eval.retrieval.ranking import rank_pairs
    from brainfusion.eval.retrieval.score_table import ScoreTable

    brain, dna = test.vectors
    n = len(brain)
    rankings = rank_pairs(ScoreTable.from_vectors(brain, dna), np.stack([np.arange(n)] * 2, axis=1))
    # Any two people but the same: the second is 1 to n - 1 places further on.
    rng = np.random.default_rng(seed)
    first = rng.integers(0, n, min(n * (n - 1), _MAX_DRAWN))
    second = (first + rng.integers(1, max(n, 2), len(first))) % n
    together = np.concatenate(test.cosine)
    centred = together - together.mean(0)
    plane = centred @ np.linalg.svd(centred, full_matrices=False)[2][:2].T
    np.savez(
        path,
        pairs=(brain * dna).sum(axis=1),
        non_pairs=(brain[first] * dna[second]).sum(axis=1),
        brain_2d=plane[:n],
        dna_2d=plane[n:],
        ranks_brain_to_dna=rankings[0].auc,
        ranks_dna_to_brain=rankings[1].auc,
    )
