"""One self-contained HTML page from a workspace: no network, no scripts, no subject ids.

Everything on the page comes from `results.json` and the files it names (docs/formats.md). A part
that is not there yet is replaced by one line that names the command which makes it.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from brainfusion.eval.report import figures, sections
from brainfusion.eval.report.attribution import attribution_section
from brainfusion.eval.report.cca import cca_section
from brainfusion.eval.report.drawing import DIRECTION_COLOURS, GREY, INK
from brainfusion.eval.report.forest import symbols
from brainfusion.eval.report.parts import date_text, document
from brainfusion.eval.report.probes import probes_section
from brainfusion.eval.report.rows import (
    DIRECTION_NAMES,
    DIRECTIONS,
    by_name,
    ceiling_text,
    control_distance,
    control_failed,
    direction_of,
    gallery_text,
    method_name,
    number,
    p_text,
    rounded,
    with_interval,
)
from brainfusion.eval.report.tables import cohort_section, provenance_section, stages_section
from brainfusion.eval.report.training import training_section
from brainfusion.eval.report.verdict import best_baseline, evidence, verdict
from brainfusion.runtime.errors import UserError
from brainfusion.runtime.files import read_json, write_text

Row = Mapping[str, Any]

FORMAT = 1
"""The format of `results.json` that this module reads."""


def write_report(workspace: Path, out: Path | None = None) -> Path:
    """Draw a workspace's results as one HTML page.

    Args:
        workspace: A folder with `results.json`; the paths in it are relative to this folder.
        out: Where the page goes; `workspace/report.html` if omitted.

    Returns:
        The path of the page.

    Raises:
        UserError: No results.json, a broken one, or one of another format.
    """
    source = workspace / "results.json"
    if not source.is_file():
        raise UserError(
            f"{source} does not exist: expected the results of a run. Make them with "
            "`brainfusion retrieve` or `brainfusion demo`."
        )
    results = read_json(source)
    if not isinstance(results, dict) or results.get("format") != FORMAT:
        found = results.get("format") if isinstance(results, dict) else type(results).__name__
        raise UserError(
            f"{source} has format {found!r}, expected {FORMAT}: make it again with this version."
        )
    target = out if out is not None else workspace / "report.html"
    write_text(target, page(results, workspace))
    return target


def page(results: Row, workspace: Path) -> str:
    """The whole page as text; `workspace` is where side files are looked up."""
    title = f"brainfusion report: {_name(results)}"
    parts: list[tuple[str, str, Callable[[], str]]] = [
        (
            "retrieval",
            "Retrieval, against chance and ceiling",
            lambda: sections.retrieval_section(results, workspace),
        ),
        ("control", "The control", lambda: sections.control_section(results)),
        ("space", "The shared space", lambda: sections.space_section(results, workspace)),
        ("probes", "What the features predict", lambda: probes_section(results)),
        ("cca", "What the features share, untrained", lambda: cca_section(results)),
        (
            "attribution",
            "What retrieval rests on",
            lambda: attribution_section(results.get("attribution") or {}),
        ),
        ("training", "Training", lambda: training_section(results, workspace)),
        ("cohort", "The cohort", lambda: cohort_section(results.get("cohort") or {})),
        *(
            [("stages", "Stages", lambda: stages_section(results["stages"]))]
            if results.get("stages")
            else []
        ),
        ("provenance", "Configuration and provenance", lambda: provenance_section(results)),
    ]
    footer = (
        "All figures on this page are in <code>results.json</code> beside it. Intervals are 95%. "
        "AUC: the chance that a person's own partner is ranked above somebody else's, 0.5 when "
        "guessing, whatever the size of the gallery."
    )
    made = [(key, heading, make()) for key, heading, make in parts]
    return document(title, f"{symbols()}\n{_header(results)}", made, footer)


# -- top of the page ---------------------------------------------------------------------------


def _name(results: Row) -> str:
    return str((results.get("cohort") or {}).get("name", "unnamed cohort"))


def _header(results: Row) -> str:
    cohort, alignment = results.get("cohort") or {}, results.get("alignment") or {}
    simulated = cohort.get("origin") == "simulated"
    facts = [
        f"{alignment['brain']} with {alignment['dna']}"
        if alignment.get("brain") and alignment.get("dna")
        else None,
        method_name(alignment) if alignment else None,
        f"{cohort['n_people']:,} people" if cohort.get("n_people") else None,
        f"made {date_text(str(results['created']))}" if results.get("created") else None,
        f"version {results['package_version']}" if results.get("package_version") else None,
    ]
    meta = " &middot; ".join(escape(str(fact)) for fact in facts if fact)
    label = '<div class="label">simulated data</div>\n' if simulated else ""
    first, *rest = (
        f'<span class="alarm">{_prose(text)}</span>' if _alarming(text) else _prose(text)
        for text in verdict(results)
    )
    sentences = f'<p class="lead">{first}</p>\n' + (
        f"<ul>{''.join(f'<li>{text}</li>' for text in rest)}</ul>" if rest else ""
    )
    return (
        f"{label}<h1>Brain and DNA: {escape(_name(results))}</h1>\n<div class='meta'>{meta}</div>\n"
        f'<div class="verdict {_state(results)}">{sentences}</div>\n{_cards(results)}'
    )


def _state(results: Row) -> str:
    retrieval = results.get("retrieval") or {}
    if control_failed(retrieval):
        return "failed"
    rows = [retrieval[name] for name in DIRECTIONS if retrieval.get(name)]
    return "found" if rows and all(evidence(row) == "found" for row in rows) else "open"


def _prose(text: str) -> str:
    """Escaped, with "AUC 0.80", "p = 0.001" and intervals kept on one line."""
    text = re.sub(r"\bp (=|&lt;) ", r"p&nbsp;\1&nbsp;", escape(text, quote=False))
    text = re.sub(r"\bAUC (?=\d)", "AUC&nbsp;", text)
    return re.sub(r" (\[[-\d.]+), ([-\d.]+\])", r"&nbsp;\1,&nbsp;\2", text)


def _alarming(text: str) -> bool:
    return text.startswith(("CONTROL FAILED", "TOO GOOD", "Warning", "Worse than chance"))


def _cards(results: Row) -> str:
    retrieval = results.get("retrieval") or {}
    cards = []
    for name, (query, found) in DIRECTIONS.items():
        if row := retrieval.get(name):
            small = ["chance 0.50", *filter(None, [ceiling_text(row)])]
            small.append(p_text(number(row, "p_value")))
            small.append(gallery_text(row))
            what = f"From {query} to {found}: AUC"
            cards.append(_card(what, row, DIRECTION_COLOURS[name], small, query.lower()))
    if best := best_baseline(retrieval):
        row = by_name(retrieval["baselines"])[best][0]
        way = direction_of(row)
        small = [best, *([f"from {DIRECTION_NAMES[way]}"] if way else [])]
        cards.append(_card("Best simpler method: AUC", row, INK, small))
    if control := retrieval.get("shuffled_control"):
        distance = control_distance(control)
        small = ["must be at chance, 0.50"]
        if math.isfinite(distance):
            small.append(f"{distance:.1f} standard errors away")
        css = "bad" if control_failed(retrieval) else ""
        cards.append(_card("Control, shuffled: AUC", control, GREY, small, css))
    if not cards:
        return ""
    marks = "Bars are 95% intervals, the control's 3 standard errors to each side; dashed: chance"
    if any(ceiling_text(retrieval[name]) for name in DIRECTIONS if retrieval.get(name)):
        marks += "; green diamond: attainable by a perfect model; green bar: from these recordings"
    return f'<div class="cards">{"".join(cards)}</div>\n<p class="note under">{marks}.</p>\n'


def _card(what: str, row: Row, colour: str, small: Sequence[str], css: str = "") -> str:
    low, high, error = (number(row, key) for key in ("ci_low", "ci_high", "standard_error"))
    spread = ""
    if math.isfinite(low + high):
        spread = f"{rounded(low)} to {rounded(high)}"
    elif math.isfinite(error):
        spread = f"&plusmn; {error:.2f} s.e."
    label = f"{what} {with_interval(row)}; {'; '.join(small)}"
    return (
        f'<div class="card"><div class="what">{escape(what)}</div>'
        f'<div class="value {css}">{rounded(row["auc"])} <span class="range">{spread}</span></div>'
        f"{figures.gauge(row, label=label, colour=colour)}"
        f'<p class="small">{" &middot; ".join(_prose(text) for text in small)}</p></div>'
    )
