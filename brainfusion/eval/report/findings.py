"""What a comparison of alignments says: sentences, comparison.json and comparison.parquet."""

from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from itertools import combinations
from typing import Any

import numpy as np
import polars as pl

from brainfusion import __version__
from brainfusion.eval.report.compare import AlignmentRun
from brainfusion.eval.report.rows import (
    DIRECTIONS,
    control_failed,
    direction_of,
    method_name,
    number,
    p_text,
    rounded,
)
from brainfusion.eval.report.tidy import SCHEMA, retrieval_rows

Row = Mapping[str, Any]

FORMAT = 1
"""Of `comparison.json`."""
_ALL_PAIRS = 3
"""Up to so many runs, each pair has a sentence; of more, the best run with each other one."""
_SUMMARY = (
    "n_train", "n_validation", "n_test", "best_step", "loss", "log_n", "validation_auc",
    "logit_scale", "effective_rank", "n_processes",
)  # fmt: skip


def comparison(runs: Sequence[AlignmentRun], compared: Sequence[Row]) -> dict[str, Any]:
    """Every number of the page, as comparison.schema.json has it; no ids of people."""
    return {
        "format": FORMAT,
        "package_version": __version__,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "findings": list(findings(runs, compared)),
        "n_common": int(compared[0]["n_queries"]) if compared else 0,
        "runs": [_facts(run) for run in runs],
        "differences": [{**row, "direction": direction_of(row)} for row in compared],
    }


def _facts(run: AlignmentRun) -> dict[str, Any]:
    meta = run.summary.get("meta") or {}
    kept = (*DIRECTIONS, "cosine", "shuffled_control", "attainable_linear")
    return {
        "name": run.name,
        "method": method_name(run.summary),
        "brain": meta.get("brain"),
        "dna": meta.get("dna"),
        **{name: run.summary[name] for name in _SUMMARY if name in run.summary},
        "residualised_on": list(run.summary.get("residualised_on") or []),
        "retrieval": {name: run.retrieval[name] for name in kept if name in run.retrieval},
        "settings": dict(run.config),
    }


TABLE_SCHEMA = {"run": pl.String, "other_run": pl.String, **SCHEMA, "q_value": pl.Float64}
"""Columns of comparison.parquet: those of results.parquet, of which run, and of a difference with
which other run and its p adjusted over all pairs of runs."""


def comparison_table(found: Row) -> pl.DataFrame:
    """comparison.json as a table: a row a metric of a run, and of two runs' difference."""
    rows = [
        {"run": run["name"], **row}
        for run in found["runs"]
        for row in retrieval_rows(run["retrieval"])
    ]
    rows += [
        {
            "run": row["first"],
            "other_run": row["second"],
            "section": "difference",
            "name": f"{row['first']} less {row['second']}",
            "direction": str(direction_of(row)),
            "metric": row["metric"],
            "value": row["difference"],
            **{part: row.get(part) for part in ("ci_low", "ci_high", "p_value", "q_value")},
            "chance": 0.0,
            "n": row["n_queries"],
        }
        for row in found["differences"]
    ]
    return pl.DataFrame(rows, schema=TABLE_SCHEMA)


# -- in sentences ------------------------------------------------------------------------------


def findings(runs: Sequence[AlignmentRun], compared: Sequence[Row]) -> Iterator[str]:
    """What the page says, in sentences; the first is the headline."""
    best = max(runs, key=_mean_auc)
    value = f"AUC {rounded(_mean_auc(best), 3)}, the mean of both directions (chance 0.5)"
    equal = [run.name for run in runs if run is not best and not _clear(best, run, compared)]
    if not equal:
        yield f"{best.name} is best, clearly ahead of {_others(runs, best)}: {value}."
    elif len(equal) == len(runs) - 1:
        yield f"No run is clearly best. The highest is {best.name}: {value}."
    else:
        yield f"The highest is {best.name}, not clearly ahead of {_and(equal)}: {value}."
    for run in runs:
        if control_failed(run.retrieval):
            yield f"CONTROL FAILED in {run.name}: its figures are not to be trusted."
    for run in runs:
        if all(number(run.retrieval[name], "p_value") >= 0.05 for name in DIRECTIONS):
            p = [p_text(number(run.retrieval[name], "p_value")) for name in DIRECTIONS]
            yield f"No evidence of alignment in {run.name}: {' and '.join(dict.fromkeys(p))}."
    every = len(runs) <= _ALL_PAIRS
    for one, other in combinations([run.name for run in runs], 2):
        if every or best.name in (one, other):
            yield _pair(one, other, compared)
    if not every:
        yield "Every other pair of runs is in the table of differences."


def _clear(best: AlignmentRun, other: AlignmentRun, compared: Sequence[Row]) -> bool:
    """Whether the two AUCs are told apart on the same people in both directions."""
    q = [
        row["q_value"]
        for row in compared
        if row["metric"] == "auc" and {row["first"], row["second"]} == {best.name, other.name}
    ]
    return bool(q) and max(q) < 0.05


def _and(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _others(runs: Sequence[AlignmentRun], best: AlignmentRun) -> str:
    others = [run.name for run in runs if run is not best]
    return others[0] if len(others) == 1 else "the others"


def _pair(one: str, other: str, compared: Sequence[Row]) -> str:
    rows = [
        row
        for row in compared
        if row["metric"] == "auc" and (row["first"], row["second"]) == (one, other)
    ]
    if not rows:
        return f"{one} and {other} share too few test people to be compared."
    change = float(np.mean([row["difference"] for row in rows]))
    p = max(row["q_value"] for row in rows)
    better, worse = (one, other) if change > 0 else (other, one)
    if p < 0.05:
        return f"{better} beats {worse} by {abs(change):.3f} AUC (FDR-adjusted p = {p:.2g})."
    return (
        f"{one} and {other} are not told apart: they differ by {abs(change):.3f} AUC "
        f"(FDR-adjusted p = {p:.2g})."
    )


def _mean_auc(run: AlignmentRun) -> float:
    return float(np.mean([run.retrieval[direction]["auc"] for direction in DIRECTIONS]))
