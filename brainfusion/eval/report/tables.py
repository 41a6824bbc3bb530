"""The report's tables: the cohort's facts and flow, the stages, configuration and provenance."""

import math
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

from brainfusion.eval.report.parts import (
    bar_cell,
    bars,
    folded,
    missing,
    seconds_text,
    side_by_side,
    table,
)
from brainfusion.eval.report.rows import number

Row = Mapping[str, Any]

_MAX_ITEMS = 12
"""Longer lists in a configuration are counted, not printed."""

_MAX_BARS = 15
"""Smaller sites than the largest so many are summed up in one line."""


def cohort_section(cohort: Row) -> str:
    """Who the people are, how many have both brain and DNA, and how they were split."""
    if not cohort:
        return missing("No facts about the cohort in the results.")
    splits = {k: v for k, v in (cohort.get("splits") or {}).items() if isinstance(v, int)}
    counts = (
        _imported(cohort.get("import") or {})
        + _flow(cohort)
        + _counts(splits, "split")
        + _counts(cohort.get("sites"), "site")
        + _counts(cohort.get("sex"), "sex")
    )
    facts = table(["fact", ""], _facts(cohort))
    text = side_by_side([f"<div>{facts}</div>", f"<div>{counts}</div>"])
    if digest := (cohort.get("splits") or {}).get("hash"):
        code = f"<code>{escape(str(digest))}</code>"
        text += f'<p class="note">Splits {code}: families stay together.</p>'
    if cohort.get("notes"):
        text += f'<p class="note">{escape(str(cohort["notes"]))}</p>'
    return text


_IMPORTED = {
    "n_files": "read",
    "n_skipped_coverage": "left out: too few parcels with data",
    "n_dropped_recordings": "left out: their person is in no table",
    "n_recordings": "kept",
}
"""Counts of an import, in the order of its steps."""


def _imported(counts: Row) -> str:
    """Recordings read, left out and why, kept, as bars; steps that left nothing out are not."""
    steps = [(key, text, number(counts, key)) for key, text in _IMPORTED.items()]
    steps = [step for step in steps if step[2] > 0]
    if not steps:
        return ""
    whole = max(n for *_, n in steps)
    text = bars([(name, n, whole) for _, name, n in steps], ("imported recordings", "recordings"))
    if others := int(number(counts, "n_other_files", 0.0)):
        text += (
            f'<p class="note">{others:,} other files of this kind were left out: no time series, '
            "or other entities.</p>"
        )
    return text


def _flow(cohort: Row) -> str:
    """The cohort and its parts as bars; people unknown to the cohort are no part of it."""
    flow = [(str(step["step"]), number(step, "n")) for step in cohort.get("flow") or []]
    strangers = [n for name, n in flow if "not in the cohort" in name]
    parts = [(name, n) for name, n in flow if "not in the cohort" not in name]
    whole = max((n for _, n in parts), default=0.0)
    text = bars([(name, n, whole) for name, n in parts], ("who has what", "people")) * bool(parts)
    if strangers:
        n = sum(strangers)
        left = f"{n:,.0f} {'person' if n == 1 else 'people'} of the tables of brain features and "
        text += '<p class="note">' + (
            f"{left}DNA are not in the cohort and were left out.</p>"
            if n
            else "Nobody in the tables of brain features and DNA is unknown to the cohort.</p>"
        )
    return text


def _counts(counts: Any, what: str) -> str:
    if not isinstance(counts, Mapping) or not counts:
        return ""
    lines = [(str(name), float(n)) for name, n in counts.items()]
    if len(lines) > _MAX_BARS:
        lines.sort(key=lambda line: -line[1])
        rest = lines[_MAX_BARS - 1 :]
        lines = lines[: _MAX_BARS - 1]
        lines.append((f"{len(rest)} others", sum(n for _, n in rest)))
    most = max(n for _, n in lines)
    return bars([(name, n, most) for name, n in lines], (what, "people"))


def stages_section(stages: Sequence[Row]) -> str:
    """Time and memory of each stage."""
    if not stages:
        return missing("No stages were timed.", "demo")
    longest = max(number(stage, "seconds", 0.0) for stage in stages)
    has_memory = any(math.isfinite(number(stage, "peak_mib")) for stage in stages)
    old = any(stage.get("cached") for stage in stages)
    rows = []
    for stage in stages:
        seconds, memory = number(stage, "seconds"), number(stage, "peak_mib")
        share = seconds / longest if longest > 0 and seconds > 0 else 0.0
        rows.append(
            f"<tr><td>{escape(str(stage['name']))}</td>{bar_cell(share)}"
            f"<td>{seconds_text(seconds)}</td>"
            + (f"<td>{memory:,.0f}</td>" if math.isfinite(memory) else "<td></td>" * has_memory)
            + ('<td class="text">made before</td>' if stage.get("cached") else "<td></td>" * old)
            + "</tr>\n"
        )
    total = sum(number(stage, "seconds", 0.0) for stage in stages)
    memory_head = "<th>peak memory, MiB</th>" if has_memory else ""
    return (
        '<div class="scroll"><table><thead><tr><th>stage</th><th></th><th>time</th>'
        f"{memory_head}{'<th></th>' * old}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
        f'</div>\n<p class="note">{seconds_text(total)} added up; stages may run side by side.'
        "</p>\n"
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
    return "".join(
        folded(name, table(["key", "value"], list(flat(values)), css="keys"))
        for name, values in blocks.items()
        if values
    )


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
        "n_trs": "TRs a recording",
        "tr_s": "TR, s",
        "atlas": "atlas",
        "n_parcels": "parcels",
        "coverage": "share of parcels with data",
        "age": "age, years: mean (sd)",
        "motion": "mean framewise displacement, mm: mean (sd)",
        "hash": "hash of the tables",
    }
    families = cohort.get("families")
    if isinstance(families, Mapping):
        if related := int(number(families, "n_with_relatives", 0.0)):
            largest = int(number(families, "largest", 2.0))
            words["n_families"] += (
                f"\n{related:,} people have a relative in the cohort; at most {largest} a family"
            )
        cohort = {**families, **cohort}
    return [
        (text, _percent(cohort[key]) if key == "coverage" else _spread(cohort[key]))
        for key, text in words.items()
        if cohort.get(key) is not None and cohort[key] != []
    ]


def _percent(value: Any) -> str:
    """A share, or the ends of a list of shares, rounded down: 100% is all of it."""
    shares = value if isinstance(value, (list, tuple)) else [value]
    return " to ".join(dict.fromkeys(f"{math.floor(float(s) * 1000) / 10:g}%" for s in shares))


def _spread(value: Any) -> str:
    """A number, a list's range, or a summary such as mean and standard deviation."""
    if isinstance(value, Mapping):
        mean, sd = number(value, "mean"), number(value, "sd")
        if math.isfinite(mean) and sd > 0:
            digits = max(0, 1 - math.floor(math.log10(sd)))
            return f"{mean:.{digits}f} ({sd:.{digits}f})"
        return ", ".join(f"{key} {_spread(item)}" for key, item in value.items())
    if isinstance(value, (list, tuple)):
        items = list(dict.fromkeys(_spread(item) for item in value))
        return " to ".join([items[0], items[-1]] if len(items) > 1 else items)
    if isinstance(value, bool) or value is None or isinstance(value, str):
        return _text(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
