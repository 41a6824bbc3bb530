"""The report's tables: the cohort's facts and flow, the stages, configuration and provenance."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

from brainfusion.eval.verdict import number

Row = Mapping[str, Any]

_MAX_ITEMS = 12
"""Longer lists in a configuration are counted, not printed."""


def table(
    headings: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    caption: str = "",
    text_columns: Sequence[int] = (),
) -> str:
    """An HTML table that scrolls sideways where it does not fit; empty columns are left out.

    Args:
        headings: One a column.
        rows: Plain text cells, escaped here.
        caption: Above the table.
        text_columns: Columns set to the left, as the first is.
    """
    if not rows:
        return ""
    kept = [i for i in range(len(headings)) if any(row[i] for row in rows)]
    css = [' class="text"' if i in text_columns else "" for i in range(len(headings))]
    head = "".join(f"<th{css[i]}>{escape(headings[i])}</th>" for i in kept)
    body = "".join(
        "<tr>" + "".join(f"<td{css[i]}>{_cell(row[i])}</td>" for i in kept) + "</tr>\n"
        for row in rows
    )
    top = f"<caption>{escape(caption)}</caption>" if caption else ""
    return (
        f'<div class="scroll"><table>{top}<thead><tr>{head}</tr></thead>\n'
        f"<tbody>{body}</tbody></table></div>\n"
    )


def cohort_section(cohort: Row) -> str:
    """Who the people are, how many were left at each step, and how they were split."""
    if not cohort:
        return '<p class="missing">No facts about the cohort in the results.</p>'
    splits = {k: v for k, v in (cohort.get("splits") or {}).items() if isinstance(v, int)}
    counts = (
        _counts(splits, "split")
        + _counts(cohort.get("sites"), "site")
        + _counts(cohort.get("sex"), "sex")
    )
    facts = table(["fact", ""], _facts(cohort))
    flow = cohort.get("flow") or []
    first = max((number(step, "n", 0.0) for step in flow), default=0.0)
    lines = [(str(step["step"]), number(step, "n"), first) for step in flow]
    text = f'<div class="columns"><div>{facts}</div><div>{counts}</div></div>\n'
    if lines:
        text += _bars(lines, ("who is left, step by step", "people"))
    if digest := (cohort.get("splits") or {}).get("hash"):
        code = f"<code>{escape(str(digest))}</code>"
        text += f'<p class="note">Splits {code}: families stay together.</p>'
    if cohort.get("notes"):
        text += f'<p class="note">{escape(str(cohort["notes"]))}</p>'
    return text


def stages_section(stages: Sequence[Row]) -> str:
    """Time and memory of each stage."""
    if not stages:
        return (
            '<p class="missing">No stages were timed. <code>brainfusion demo</code> times them.</p>'
        )
    longest = max(number(stage, "seconds", 0.0) for stage in stages)
    has_memory = any(math.isfinite(number(stage, "peak_mib")) for stage in stages)
    rows = []
    for stage in stages:
        seconds, memory = number(stage, "seconds"), number(stage, "peak_mib")
        share = seconds / longest * 100 if longest > 0 and seconds > 0 else 0.0
        rows.append(
            f"<tr><td>{escape(str(stage['name']))}</td>"
            f'<td class="barcell"><span class="bar" style="width:{share:.1f}%"></span></td>'
            f"<td>{seconds_text(seconds)}</td>"
            + (f"<td>{memory:,.0f}</td>" if math.isfinite(memory) else "<td></td>" * has_memory)
            + f'<td class="text">{"made before" if stage.get("cached") else ""}</td></tr>\n'
        )
    total = sum(number(stage, "seconds", 0.0) for stage in stages)
    memory_head = "<th>peak memory, MiB</th>" if has_memory else ""
    return (
        '<div class="scroll"><table><thead><tr><th>stage</th><th></th><th>time</th>'
        f'{memory_head}<th class="text"></th></tr></thead><tbody>{"".join(rows)}</tbody></table>'
        f'</div>\n<p class="note">{seconds_text(total)} in all.</p>\n'
    )


def provenance_section(results: Row) -> str:
    """Everything that went in, folded away: configuration, versions, the alignment's facts."""
    run = {key: results[key] for key in ("package_version", "created", "format") if key in results}
    blocks = {
        "Run": run,
        "Configuration": results.get("config") or {},
        "Pretraining": results.get("pretraining") or {},
        "Alignment": results.get("alignment") or {},
        "Truth of the simulation": results.get("truth") or {},
    }
    parts = [
        f"<details><summary>{name}</summary>{table(['key', 'value'], list(flat(values)))}"
        for name, values in blocks.items()
        if values
    ]
    return "".join(f"{part}</details>\n" for part in parts)


def flat(values: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested values as (dotted key, text); long lists become their length."""
    if isinstance(values, Mapping):
        for key, value in values.items():
            yield from flat(value, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(values, (list, tuple)):
        if len(values) > _MAX_ITEMS:
            yield prefix, f"[{len(values)} values]"
        elif any(isinstance(value, (Mapping, list, tuple)) for value in values):
            for i, value in enumerate(values):
                yield from flat(value, f"{prefix}.{i}")
        else:
            yield prefix, ", ".join(_text(value) for value in values) or "none"
    else:
        yield prefix, _text(values)


def seconds_text(seconds: float) -> str:
    """A time in words.

    >>> seconds_text(0.44), seconds_text(12.3), seconds_text(185.0)
    ('0.4 s', '12 s', '3 min 05 s')
    """
    if math.isnan(seconds):
        return ""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    if seconds < 119.5:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s"


def _cell(text: str) -> str:
    """Escaped, with an interval kept on one line."""
    return re.sub(r"(\[[-\d.]+), ([-\d.]+\])", r"\1,&nbsp;\2", escape(text))


def _text(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _facts(cohort: Row) -> list[tuple[str, str]]:
    words = {
        "origin": "origin",
        "n_people": "people",
        "n_people_without_recordings": "people without a recording",
        "n_families": "families",
        "n_recordings": "recordings",
        "atlas": "atlas",
        "n_parcels": "parcels",
        "n_trs": "TRs a recording",
        "tr_s": "TR, s",
        "age": "age, years",
        "motion": "mean framewise displacement, mm",
        "coverage": "share of parcels with data",
        "hash": "hash of the tables",
    }
    families = cohort.get("families")
    if isinstance(families, Mapping):
        cohort = {**families, **cohort}
        words["n_with_relatives"] = "people with relatives in the cohort"
    return [
        (text, _spread(cohort[key]))
        for key, text in words.items()
        if cohort.get(key) is not None and cohort[key] != []
    ]


def _spread(value: Any) -> str:
    """A number, a list's range, or a summary such as mean and standard deviation."""
    if isinstance(value, Mapping):
        if {"mean", "sd"} <= value.keys() and math.isfinite(number(value, "mean")):
            return f"{number(value, 'mean'):.3g} (sd {number(value, 'sd'):.2g})"
        return ", ".join(f"{key} {_spread(item)}" for key, item in value.items())
    if isinstance(value, (list, tuple)):
        items = list(dict.fromkeys(_spread(item) for item in value))
        return " to ".join([items[0], items[-1]] if len(items) > 1 else items)
    if isinstance(value, bool) or value is None or isinstance(value, str):
        return _text(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _counts(counts: Any, what: str) -> str:
    if not isinstance(counts, Mapping) or not counts:
        return ""
    most = max(float(n) for n in counts.values())
    return _bars([(str(name), float(n), most) for name, n in counts.items()], (what, "people"))


def _bars(lines: Sequence[tuple[str, float, float]], headings: tuple[str, str]) -> str:
    rows = "".join(
        f'<tr><td>{escape(name)}</td><td class="barcell"><span class="bar" '
        f'style="width:{value / whole * 100 if whole else 0:.1f}%"></span></td>'
        f"<td>{value:,.0f}</td></tr>\n"
        for name, value, whole in lines
    )
    return (
        f'<div class="scroll"><table><thead><tr><th>{headings[0]}</th><th></th>'
        f"<th>{headings[1]}</th></tr></thead><tbody>{rows}</tbody></table></div>\n"
    )
