"""The report's sections on the finding: retrieval, its control, and the shared space.

Each takes the whole results and returns HTML; a part that is missing becomes one line that names
the command which makes it.
"""

import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from brainfusion.eval.report import figures
from brainfusion.eval.report.drawing import CEILING, DIRECTION_COLOURS, INK
from brainfusion.eval.report.forest import ForestRow, Mark, ceiling_marks, forest, key, scale_of
from brainfusion.eval.report.parts import figure, missing, side_by_side, similarity_arrays, table
from brainfusion.eval.report.rows import (
    CONTROL_LIMIT,
    DIRECTION_NAMES,
    DIRECTIONS,
    attainable,
    bar_ends,
    by_name,
    control_distance,
    control_failed,
    direction_of,
    gallery_text,
    is_tied,
    number,
    p_cell,
    p_text,
    rounded,
    with_interval,
)

Row = Mapping[str, Any]

_SHAPES = {"brain_to_dna": "dot", "dna_to_brain": "triangle"}


def retrieval_section(results: Row, workspace: Path) -> str:
    """AUC beside simpler methods, ranks and recall, with chance and, where known, the ceiling."""
    retrieval = _with_ceilings(results)
    rows = {name: retrieval[name] for name in DIRECTIONS if retrieval.get(name)}
    if not rows:
        return missing("No retrieval was run.", "retrieve")
    arrays = similarity_arrays(results, workspace)
    ranks = {name: arrays[f"ranks_{name}"] for name in rows if f"ranks_{name}" in arrays}
    drawn = []
    if ranks:
        drawn.append(
            figure(
                figures.rank_curves(ranks),
                "How much of the gallery must be looked through to find the partner. The area "
                "under a curve is its AUC; bands are pointwise 95% intervals.",
            )
        )
    ks = _recall_ks(rows)
    if ks:
        known = any(math.isfinite(attainable(rows[name], f"recall_at_{ks[0]}")) for name in rows)
        drawn.append(
            figure(
                figures.recall_bars(retrieval, ks),
                f"Recall in {escape(gallery_text(next(iter(rows.values()))))}. Black marks are "
                + f"chance{', green marks what is attainable' * known}. Bars are 95% intervals, "
                + "people taken as independent.",
            )
        )
    return _auc_forest(retrieval) + side_by_side(drawn) + _retrieval_table(rows, ks)


# -- the AUC of everything ---------------------------------------------------------------------


def _auc_forest(retrieval: Row) -> str:
    groups = _auc_groups(retrieval)
    every = [row for _, named in groups for rows in named.values() for row in rows]
    ends = [number(row, "auc") for row in every] + [e for row in every for e in bar_ends(row)]
    scale = scale_of([0.4, *ends], chance=0.5, high=max(1.0, *(e for e in ends if e == e)))
    rows = []
    for heading, named in groups:
        rows.append(ForestRow(name=heading))
        rows += [_forest_row(name, lines) for name, lines in named.items()]
    headings = ["", "", "AUC", "p", "gallery"]
    return (
        "<div>" + forest(rows, scale, headings=headings) + "</div>\n" + _auc_key(every, retrieval)
    )


def _auc_groups(retrieval: Row) -> list[tuple[str, dict[str, list[Row]]]]:
    """(heading, name -> rows) of everything that has an AUC."""
    ours = [{**retrieval[d], "direction": d} for d in DIRECTIONS if retrieval.get(d)]
    control = retrieval.get("shuffled_control")
    shuffled = {"pairs shuffled": _control_rows(control)} if control else {}
    groups = [
        ("the aligner", {"this run": ours}),
        ("simpler methods on the same people", by_name(retrieval.get("baselines") or [])),
        ("the aligner's control", shuffled),
        ("within strata: only people alike compete", by_name(retrieval.get("strata") or [])),
    ]
    return [(heading, rows) for heading, rows in groups if rows]


def _control_rows(control: Row) -> list[Row]:
    """The control in each direction, if it says so, judged by its standard error."""
    spread = {"ci_low": None, "ci_high": None, "standard_error": control.get("standard_error")}
    both: list[Row] = [
        {**control[name], **spread, "direction": name} for name in DIRECTIONS if control.get(name)
    ]
    return both or [{**control, **spread}]


def _forest_row(name: str, rows: Sequence[Row]) -> ForestRow:
    marks, values = [], []
    for row in rows:
        direction, (low, high) = direction_of(row), bar_ends(row)
        marks.append(
            Mark(
                value=row["auc"],
                low=low,
                high=high,
                shape=_SHAPES[direction] if direction else "square",
                colour=DIRECTION_COLOURS[direction] if direction else INK,
            )
        )
        error = number(row, "standard_error")
        by_error = math.isnan(number(row, "ci_low")) and error > 0
        values.append(
            f"{rounded(row['auc'])}, s.e. {error:.2f}" if by_error else with_interval(row)
        )
    size = {number(row, "n_gallery", number(row, "n_queries")) for row in rows}
    sizes = [f"{n:,.0f}" if math.isfinite(n) else "" for n in size]
    p_values = [p_cell(number(row, "p_value")) for row in rows]
    top = rows[0]
    return ForestRow(
        name=name,
        marks=marks,
        cells=[values, p_values, sizes[:1]],
        across=ceiling_marks(attainable(top), number(top, "attainable_from_bold")),
        note="all scores are tied: it tells nobody apart" if all(map(is_tied, rows)) else "",
    )


def _auc_key(rows: Sequence[Row], retrieval: Row) -> str:
    entries: list[tuple[Mark | str, str]] = [
        (Mark(value=0, shape=_SHAPES[name], colour=DIRECTION_COLOURS[name]), DIRECTION_NAMES[name])
        for name in DIRECTIONS
        if any(direction_of(row) == name for row in rows)
    ]
    if any(direction_of(row) is None for row in rows):
        entries.append((Mark(value=0, shape="square"), "both directions together"))
    entries.append(("chance", "chance"))
    known = {name: any(math.isfinite(number(r, name)) for r in rows) for name in _CEILING_NAMES}
    for name, (text, mark) in _CEILING_NAMES.items():
        entries += [(mark, text)] if known[name] else []
    caption = "Bars are 95% intervals; a mark without one has none in the results."
    if retrieval.get("shuffled_control"):
        caption += f" The control's bars are {CONTROL_LIMIT:.0f} standard errors to each side."
    if retrieval.get("strata"):
        caption += (
            " Within strata everyone competes only with people of the same site, sex and so on, in "
            "galleries of the size given (their mean): what differs between groups cannot help."
        )
    permutations = {number(row, "n_permutations") for row in rows}
    n = min(permutations) if len(permutations) == 1 else math.nan
    if math.isfinite(n):
        caption += f" p from {n:,.0f} permutations, so never below {1 / (1 + n):.2g}."
    return key(entries) + f'<p class="note">{escape(caption)}</p>\n'


_CEILING_NAMES = {
    "attainable": (
        "attainable: a perfect model of perfectly measured people",
        Mark(value=0, shape="diamond", colour=CEILING, hollow=True),
    ),
    "attainable_from_bold": (
        "attainable from these recordings",
        Mark(value=0, shape="bar", colour=CEILING),
    ),
}


# -- ranks and recall --------------------------------------------------------------------------


def _recall_ks(rows: Mapping[str, Row]) -> list[int]:
    keys = {name.removeprefix("recall_at_") for row in rows.values() for name in row}
    return sorted(int(name) for name in keys if name.isdigit())


def _with_ceilings(results: Row) -> dict[str, Any]:
    """The retrieval part, with the oracles' recall and rank where their gallery is of the size."""
    retrieval, truth = dict(results.get("retrieval") or {}), results.get("truth") or {}
    for name in DIRECTIONS:
        row = retrieval.get(name)
        if not row:
            continue
        known: dict[str, Any] = {}
        for oracle, suffix in (("oracle_g_z", "attainable"), ("oracle_g_bold", "from_bold")):
            line = truth.get(oracle) or {}
            if line.get("n_gallery") == row.get("n_gallery"):
                for metric in line:
                    if metric == "median_rank" or metric.startswith("recall_at_"):
                        known[f"{metric}_{suffix}"] = line[metric]
        retrieval[name] = {**known, **row}
    return retrieval


def _retrieval_table(rows: Mapping[str, Row], ks: Sequence[int]) -> str:
    metrics = [("AUC", "auc", 2, False), ("permutation p", "p_value", 4, False)]
    metrics += [(f"recall at {k}", f"recall_at_{k}", 1, True) for k in ks]
    metrics += [("median rank", "median_rank", 1, False), ("mean reciprocal rank", "mrr", 3, False)]
    body = []
    for text, name, digits, is_share in metrics:
        if not any(math.isfinite(number(row, name)) for row in rows.values()):
            continue
        first = next(iter(rows.values()))
        from_bold = "attainable_from_bold" if name == "auc" else f"{name}_from_bold"
        chance = number(first, "chance" if name == "auc" else f"{name}_chance")
        tops = [
            _value(value, digits, is_share=is_share)
            for value in (attainable(first, name), number(first, from_bold))
        ]
        body.append(
            [text]
            + [_metric_cell(row, name, digits, is_share=is_share) for row in rows.values()]
            + [_value(chance, digits, is_share=is_share)]
            + [f"{tops[0]} ({tops[1]})" if all(tops) else tops[0]]
        )
    names = [DIRECTION_NAMES[name] for name in rows]
    both = any("(" in line[-1] for line in body)
    headings = ["", *names, "chance", "attainable" + " (from these recordings)" * both]
    return table(headings, body, css="dense")


def _metric_cell(row: Row, name: str, digits: int, *, is_share: bool) -> str:
    if name == "auc":
        return with_interval(row)
    if name == "p_value":
        return p_cell(number(row, name))
    text = _value(number(row, name), digits, is_share=is_share)
    low, high = number(row, f"{name}_ci_low"), number(row, f"{name}_ci_high")
    if is_share:
        low, high = figures.recall_interval(row, int(name.rsplit("_", 1)[1]))
    if math.isnan(low + high):
        return text
    scale = 100 if is_share else 1
    return f"{text} [{low * scale:.{digits}f}, {high * scale:.{digits}f}]"


def _value(value: float, digits: int, *, is_share: bool) -> str:
    if math.isnan(value):
        return ""
    if is_share:
        return f"{value:.{digits}%}"
    return rounded(value, digits) if value < 1 else f"{value:,.{digits}f}"


# -- control and shared space ------------------------------------------------------------------


def control_section(results: Row) -> str:
    """The shuffled pairs, and what was regressed out."""
    control = (results.get("retrieval") or {}).get("shuffled_control")
    if not control:
        text = missing("No shuffled-pairs control was run.", "retrieve")
    else:
        distance, error = control_distance(control), number(control, "standard_error")
        failed = control_failed(results["retrieval"])
        text = (
            "<p>Everything once more with the pairs shuffled: every brain goes with somebody "
            "else's DNA. Whatever is found then is no alignment, so it has to be at chance.</p>"
            f"<p><b class='{'bad' if failed else ''}'>AUC {control['auc']:.3f}</b>"
        )
        if math.isfinite(error):
            text += (
                f", standard error {error:.3f}: {distance:.1f} standard errors from 0.5, "
                f"{'outside' if failed else 'within'} the limit of {CONTROL_LIMIT:.0f}."
            )
        ways = [
            f"{control[name]['auc']:.3f} from {DIRECTION_NAMES[name]} "
            f"({p_text(number(control[name], 'p_value'))})"
            for name in DIRECTIONS
            if control.get(name)
        ]
        text += f" It is {' and '.join(ways)}." if ways else ""
        text += "</p>"
    alignment = results.get("alignment") or {}
    controls = alignment.get("controls") or {}
    covariates = controls.get("residualised", alignment.get("residualised_on"))
    if covariates is not None:
        names = [name for name in covariates if isinstance(name, str)]
        text += (
            "<p class='note'>Regressed out of the features before the alignment: "
            + escape(", ".join(names) if names else "nothing, so the figures within strata")
            + (".</p>" if names else " matter.</p>")
        )
    return text


def space_section(results: Row, workspace: Path) -> str:
    """The map of the shared space and the similarities of pairs and non-pairs."""
    arrays = similarity_arrays(results, workspace)
    drawn = []
    if {"brain_2d", "dna_2d"} <= arrays.keys():
        drawn.append(
            figure(
                figures.shared_space(arrays["brain_2d"], arrays["dna_2d"]),
                "Test people in the plane of the first two principal axes of the shared space. "
                "Short lines mean that a person's brain and DNA lie together. Two axes of many: "
                "pairs that look apart here may be close in the whole space.",
            )
        )
    if {"pairs", "non_pairs"} <= arrays.keys():
        pairs, others = arrays["pairs"], arrays["non_pairs"]
        spread = math.sqrt((float(pairs.var()) + float(others.var())) / 2)
        gap = (float(pairs.mean()) - float(others.mean())) / spread if spread else math.nan
        row = (results.get("retrieval") or {}).get("brain_to_dna") or {}
        is_ratio = row.get("score") == "density ratio"
        score = "log density ratio (nats)" if is_ratio else "cosine in the shared space"
        drawn.append(
            figure(
                figures.similarity(pairs, others, score=score),
                "Scores of a person's brain with their own DNA and with other people's. The means "
                f"are {gap:.2f} standard deviations apart.",
            )
        )
    if not drawn:
        return missing("No map of the shared space.", "retrieve")
    return side_by_side(drawn)
