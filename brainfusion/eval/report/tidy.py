"""Every number of `results.json` as one tidy table: a row is one metric of one thing measured.

The JSON nests as the report reads it; a table is what people filter, join and plot.
"""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import polars as pl

from brainfusion.eval.report.rows import DIRECTIONS
from brainfusion.runtime.files import atomic_file

Row = Mapping[str, Any]

SCHEMA = {
    "section": pl.String,
    "name": pl.String,
    "direction": pl.String,
    "metric": pl.String,
    "value": pl.Float64,
    "ci_low": pl.Float64,
    "ci_high": pl.Float64,
    "p_value": pl.Float64,
    "chance": pl.Float64,
    "n": pl.Int64,
}
"""Columns of the table; `n` is the gallery for retrieval and people for everything else."""

_NOT_METRICS = {
    "ci_low", "ci_high", "p_value", "q_value", "chance", "n_gallery", "n", "n_people", "n_queries",
    "n_permutations", "n_bootstrap", "seed", "n_families", "n_folds", "standard_error",
}  # fmt: skip
_MAIN = "auc"
"""The metric that a retrieval row's interval and p-value belong to."""


def tidy(results: Row) -> pl.DataFrame:
    """The table of a `results.json`; one row a metric, no ids of people.

    Retrieval rows with intervals of single metrics as `<metric>_ci_low` and so on keep them; the
    interval and p-value without a name are the AUC's.
    """
    rows = [*retrieval_rows(results.get("retrieval") or {}), *_probes(results.get("probes") or [])]
    rows += [*_cca(results.get("cca") or {}), *_attribution(results.get("attribution") or {})]
    return pl.DataFrame(rows, schema=SCHEMA)


def write_tidy(path: Path, results: Row) -> Path:
    """Write the table as Parquet, wholly or not at all."""
    with atomic_file(path) as aside:
        tidy(results).write_parquet(aside)
    return path


def retrieval_rows(retrieval: Row) -> Iterator[dict[str, Any]]:
    """The table's rows of `results["retrieval"]`, or of as much of it as there is."""
    for direction in DIRECTIONS:
        if row := retrieval.get(direction):
            yield from _metrics("retrieval", "alignment", direction, row)
    if control := retrieval.get("shuffled_control"):
        yield from _metrics("control", "shuffled pairs", None, control)
    for section in ("baselines", "strata"):
        for row in retrieval.get(section) or []:
            yield from _metrics(section, str(row["name"]), row.get("direction"), row)


def _metrics(section: str, name: str, direction: str | None, row: Row) -> Iterator[dict[str, Any]]:
    companions = ("_chance", "_ci_low", "_ci_high", "_p_value", "_optimistic", "_pessimistic")
    for key, value in row.items():
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or key in _NOT_METRICS or key.endswith(companions[:4]):
            continue
        own = {
            part: _number(row.get(f"{key}_{part}", row.get(part) if key == _MAIN else None))
            for part in ("ci_low", "ci_high", "p_value", "chance")
        }
        yield {
            "section": section,
            "name": name,
            "direction": direction,
            "metric": key,
            "value": _number(value),
            **own,
            "n": row.get("n_gallery", row.get("n")),
        }


def _probes(probes: Any) -> Iterator[dict[str, Any]]:
    for row in probes:
        yield {
            "section": "probes",
            "name": f"{row['target']} from {row['features']}",
            "direction": None,
            "metric": str(row["metric"]),
            **{
                part: _number(row.get(part))
                for part in ("value", "ci_low", "ci_high", "p_value", "chance")
            },
            "n": row.get("n"),
        }
        for other in row.get("comparisons") or []:
            yield {
                "section": "probe differences",
                "name": f"{row['target']} from {row['features']} less {other['against']}",
                "direction": None,
                "metric": str(row["metric"]),
                "value": _number(other.get("difference")),
                **{part: _number(other.get(part)) for part in ("ci_low", "ci_high", "p_value")},
                "chance": 0.0,
                "n": row.get("n"),
            }


def _cca(cca: Row) -> Iterator[dict[str, Any]]:
    """Of each component: the held-out correlation, and that of the people fitted on.

    The p-value of the second is the family-wise one.
    """
    for row in cca.get("components") or []:
        about = {"section": "cca", "name": f"component {row['component']}", "direction": None}
        held = {part: _number(row.get(part)) for part in ("ci_low", "ci_high")}
        yield {
            **about,
            "metric": "held_out_correlation",
            "value": _number(row.get("held_out")),
            **held,
            "p_value": _number(row.get("p_held_out")),
            "chance": 0.0,
            "n": row.get("n"),
        }
        yield {
            **about,
            "metric": "fitted_correlation",
            "value": _number(row.get("correlation")),
            "p_value": _number(row.get("p_family_wise")),
            "n": row.get("n"),
        }
        for end in ("null_low", "null_high"):
            if row.get(end) is not None:
                yield {
                    **about,
                    "metric": f"held_out_{end}",
                    "value": _number(row[end]),
                    "n": row["n"],
                }


def _attribution(attribution: Row) -> Iterator[dict[str, Any]]:
    tables = [
        (kind, "auc_lost", attribution[kind]["rows"], attribution.get("n_people"))
        for kind in ("genes", "networks", "parcels")
        if attribution.get(kind)
    ]
    tables += [
        (f"genes of {name}", "r2_lost", facts["rows"], facts["n_people"])
        for name, facts in (attribution.get("targets") or {}).items()
    ]
    for kind, metric, rows, n in tables:
        for row in rows:
            yield {
                "section": f"attribution: {kind}",
                "name": str(row["unit"]),
                "direction": None,
                "metric": metric,
                "value": _number(row["drop"]),
                **{part: _number(row.get(part)) for part in ("ci_low", "ci_high", "p_value")},
                "chance": 0.0,
                "n": n,
            }


def _number(value: Any) -> float | None:
    return None if value is None or not math.isfinite(value) else float(value)
