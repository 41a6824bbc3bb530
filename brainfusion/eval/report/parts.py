"""The parts that the report's sections are made of: tables, bars, figures, notes."""

import math
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from brainfusion.runtime.logs import read_metrics


def document(title: str, header: str, sections: Sequence[tuple[str, str, str]], footer: str) -> str:
    """A whole HTML page in the report's style: no scripts, nothing from elsewhere.

    Args:
        title: Of the window; plain text.
        header: HTML above the links to the sections.
        sections: (id, heading, HTML) of each.
        footer: HTML at the end.
    """
    links = "".join(f'<a href="#{key}">{heading}</a>' for key, heading, _ in sections)
    body = "".join(
        f'<section id="{key}"><h2>{heading}</h2>\n{text}</section>\n'
        for key, heading, text in sections
    )
    css = files("brainfusion.eval.report").joinpath("report.css").read_text(encoding="utf-8")
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{css}</style></head>\n<body>\n"
        f"<header>{header}</header>\n<nav>{links}</nav>\n<main>\n{body}</main>\n"
        f'<footer class="note">{footer}</footer>\n</body></html>\n'
    )


def date_text(text: str) -> str:
    """To the minute, when it is an ISO date; as it is otherwise."""
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        return text
    return f"{moment:%Y-%m-%d %H:%M}" + (f" {moment.tzname()}" if moment.tzinfo else "")


def table(
    headings: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    caption: str = "",
    text_columns: Sequence[int] = (),
    css: str = "",
) -> str:
    """An HTML table that scrolls sideways where it does not fit; empty columns are left out.

    Args:
        headings: One a column.
        rows: Plain text cells, escaped here; what follows a line break is set small below.
        caption: Above the table.
        text_columns: Columns set to the left, as the first is.
        css: Class of the table.
    """
    if not rows:
        return ""
    kept = [i for i in range(len(headings)) if any(row[i] for row in rows)]
    side = [' class="text"' if i in text_columns else "" for i in range(len(headings))]
    head = "".join(f"<th{side[i]}>{escape(headings[i])}</th>" for i in kept)
    body = "".join(
        "<tr>" + "".join(f"<td{side[i]}>{_cell(row[i])}</td>" for i in kept) + "</tr>\n"
        for row in rows
    )
    top = f"<caption>{escape(caption)}</caption>" if caption else ""
    return (
        f'<div class="scroll"><table class="{css}">{top}<thead><tr>{head}</tr></thead>\n'
        f"<tbody>{body}</tbody></table></div>\n"
    )


def bars(lines: Sequence[tuple[str, float, float]], headings: tuple[str, str]) -> str:
    """A table of counts with bars: (name, value, the value of a full bar) a line."""
    rows = "".join(
        f"<tr><td>{escape(name)}</td>{bar_cell(value / whole if whole else 0.0)}"
        f"<td>{value:,.0f}</td></tr>\n"
        for name, value, whole in lines
    )
    return (
        f'<div class="scroll"><table><thead><tr><th>{escape(headings[0])}</th><th></th>'
        f"<th>{escape(headings[1])}</th></tr></thead><tbody>{rows}</tbody></table></div>\n"
    )


def bar_cell(share: float) -> str:
    """A table cell with a bar that fills a share of it."""
    return f'<td class="barcell"><span class="bar" style="width:{share:.1%}"></span></td>'


def figure(drawing: str, caption: str) -> str:
    """A drawing with its caption, which is HTML."""
    return f"<figure>{drawing}<figcaption>{caption}</figcaption></figure>\n"


def side_by_side(parts: Sequence[str]) -> str:
    """Parts in two columns where there is room."""
    return f'<div class="figures">{"".join(parts)}</div>\n' if parts else ""


def folded(summary: str, content: str, *, css: str = "") -> str:
    """Content that opens on a click; printed only with the class "printed"."""
    return f'<details class="{css}"><summary>{escape(summary)}</summary>{content}</details>\n'


def missing(what: str, command: str | None = None) -> str:
    """One line in place of a part that is not there, with the command that makes it."""
    hint = f" <code>brainfusion {command}</code> makes it." if command else ""
    return f'<p class="missing">{escape(what)}{hint}</p>\n'


def metrics_of(workspace: Path, row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows of the metrics file that a part of the results names; none when it is not there."""
    path = workspace / str(row.get("metrics") or "metrics.jsonl")
    if not row.get("metrics") or not path.is_file():
        return []
    return [line for line in read_metrics(path) if "step" in line]


def similarity_arrays(results: Mapping[str, Any], workspace: Path) -> dict[str, np.ndarray]:
    """The arrays of scores, ranks and map points that the results name; none if not there."""
    name = (results.get("figures") or {}).get("similarity")
    path = workspace / str(name)
    if not name or not path.is_file():
        return {}
    with np.load(path, allow_pickle=False) as stored:
        arrays = {key: np.asarray(stored[key], dtype=np.float64) for key in stored.files}
    return {key: array for key, array in arrays.items() if array.size}


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


def significant(value: float, digits: int = 2) -> str:
    """A number to some significant digits, without exponent.

    >>> significant(0.0022172), significant(0.4498), significant(1234.5), significant(0.0)
    ('0.0022', '0.45', '1,234', '0')
    """
    if not value:
        return "0"
    decimals = digits - 1 - math.floor(math.log10(abs(value)))
    return f"{value:,.{min(max(decimals, 0), 12)}f}"


def _cell(text: str) -> str:
    """Escaped, with an interval kept on one line; what follows a line break is a note."""
    first, _, rest = text.partition("\n")
    note = f'<span class="note">{escape(rest)}</span>' if rest else ""
    return re.sub(r"(\[[-\d.]+), ([-\d.]+\])", r"\1,&nbsp;\2", escape(first)) + note
