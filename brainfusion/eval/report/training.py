"""The report's section on training: loss curves, and first and last figures with their meaning."""

import math
from collections.abc import Iterator, Mapping
from html import escape
from pathlib import Path
from typing import Any

from brainfusion.eval.report import figures
from brainfusion.eval.report.parts import (
    figure,
    metrics_of,
    missing,
    seconds_text,
    side_by_side,
    significant,
    table,
)
from brainfusion.eval.report.rows import number, rounded

Row = Mapping[str, Any]

MEANINGS = {
    "validation_loss": ("validation loss", ""),
    "masked_r2": (
        "masked R2",
        "share of the hidden signal's variance that is reconstructed; 0 is its mean, 1 is all",
    ),
    "interpolation_r2": (
        "R2 of linear interpolation in time",
        "of the hidden values from the visible ones of the same parcel",
    ),
    "neighbours_r2": (
        "R2 of the nearest visible parcels",
        "of hidden values from 8 of them at the same time, the nearer the more",
    ),
    "feature_std": (
        "spread of the features",
        "standard deviation between recordings; falling towards 0 is collapse",
    ),
    "target_std": (
        "spread of the targets",
        "standard deviation over the tokens to predict; falling towards 0 is collapse",
    ),
    "effective_rank": (
        "effective rank",
        "dimensions that the features make use of; falling towards 1 is collapse",
    ),
    "r2_over_interpolation": (
        "R2 over interpolation",
        "1 - error / error of linear interpolation; above 0 is better than it",
    ),
    "loss_of_mean_target": (
        "loss of the mean target",
        "what guessing the mean target costs; a validation loss as high has learnt nothing",
    ),
}
"""Diagnostics of pretraining -> name, and a clause on what it means."""


def training_section(results: Row, workspace: Path) -> str:
    """Loss curves of pretraining and alignment, and what else was watched."""
    pretraining = results.get("pretraining") or {}
    alignment = results.get("alignment") or {}
    drawn = _pretraining_figures(pretraining, workspace)
    text = "" if drawn else missing("No pretraining in this run.", "pretrain")
    curves = _alignment_figures(alignment, workspace)
    text += "" if curves else missing("No loss curve of an alignment.", "align")
    tables = [
        table(["pretraining", "first", "last"], list(_pretraining_rows(pretraining, workspace))),
        table(["alignment", ""], list(_alignment_rows(alignment))),
    ]
    return (
        text
        + side_by_side(drawn + curves)
        + side_by_side([f"<div>{rows}</div>" for rows in tables if rows])
    )


def _pretraining_figures(pretraining: Row, workspace: Path) -> list[str]:
    drawn = []
    for model, row in pretraining.items():
        rows = metrics_of(workspace, row)
        if not rows:
            drawn.append(
                missing(f"No loss curve of {model}: its metrics are not in the workspace.")
            )
            continue
        svg = figures.losses(
            rows, name=f"loss-{len(drawn)}", label=f"Loss of pretraining {model}{_facts(row)}"
        )
        drawn.append(figure(svg, f"Pretraining of <b>{escape(str(model))}</b>{_facts(row)}"))
    return drawn


def _facts(row: Row) -> str:
    facts = []
    if row.get("n_steps"):
        facts.append(f"{row['n_steps']:,} steps")
    if row.get("n_parameters"):
        facts.append(f"{row['n_parameters']:,} parameters")
    if math.isfinite(number(row, "seconds")):
        facts.append(seconds_text(number(row, "seconds")))
    return f": {', '.join(facts)}." if facts else "."


def _pretraining_rows(pretraining: Row, workspace: Path) -> Iterator[tuple[str, str, str]]:
    """One line a diagnostic of a model: name and meaning, first value, last value."""
    for model, row in pretraining.items():
        first, last = _ends(row, workspace)
        for name in first | last:
            values = (number(first, name), number(last, name))
            if not any(math.isfinite(value) for value in values):
                continue
            text, meaning = MEANINGS.get(name, (name.replace("_", " "), ""))
            start, end = ("" if math.isnan(value) else significant(value, 3) for value in values)
            yield f"{model}: {text}" + (f"\n{meaning}" if meaning else ""), start, end


def _ends(row: Row, workspace: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What was watched at the first and the last validation."""
    first, last = row.get("first"), row.get("last")
    if isinstance(first, Mapping) and isinstance(last, Mapping):
        return dict(first), dict(last)
    watched = [
        {key: line[key] for key in MEANINGS if key in line}
        for line in metrics_of(workspace, row)
        if "validation_loss" in line
    ]
    if watched:
        return watched[0], watched[-1]
    end = number(row, "final_loss")
    return {}, {"final loss": end} if math.isfinite(end) else {}


def _alignment_figures(alignment: Row, workspace: Path) -> list[str]:
    log_n, best = alignment.get("log_n"), alignment.get("best_step")
    rows = [{"log_n": log_n, **row} for row in metrics_of(workspace, alignment)]
    if not rows:
        return []
    brain, dna = (escape(str(alignment.get(key))) for key in ("brain", "dna"))
    label = "Loss of the alignment, with log N, the loss of guessing."
    drawn = []
    # Closed-form methods have no loss: their rows are candidates.
    if any(math.isfinite(number(row, "loss")) for row in rows):
        drawn.append(
            figure(
                figures.losses(rows, name="loss-align", label=label, best_step=best),
                f"Alignment of <b>{brain}</b> and <b>{dna}</b>. A loss at log N is that of "
                "guessing among N people.",
            )
        )
    if any(math.isfinite(number(row, "validation_auc")) for row in rows):
        drawn.append(
            figure(
                figures.validation_auc(rows, best_step=best),
                "Retrieval among the validation people while the alignment trained. The step "
                "was chosen on them, never on the test people.",
            )
        )
    return drawn


def _alignment_rows(row: Row) -> Iterator[tuple[str, str]]:
    counts = {
        "n_train": "people to train on",
        "n_validation": "people to choose the step on",
        "n_test": "people to test on",
        "best_step": "step that was kept",
    }
    for key, text in counts.items():
        if math.isfinite(number(row, key)):
            steps = number(row, "n_steps")
            of = f" of {steps:,.0f}" if key == "best_step" and math.isfinite(steps) else ""
            yield text, f"{number(row, key):,.0f}{of}"
    loss, log_n = number(row, "loss"), number(row, "log_n")
    if math.isfinite(loss):
        share = f"\n{loss / log_n:.0%} of the loss of guessing, log N = {log_n:.2f}"
        yield f"loss, nats{share if log_n > 0 else ''}", f"{loss:.2f}"
    if math.isfinite(number(row, "validation_auc")):
        yield "AUC among the validation people", rounded(number(row, "validation_auc"))
    if math.isfinite(scale := number(row, "logit_scale")):
        yield "logit scale\ninverse temperature of the similarities", f"{scale:.2f}"
    if math.isfinite(rank := number(row, "effective_rank")):
        yield "effective rank\ndimensions that the embeddings make use of", f"{rank:.0f}"
    columns = row.get("columns")
    for tower, facts in (columns if isinstance(columns, Mapping) else {}).items():
        if isinstance(facts, Mapping) and number(facts, "given") > 0:
            yield _columns(str(tower), facts)


def _columns(tower: str, facts: Row) -> tuple[str, str]:
    kept = number(facts, "variance_kept")
    note = f"\nprincipal components with {kept:.0%} of their variance" if kept <= 1 else ""
    used = number(facts, "used")
    name = "DNA" if tower == "dna" else tower
    return (
        f"{name} columns used, of {number(facts, 'given'):,.0f}{note}",
        f"{used:,.0f}" if math.isfinite(used) else "",
    )
