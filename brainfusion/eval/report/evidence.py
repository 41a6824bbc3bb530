"""How strongly rows of results.json speak for an alignment, and how they are compared.

Two AUCs are compared in the directions that have an interval, each with the same direction of the
other.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from brainfusion.eval.report.rows import (
    DIRECTION_NAMES,
    DIRECTIONS,
    direction_of,
    number,
    with_interval,
)

Row = Mapping[str, Any]
Evidence = Literal["found", "weak", "none", "below"]


def evidence(row: Row) -> Evidence:
    """How strongly one retrieval direction speaks for an alignment."""
    chance = number(row, "chance", 0.5)
    low, high, p = number(row, "ci_low"), number(row, "ci_high"), number(row, "p_value")
    if high < chance:
        return "below"
    if math.isnan(p):
        return "found" if low > chance else "none"
    above = low > chance or (math.isnan(low) and row["auc"] > chance)
    if p < 0.01 and above:
        return "found"
    return "weak" if p < 0.05 or above else "none"


def smallest_detectable(row: Row) -> float:
    """The AUC that a one-sided 5% test detects with power 80%, given this row's uncertainty.

    The standard error is that of the interval (which knows about families), but at least the one
    of independent people, whose AUC is uniform under the null: sqrt(1 / (12 n)).
    """
    errors = [(number(row, "ci_high") - number(row, "ci_low")) / (2 * 1.96)]
    if row.get("n_gallery"):
        errors.append(math.sqrt(1.0 / (12.0 * row["n_gallery"])))
    return 0.5 + (1.645 + 0.842) * max([e for e in errors if not math.isnan(e)], default=math.nan)


def comparable(rows: Sequence[Row]) -> Sequence[Row]:
    """The rows with an interval, if there are any: others cannot be compared."""
    return [row for row in rows if math.isfinite(number(row, "ci_low"))] or rows


def mean_row(rows: Sequence[Row]) -> Row:
    """AUC and bounds averaged over directions, which share their people: bounds do not shrink."""
    rows = comparable(rows)
    means = {
        key: sum(number(row, key) for row in rows) / len(rows)
        for key in ("auc", "ci_low", "ci_high")
    }
    return {key: value for key, value in means.items() if math.isfinite(value)}


def aligner(retrieval: Row, like: Sequence[Row]) -> Row | None:
    """The aligner's own figures, averaged over the directions that `like` is compared in."""
    asked = {direction_of(row) for row in comparable(like)} - {None} or set(DIRECTIONS)
    rows = [retrieval[name] for name in DIRECTIONS if retrieval.get(name) and name in asked]
    return mean_row(rows) if rows else None


def in_words(rows: Sequence[Row]) -> str:
    """The mean AUC, and of which direction it is if it is one alone."""
    asked = {direction_of(row) for row in comparable(rows)} - {None}
    one = f" from {DIRECTION_NAMES[str(next(iter(asked)))]}" if len(asked) == 1 else ""
    return f"AUC {with_interval(mean_row(rows))}{one}"


def is_found(retrieval: Row) -> bool:
    """Whether any direction is found."""
    return any(evidence(retrieval[name]) == "found" for name in DIRECTIONS if retrieval.get(name))


def is_above_chance(retrieval: Row) -> bool:
    """Whether any direction is found, or would be if its p-value were believed."""
    kinds = {evidence(retrieval[name]) for name in DIRECTIONS if retrieval.get(name)}
    return bool(kinds & {"found", "weak"})
