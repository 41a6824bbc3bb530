"""The page of alignments side by side."""

import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from brainfusion.eval.report.compare import AlignmentRun
from brainfusion.eval.report.drawing import DIRECTION_COLOURS
from brainfusion.eval.report.findings import comparison, comparison_table, findings
from brainfusion.eval.report.forest import (
    ForestRow,
    Mark,
    Scale,
    ceiling_marks,
    forest,
    key,
    scale_of,
    symbols,
)
from brainfusion.eval.report.parts import document, folded, table
from brainfusion.eval.report.rows import (
    DIRECTION_NAMES,
    DIRECTIONS,
    attainable,
    direction_of,
    method_name,
    number,
    p_cell,
    rounded,
    with_interval,
)
from brainfusion.eval.report.tables import flat
from brainfusion.runtime.files import atomic_file, write_json, write_text

Row = Mapping[str, Any]

_SHAPES = {"brain_to_dna": "dot", "dna_to_brain": "triangle"}
_RECALL = (1, 5, 10)
_SHOWN_SETTINGS = 12
"""More settings that differ are folded away."""


def write_comparison(
    out: Path, runs: Sequence[AlignmentRun], compared: Sequence[Row]
) -> tuple[Path, Path, Path]:
    """Write the page and, beside it, its numbers.

    Args:
        out: The page.
        runs: Two or more.
        compared: Of `compare_runs`.

    Returns:
        The page, the numbers as JSON, and as a table of one row a metric.
    """
    numbers, rows = out.with_suffix(".json"), out.with_suffix(".parquet")
    found = comparison(runs, compared)
    write_json(numbers, found)
    with atomic_file(rows) as aside:
        comparison_table(found).write_parquet(aside)
    write_text(out, comparison_page(runs, compared))
    return out, numbers, rows


def comparison_page(runs: Sequence[AlignmentRun], compared: Sequence[Row]) -> str:
    """The whole page as text; no ids of people."""
    sentences = list(findings(runs, compared))
    rest = "".join(f"<li>{_sentence(text)}</li>" for text in sentences[1:])
    header = (
        f"{symbols()}\n<h1>{len(runs)} alignments side by side</h1>\n"
        f'<div class="verdict"><p class="lead">{_sentence(sentences[0])}</p>'
        f"{f'<ul>{rest}</ul>' if rest else ''}</div>"
    )
    parts = [
        ("auc", "Retrieval", _forest(runs) + _retrieval_table(runs)),
        ("differences", "Differences, paired by person", _differences(compared)),
        ("runs", "The runs", _runs_table(runs) + _settings(runs)),
    ]
    footer = (
        "AUC: the chance that a person's own partner is ranked above somebody else's, 0.5 when "
        "guessing, whatever the size of the gallery. Intervals are 95%, by a bootstrap of "
        "families. All numbers are in the .json and .parquet files beside this page."
    )
    return document("brainfusion: alignments side by side", header, parts, footer)


def _sentence(text: str) -> str:
    safe = escape(text)
    return f'<span class="alarm">{safe}</span>' if text.startswith("CONTROL FAILED") else safe


def _forest(runs: Sequence[AlignmentRun]) -> str:
    lines = [(run, [run.retrieval[direction] for direction in DIRECTIONS]) for run in runs]
    ends = [
        end
        for _, rows in lines
        for row in rows
        for end in (
            *(number(row, name) for name in ("auc", "ci_low", "ci_high", "attainable_from_bold")),
            attainable(row),
        )
    ]
    scale = scale_of([0.4, *(end for end in ends if math.isfinite(end))], chance=0.5)
    rows = [
        ForestRow(
            name=run.name,
            note=method_name(run.summary),
            marks=[
                Mark(
                    value=row["auc"],
                    low=number(row, "ci_low"),
                    high=number(row, "ci_high"),
                    shape=_SHAPES[direction],
                    colour=DIRECTION_COLOURS[direction],
                )
                for direction, row in zip(DIRECTIONS, both, strict=True)
            ],
            cells=[
                [with_interval(row, digits=3) for row in both],
                [p_cell(number(row, "p_value")) for row in both],
                [f"{row['n_gallery']:,}" for row in both[:1]],
            ],
            across=ceiling_marks(attainable(both[0]), number(both[0], "attainable_from_bold")),
        )
        for run, both in lines
    ]
    drawn = forest(rows, scale, headings=["", "", "AUC", "p", "gallery"])
    entries = _direction_entries()
    tops = [ceiling_marks(1.0, 1.0)[i] for i in (1, 0)]
    known = [any(math.isfinite(attainable(both[0])) for _, both in lines)]
    known += [any(math.isfinite(number(both[0], "attainable_from_bold")) for _, both in lines)]
    texts = ("attainable by a perfect model", "attainable from these recordings")
    entries += [(top, text) for top, text, has in zip(tops, texts, known, strict=True) if has]
    return f"<div>{drawn}</div>\n{key([*entries, ('chance', 'chance')])}"


def _direction_entries() -> list[tuple[Mark | str, str]]:
    return [
        (Mark(value=0, shape=_SHAPES[name], colour=DIRECTION_COLOURS[name]), DIRECTION_NAMES[name])
        for name in DIRECTIONS
    ]


def _retrieval_table(runs: Sequence[AlignmentRun]) -> str:
    headings = ["Run", "Direction", *(f"R@{k}" for k in _RECALL), "Median rank", "Control AUC"]
    body = []
    for run in runs:
        control = number(run.retrieval.get("shuffled_control") or {}, "auc")
        checked = rounded(control) if control == control else "none was run"
        for i, direction in enumerate(DIRECTIONS):
            row = run.retrieval[direction]
            recall = [
                f"{rounded(number(row, f'recall_at_{k}'), 3)}\nchance "
                f"{rounded(number(row, f'recall_at_{k}_chance'), 3)}"
                for k in _RECALL
            ]
            rank = f"{row['median_rank']:g} of {row['n_gallery']:,}"
            about = ["" if i else run.name, DIRECTION_NAMES[direction]]
            body.append([*about, *recall, rank, "" if i else checked])
    return table(headings, body, text_columns=(1,))


def _differences(compared: Sequence[Row]) -> str:
    if not compared:
        return '<p class="missing">These runs have too few test people in common.</p>\n'
    headings = ["First", "Second", "Direction", "Metric", "First less second", "p", "p (FDR)"]
    body, last = [], None
    for row in compared:
        about = (row["first"], row["second"])
        body.append(
            [
                *(("", "") if about == last else about),
                DIRECTION_NAMES[str(direction_of(row))],
                row["metric"].replace("recall_at_", "R@").replace("auc", "AUC"),
                f"{row['difference']:+.3f} [{row['ci_low']:+.3f}, {row['ci_high']:+.3f}]",
                p_cell(row["p_value"]),
                p_cell(row["q_value"]),
            ]
        )
        last = about
    n = compared[0]["n_queries"]
    text = (
        f"<p>On the {n:,} test people that all runs have. Two-sided permutation tests in which a "
        "family's people change sides together; p adjusted over all pairs of runs.</p>\n"
    )
    rows = table(headings, body, text_columns=(1, 2, 3))
    return text + _difference_forest(compared) + folded("All differences", rows)


def _difference_forest(compared: Sequence[Row]) -> str:
    """AUC of the first less that of the second, both directions of each pair of runs."""
    pairs: dict[tuple[str, str], list[Row]] = {}
    for row in compared:
        if row["metric"] == "auc":
            pairs.setdefault((row["first"], row["second"]), []).append(row)
    ends = [number(row, end) for rows in pairs.values() for row in rows for end in _ENDS]
    whole: Scale = scale_of(ends, chance=0.0)
    drawn = [
        ForestRow(
            name=f"{first} less {second}",
            marks=[
                Mark(
                    value=row["difference"],
                    low=number(row, "ci_low"),
                    high=number(row, "ci_high"),
                    shape=_SHAPES[str(direction_of(row))],
                    colour=DIRECTION_COLOURS[str(direction_of(row))],
                )
                for row in rows
            ],
            cells=[
                [_signed(row) for row in rows],
                [p_cell(row["q_value"]) for row in rows],
            ],
        )
        for (first, second), rows in pairs.items()
    ]
    headings = ["", "", "AUC, difference", "p (FDR)"]
    entries = [*_direction_entries(), ("chance", "no difference")]
    return f"<div>{forest(drawn, whole, headings=headings)}</div>\n{key(entries)}"


_ENDS = ("difference", "ci_low", "ci_high")


def _signed(row: Row) -> str:
    return f"{row['difference']:+.3f} [{row['ci_low']:+.3f}, {row['ci_high']:+.3f}]"


def _runs_table(runs: Sequence[AlignmentRun]) -> str:
    """A column a run: what it was made of, and where its training ended."""
    keys = {
        "n_train": "training people",
        "n_test": "test people",
        "best_step": "step that was kept",
        "validation_auc": "AUC among validation people",
        "loss": "loss, nats",
        "logit_scale": "logit scale",
        "effective_rank": "effective rank",
        "n_processes": "processes",
    }
    metas = [run.summary.get("meta") or {} for run in runs]
    body = [
        ["method", *(method_name(run.summary) for run in runs)],
        ["brain", *(str(meta.get("brain") or "").replace(",", ", ") for meta in metas)],
        ["DNA", *(str(meta.get("dna") or "").replace(",", ", ") for meta in metas)],
        *([text, *(_cell(run.summary.get(name)) for run in runs)] for name, text in keys.items()),
        ["residualised on", *(_residualised(run) for run in runs)],
    ]
    body = [line for line in body if any(line[1:])]
    return table(["", *(run.name for run in runs)], body, css="runs")


def _residualised(run: AlignmentRun) -> str:
    return ", ".join(run.summary.get("residualised_on") or []) or "nothing"


def _settings(runs: Sequence[AlignmentRun]) -> str:
    """The settings in which the runs differ."""
    known = [dict(flat(run.config)) for run in runs]
    names = list(dict.fromkeys(name for settings in known for name in settings))
    body = [
        [name, *(settings.get(name, "not a setting") for settings in known)]
        for name in names
        if len({settings.get(name) for settings in known}) > 1
    ]
    if not body:
        return '<p class="note">Their settings are the same.</p>\n'
    rows = table(["setting", *(run.name for run in runs)], body, css="runs")
    text = f"{len(body)} settings differ" if len(body) > 1 else "One setting differs"
    if len(body) > _SHOWN_SETTINGS:
        return folded(text, rows, css="printed")
    return f"<h3>{text}</h3>\n{rows}"


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.3g}" if isinstance(value, float) else str(value)
