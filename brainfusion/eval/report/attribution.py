"""The report's section on what retrieval, and predictions, rest on: genes, networks, parcels."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from brainfusion.eval.report import figures_attribution as figures
from brainfusion.eval.report.parts import figure, folded, missing, side_by_side, table
from brainfusion.eval.report.rows import p_exact

Row = Mapping[str, Any]

KINDS = {"genes": "gene", "networks": "network", "parcels": "parcel"}
"""What may be hidden, and what one of them is called."""
_SHOWN = 20


def attribution_section(attribution: Row) -> str:
    """All tables of `attribution.json`, each with its figures."""
    kinds = [kind for kind in KINDS if attribution.get(kind)]
    targets = attribution.get("targets") or {}
    if not kinds and not targets:
        return missing("Nobody has asked which genes and networks count.", "attribute")
    parts = [_retrieval(attribution, kinds)] if kinds else []
    return "".join([*parts, *([_predictions(targets)] if targets else [])])


def _retrieval(attribution: Row, kinds: Sequence[str]) -> str:
    how = (
        "trained again without it"
        if attribution.get("retrained")
        else "hidden from the trained model"
    )
    text = (
        "<p>Each line: how much AUC the test people's retrieval loses with one unit hidden "
        f"(genes: {how}; networks and parcels: their signal made flat, recordings embedded again). "
        f"{attribution['n_people']:,} test people; intervals by a bootstrap of families, p by a "
        "signed-rank test over families, corrected within the table (FDR). Units that carry the "
        "same thing cover for each other.</p>\n"
    )
    return text + side_by_side([f"<div>{_kind(k, attribution[k])}</div>\n" for k in kinds])


def _predictions(targets: Mapping[str, Row]) -> str:
    """Which genes each phenotype's prediction rests on."""
    first = next(iter(targets.values()))
    confounds = ", ".join(first["confounds"]) or "nothing"
    text = (
        "<p>Each line: how much the R2 of a phenotype, predicted by ridge from the DNA vectors of "
        "people held out, falls without one gene (in closed form, the penalty chosen again; "
        f"{first['n_folds']} folds of whole families; {confounds} held constant). Nothing of the "
        "alignment is in it. p by the larger of a signed-rank and a t-test over families, "
        "corrected within the table (FDR).</p>\n"
    )
    return text + side_by_side(
        [
            f"<div>{_target(place, name, facts)}</div>\n"
            for place, (name, facts) in enumerate(targets.items())
        ]
    )


def _target(place: int, name: str, facts: Row) -> str:
    rows = facts["rows"]
    sentence = summary("genes", rows)
    drawn = figures.drops(
        rows[:_SHOWN], name=f"attribution-{place}", label=f"{name}: {sentence}", measure="R2"
    )
    r2 = f" With all genes the R2 is {facts['r2']:.3f}, of {facts['n_people']:,} people."
    more = f" The {_SHOWN} largest of {len(rows)}." if len(rows) > _SHOWN else ""
    text = f"<h3>Genes, prediction of {escape(name)}</h3>\n" + figure(drawn, sentence + r2 + more)
    return text + _all("genes", rows, "R2")


def summary(kind: str, rows: Sequence[Row]) -> str:
    """One sentence: which units matter."""
    kept = [str(row["unit"]) for row in rows if _matters(row)]
    if not kept:
        return f"No {KINDS[kind]} matters by itself ({len(rows)} tested, FDR 5%)."
    names = ", ".join(kept[:8]) + (f" and {len(kept) - 8} more" if len(kept) > 8 else "")
    return f"{len(kept)} of {len(rows)} {kind} matter (FDR 5%): {names}."


def _kind(kind: str, facts: Row) -> str:
    rows = facts["rows"]
    sentence = summary(kind, rows)
    drawn = figures.drops(rows[:_SHOWN], name=f"attribution-{kind}", label=sentence)
    more = f" The {_SHOWN} largest of {len(rows)}." if len(rows) > _SHOWN else ""
    text = f"<h3>{kind.capitalize()}</h3>\n" + figure(drawn, sentence + more)
    if facts.get("xyz_mm"):
        where = figures.glass_brain(
            np.asarray(facts["xyz_mm"], dtype=float),
            _of_parcels(kind, facts, {row["unit"]: row["drop"] for row in rows}),
            _of_parcels(kind, facts, {row["unit"]: float(_matters(row)) for row in rows}) > 0,
            name=f"glass-{kind}",
            label=f"Glass brain: AUC lost when a {KINDS[kind]} is hidden. {sentence}",
        )
        caption = (
            f"Parcels at their centroids; size: AUC lost when the {KINDS[kind]} is hidden. Blue: "
            "FDR below 5%; grey: not told apart from nothing."
        )
        text += figure(where, caption)
    return text + _all(kind, rows, "AUC")


def _all(kind: str, rows: Sequence[Row], measure: str) -> str:
    """Every row, folded away."""
    heading = [KINDS[kind].capitalize(), f"{measure} lost", "95% interval", "p", "q (FDR)"]
    body = [
        [
            str(row["unit"]),
            f"{row['drop']:+.4f}",
            f"{row['ci_low']:+.4f} to {row['ci_high']:+.4f}",
            p_exact(row["p_value"]),
            p_exact(row["q_value"]),
        ]
        for row in rows
    ]
    return folded(f"All {len(rows)} {kind}", table(heading, body))


def _matters(row: Row) -> bool:
    return row["q_value"] < 0.05 and row["drop"] > 0


def _of_parcels(kind: str, facts: Row, values: Mapping[str, float]) -> np.ndarray:
    """The value of each parcel, or of the network it belongs to: float64 [p]."""
    units = facts["parcels"] if kind == "parcels" else facts["networks"] or []
    return np.array([values.get(unit, 0.0) for unit in units])
