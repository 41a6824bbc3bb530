"""The report's section on probes: a forest a target, calibration, learning curves, all rows."""

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from brainfusion.eval.report import figures_probes
from brainfusion.eval.report.drawing import BLUE, GREY
from brainfusion.eval.report.forest import ForestRow, Mark, Scale, forest, key, scale_of
from brainfusion.eval.report.parts import figure, folded, missing, side_by_side, table
from brainfusion.eval.report.rows import (
    base_name,
    beyond_confounds,
    by_target,
    is_confounds,
    is_residualised,
    number,
    p_cell,
    rounded,
    with_interval,
)

Row = Mapping[str, Any]

METRIC_NAMES = {
    "r2": "R2",
    "auroc": "AUROC",
    "balanced_accuracy": "balanced accuracy",
    "r": "correlation",
    "accuracy": "accuracy",
    "mae": "mean absolute error",
    "auprc": "average precision",
    "log_loss": "log loss, nats",
    "brier": "Brier score",
}

_MAX_TARGETS = 12
"""Targets drawn at once; the others are folded away."""
_MAX_FIGURES = 4
"""Targets whose calibration and learning curves are drawn."""


def probes_section(results: Row) -> str:
    """A forest a target: what each representation predicts, with and without the confounds."""
    rows = [row for row in results.get("probes") or [] if math.isfinite(number(row, "value"))]
    if not rows:
        return missing("No probes were run.", "probe")
    targets = by_target(rows)
    scales = _scales(targets)
    panels = [_panel(target, group, scales[_metric(group)]) for target, group in targets.items()]
    first, rest = panels[:_MAX_TARGETS], panels[_MAX_TARGETS:]
    text = f'<p class="note">{escape(_explained(targets))}</p>\n{_key(rows)}{side_by_side(first)}'
    text += folded(f"{len(rest)} more targets", side_by_side(rest), css="printed") * bool(rest)
    text += _calibration(targets) + _learning(targets)
    text += _comparisons(targets)
    text += folded(f"All {len(rows)} rows", _probe_table(rows), css="printed")
    several = [row for row in rows if len(row.get("metrics") or []) > 1]
    return text + folded("All metrics", _metric_table(several)) * bool(several)


def _metric(rows: Sequence[Row]) -> str:
    return str(rows[0].get("metric", ""))


def _metric_name(metric: str) -> str:
    return METRIC_NAMES.get(metric, metric.replace("_", " "))


def _explained(targets: Mapping[str, Sequence[Row]]) -> str:
    metrics = {_metric(rows) for rows in targets.values()}
    people = {number(row, "n") for rows in targets.values() for row in rows}
    n = f" on {min(people):,.0f} people" if len(people) == 1 and math.isfinite(min(people)) else ""
    text = f"Linear models on frozen features, cross-validated{n}. "
    if "r2" in metrics:
        text += "R2: share of the variance explained; 0 is guessing the training mean. "
    if "auroc" in metrics:
        text += "AUROC: chance that a case is ranked above a control; 0.5 is guessing. "
    if any(row.get("kind") == "multi-class" for rows in targets.values() for row in rows):
        text += "Of several classes it is the mean of each against the rest. "
    n_tests = sum(len(beyond_confounds(rows)) for rows in targets.values())
    text += (
        "Filled marks have to beat the confounds alone (dotted), hollow ones, with the confounds "
        f"taken out, chance (dashed). Intervals are 95%, not corrected for the {n_tests} "
        "comparisons."
    )
    ends = [(number(row, "ci_high"), number(row, "chance")) for r in targets.values() for row in r]
    if any(high < chance for high, chance in ends):
        text += (
            " An interval wholly below chance is no finding: cross-validation tends to put there "
            "what knows nothing."
        )
    return text


def _key(rows: Sequence[Row]) -> str:
    entries: list[tuple[Mark | str, str]] = [(Mark(value=0, colour=BLUE), "as they are")]
    if any(is_residualised(str(row["features"])) for row in rows):
        entries.append((Mark(value=0, colour=BLUE, hollow=True), "confounds taken out"))
    if any(is_confounds(str(row["features"])) for row in rows):
        entries.append((Mark(value=0, colour=GREY, shape="square"), "confounds alone"))
        entries.append(("other", "what the confounds alone predict"))
    return key([*entries, ("chance", "chance")])


def _scales(targets: Mapping[str, Sequence[Row]]) -> dict[str, Scale]:
    """One scale a metric, the same for all its targets."""
    by_metric: dict[str, list[Row]] = {}
    for rows in targets.values():
        by_metric.setdefault(_metric(rows), []).extend(rows)
    return {
        metric: scale_of(
            [number(row, name) for row in rows for name in ("value", "ci_low", "ci_high")],
            chance=number(rows[0], "chance"),
        )
        for metric, rows in by_metric.items()
    }


def _panel(target: str, rows: Sequence[Row], scale: Scale) -> str:
    alone = [number(row, "value") for row in rows if is_confounds(str(row["features"]))]
    floor = alone[0] if alone else math.nan
    scale = Scale(
        low=scale.low, high=scale.high, ticks=scale.ticks, chance=scale.chance, other=floor
    )
    beyond, lines = beyond_confounds(rows), {}
    for row in rows:
        lines.setdefault(base_name(str(row["features"])), []).append(row)
    order = sorted(lines, key=lambda name: not is_confounds(name))
    drawn = [
        ForestRow(
            name=name,
            marks=[_mark(row) for row in lines[name]],
            cells=[[with_interval(row, "value") for row in lines[name]]],
            note="beyond the confounds" if beyond.get(name) else "",
            stands_out=True,
        )
        for name in order
    ]
    metric = _metric_name(_metric(rows))
    return "<div>" + forest(drawn, scale, headings=["", "", metric], caption=target) + "</div>\n"


def _mark(row: Row) -> Mark:
    name = str(row["features"])
    return Mark(
        value=number(row, "value"),
        low=number(row, "ci_low"),
        high=number(row, "ci_high"),
        shape="square" if is_confounds(name) else "dot",
        colour=GREY if is_confounds(name) else BLUE,
        hollow=is_residualised(name),
    )


def _probe_table(rows: Sequence[Row]) -> str:
    body, last = [], None
    for row in rows:
        n, chance, target = number(row, "n"), number(row, "chance"), str(row["target"])
        body.append(
            [
                "" if target == last else target,
                str(row["features"]),
                _metric_name(str(row.get("metric", ""))),
                with_interval(row, "value"),
                rounded(chance) if math.isfinite(chance) else "",
                p_cell(number(row, "p_value")),
                p_cell(number(row, "q_value")),
                f"{n:,.0f}" if math.isfinite(n) else "",
            ]
        )
        last = target
    heading = [
        "target",
        "predicted from",
        "metric",
        "value",
        "chance",
        "p",
        "p, adjusted",
        "people",
    ]
    return table(heading, body, text_columns=(1, 2))


def _comparisons(targets: Mapping[str, Sequence[Row]]) -> str:
    """Differences of two representations, tested on the same people; those that are clear first."""
    body, n_clear = [], 0
    for target, rows in targets.items():
        for row in rows:
            for other in row.get("comparisons") or []:
                clear = number(other, "q_value") < 0.05
                n_clear += clear
                difference = {**other, "value": other.get("difference")}
                line = [
                    f"{row['features']}\nless {other['against']}",
                    target,
                    _metric_name(str(row.get("metric", ""))),
                    with_interval(difference, "value"),
                    p_cell(number(other, "p_value")),
                    p_cell(number(other, "q_value")),
                ]
                body.append((not clear, number(other, "p_value", 1.0), line))
    if not body:
        return ""
    heading = ["first less second", "target", "metric", "difference", "p", "p, adjusted"]
    lines = [line for *_, line in sorted(body, key=lambda one: one[:2])]
    what = f"{n_clear} of {len(body)} differences between representations are clear (FDR 5%)"
    return folded(what, table(heading, lines, text_columns=(1, 2)), css="printed")


def _metric_table(rows: Sequence[Row]) -> str:
    body, last = [], None
    for row in rows:
        about = (str(row["target"]), str(row["features"]))
        for metric in row["metrics"]:
            chance = number(metric, "chance")
            body.append(
                [
                    *(("", "") if about == last else about),
                    _metric_name(str(metric["metric"])),
                    with_interval(metric, "value"),
                    rounded(chance) if math.isfinite(chance) else "",
                    p_cell(number(metric, "p_value")),
                ]
            )
            last = about
    heading = ["target", "predicted from", "metric", "value", "chance", "p"]
    return table(heading, body, text_columns=(1, 2))


# -- figures --------------------------------------------------------------------------------------


def _calibration(targets: Mapping[str, Sequence[Row]]) -> str:
    """Of each target with classes, the best representation that is no confound."""
    drawn = []
    for i, (target, rows) in enumerate(targets.items()):
        able = [
            row
            for row in rows
            if len(row.get("reliability") or []) > 1 and not is_confounds(str(row["features"]))
        ]
        if not able:
            continue
        best = max(able, key=lambda row: number(row, "value"))
        svg = figures_probes.calibration(
            best["reliability"], name=f"calibration-{i}", target=target
        )
        sure = "of the likeliest class " if best.get("kind") == "multi-class" else ""
        words = [f"{escape(target)}</b> from {escape(str(best['features']))}: probabilities {sure}"]
        words.append("against what was found, people in bins of equal size.")
        slope = [m for m in best.get("metrics") or [] if m["metric"] == "calibration_slope"]
        if slope and math.isfinite(number(slope[0], "value")):
            text = with_interval(slope[0], "value")
            words.append(f" Slope {text}; below 1 they are too extreme, above too timid.")
        drawn.append(figure(svg, "<b>" + "".join(words)))
    return _figures("Are the probabilities right?", drawn)


def _learning(targets: Mapping[str, Sequence[Row]]) -> str:
    drawn, order = [], _order(targets)
    shown = order[: figures_probes.MAX_LINES]
    for i, (target, rows) in enumerate(targets.items()):
        able = _with_curves(rows)
        curves = {str(row["features"]): row["learning_curve"] for row in able}
        if not any(name in curves for name in shown):
            continue
        svg = figures_probes.learning(
            curves,
            order=shown,
            name=f"learning-{i}",
            target=target,
            metric=_metric_name(_metric(rows)),
            chance=number(able[0], "chance"),
        )
        n_hidden = len(curves.keys() - set(shown))
        more = f" {n_hidden} more, lower over all targets, not drawn." if n_hidden else ""
        drawn.append(
            figure(
                svg,
                f"<b>{escape(target)}</b> by the number of people to learn from; everyone is "
                f"predicted at each size. Lines are 95% intervals.{more}",
            )
        )
    return _figures("Would more people help?", drawn)


def _with_curves(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if len(row.get("learning_curve") or []) > 1]


def _order(targets: Mapping[str, Sequence[Row]]) -> list[str]:
    """The features that have curves, those first that do best over the targets (mean place)."""
    places: dict[str, list[float]] = {}
    for rows in targets.values():
        able = sorted(_with_curves(rows), key=lambda row: -number(row, "value"))
        for place, row in enumerate(able):
            places.setdefault(str(row["features"]), []).append(place / len(able))
    return sorted(places, key=lambda name: sum(places[name]) / len(places[name]))


def _figures(heading: str, drawn: Sequence[str]) -> str:
    if not drawn:
        return ""
    first, rest = drawn[:_MAX_FIGURES], drawn[_MAX_FIGURES:]
    more = folded(f"{len(rest)} more targets", side_by_side(rest)) if rest else ""
    return f"<h3>{escape(heading)}</h3>\n{side_by_side(first)}{more}"
