"""The report's section on CCA: what the features share before anything was trained on pairs."""

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from brainfusion.eval.report.drawing import BLUE, GREY
from brainfusion.eval.report.forest import ForestRow, Mark, forest, key, scale_of
from brainfusion.eval.report.parts import missing, table
from brainfusion.eval.report.rows import number, p_cell, p_text, rounded, with_interval

Row = Mapping[str, Any]

LEVEL = 0.05
"""Family-wise level at which a component is said to be there."""
_NAMED = 5
"""Components whose correlations a sentence names."""


def cca_section(results: Row) -> str:
    """A sentence, how the test was done, correlations beside those of permuted people, a table."""
    cca = results.get("cca") or {}
    rows = [row for row in cca.get("components") or [] if math.isfinite(number(row, "correlation"))]
    if not rows:
        return missing("No CCA of the features was run.", "probe --cca 3")
    text = f"<p>{escape(' '.join(sentences(cca)))}</p>\n"
    text += f'<p class="note">{escape(explained(cca))}</p>\n'
    return text + _figure(rows) + _table(rows)


def sentences(cca: Row) -> list[str]:
    """How many components are there, in one sentence; none where no CCA was run."""
    rows = cca.get("components") or []
    if not rows:
        return []
    there = [row for row in rows if number(row, "p_family_wise") < LEVEL]
    start = "CCA of the features themselves, in which nothing was trained on pairs, finds"
    if not there:
        first = rows[0]
        held, p = _held_out([first]), p_text(number(first, "p_family_wise"))
        how = f", with a correlation of {held} in people held out" if held else ""
        return [
            f"{start} no component that brain and DNA share: {p} for the first "
            f"of {len(rows)} tested{how}."
        ]
    n = len(there)
    held = _held_out(there[:_NAMED])
    words = "1 component" if n == 1 else f"{n} components"
    how = f"; in people held out {'it correlates' if n == 1 else 'they correlate'} {held}"
    how += " and so on" * (n > _NAMED)
    return [
        f"{start} {words} that brain and DNA share, of {len(rows)} tested (family-wise p < "
        f"{LEVEL:g}){how * bool(held)}."
    ]


def _held_out(rows: Sequence[Row]) -> str:
    values = [
        with_interval(row, "held_out") for row in rows if math.isfinite(number(row, "held_out"))
    ]
    return " and ".join([", ".join(values[:-1]), values[-1]] if len(values) > 1 else values)


def explained(cca: Row) -> str:
    """What the test looked at, and how: plain text."""
    brain, dna = cca.get("brain", "brain"), cca.get("dna", "DNA")
    n = number(cca, "n_people", number(cca, "n"))
    text = f"A check that owes nothing to the aligner: {brain} features and {dna} vectors"
    text += f" of {n:,.0f} people, " if math.isfinite(n) else ", "
    text += "as they went into the alignment. "
    if cca.get("held_out_only"):
        text += "The encoder was tuned on pairs, so only people on whom it was not are in it. "
    if pcs := cca.get("n_pcs"):
        text += f"{' and '.join(dict.fromkeys(str(n) for n in pcs))} principal components a side"
        out = ", ".join(cca.get("confounds") or [])
        text += f", {out} taken out of both sides. " if out else ". "
    within = [_WITHIN[name] for name in cca.get("exchanged_within") or [] if name in _WITHIN]
    how = f" within their {' and '.join(within)}" if within else ""
    text += (
        "Each component is tested with the earlier ones taken out, against "
        f"{number(cca, 'n_permutations'):,.0f} exchanges of whole families{how}; p is corrected "
        "for the number of components (family-wise). "
        if math.isfinite(number(cca, "n_permutations"))
        else ""
    )
    if folds := cca.get("n_folds"):
        text += (
            f"Correlations are those of people held out in {folds} folds of whole families, with "
            "95% intervals; grey is where 95% of them fall when families are exchanged. Brain and "
            "DNA may share components because both know the ancestry or the site: this is no "
            "retrieval of a person."
        )
    return text


_WITHIN = {"site": "site", "group": "ancestry group"}


def _figure(rows: Sequence[Row]) -> str:
    drawn = [row for row in rows if math.isfinite(number(row, "held_out"))]
    if not drawn:
        return ""
    names = ("held_out", "ci_low", "ci_high", "null_low", "null_high")
    ends = [number(row, name) for row in drawn for name in names]
    scale = scale_of([0.0, *ends], chance=0.0)
    has_null = any(math.isfinite(number(row, "null_low")) for row in drawn)
    lines = [
        ForestRow(
            name=f"component {row['component']}",
            marks=_marks(row),
            cells=[_values(row), [p_cell(number(row, "p_family_wise")), *[""] * has_null]],
            note="" if number(row, "p_family_wise") >= LEVEL else "is there",
            stands_out=True,
        )
        for row in drawn
    ]
    entries: list[tuple[Mark | str, str]] = [(Mark(value=0, colour=BLUE), "held-out correlation")]
    if has_null:
        entries.append(
            (Mark(value=0, colour=GREY, shape="bar"), "95% of those of exchanged families")
        )
    headings = ["", "", "correlation", "p"]
    return f"<div>{forest(lines, scale, headings=headings)}</div>\n" + key(
        [*entries, ("chance", "no correlation")]
    )


def _marks(row: Row) -> list[Mark]:
    low, high = number(row, "null_low"), number(row, "null_high")
    marks = [
        Mark(
            value=number(row, "held_out"),
            low=number(row, "ci_low"),
            high=number(row, "ci_high"),
            colour=BLUE,
        )
    ]
    if math.isfinite(low + high):
        middle = (low + high) / 2
        marks.append(Mark(value=middle, low=low, high=high, shape="bar", colour=GREY))
    return marks


def _values(row: Row) -> list[str]:
    low, high = number(row, "null_low"), number(row, "null_high")
    null = [f"{rounded(low)} to {rounded(high)}"] if math.isfinite(low + high) else []
    return [with_interval(row, "held_out"), *null]


def _table(rows: Sequence[Row]) -> str:
    body = [
        [
            f"component {row['component']}",
            with_interval(row, "held_out", 3),
            p_cell(number(row, "p_held_out")),
            rounded(number(row, "correlation"), 3),
            p_cell(number(row, "p_value")),
            p_cell(number(row, "p_family_wise")),
        ]
        for row in rows
    ]
    headings = ["", "held out", "p, held out", "fitted", "p, fitted", "p, family-wise"]
    return table(headings, body, css="dense") + (
        '<p class="note">Fitted: the correlation in the people that the component was fitted on, '
        "which is always too high for anybody else; the family-wise p is of these.</p>\n"
    )
