"""Forest plots as HTML tables: a name, its marks on a common scale, the same numbers as text.

Every line of text stands beside its own mark, so that nothing has to be looked up in a legend, and
on a phone the parts of a row are stacked. The marks are SVG in per cent of the column's width: they
stretch with the page, their shapes and letters do not.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

from brainfusion.eval.report.drawing import CEILING, GREY, INK

LINE_PX = 22
"""Height of a line of text and of its mark; `.forest .lines div` in report.css has the same."""

_SHAPES = {
    "dot": "M-4.5 0a4.5 4.5 0 1 0 9 0a4.5 4.5 0 1 0-9 0z",
    "triangle": "M-5 4.2L0-5L5 4.2z",
    "square": "M-4-4H4V4H-4z",
    "diamond": "M0-5.5L5.5 0L0 5.5L-5.5 0z",
    "bar": "M-1.5-8H1.5V8H-1.5z",
}


@dataclass(frozen=True, kw_only=True)
class Mark:
    """A value with its interval."""

    value: float
    low: float = math.nan
    high: float = math.nan
    shape: str = "dot"
    """A key of the shapes: dot, triangle, square, diamond, bar."""
    colour: str = INK
    hollow: bool = False


@dataclass(frozen=True, kw_only=True)
class ForestRow:
    """A name and its lines; a row without marks is a heading."""

    name: str
    marks: Sequence[Mark] = ()
    """One a line."""
    cells: Sequence[Sequence[str]] = ()
    """[column][line] plain text."""
    across: Sequence[Mark] = ()
    """Marks halfway down the row: ceilings."""
    note: str = ""
    """Small, below the name."""
    stands_out: bool = False
    """Whether the note is good news."""


@dataclass(frozen=True, kw_only=True)
class Scale:
    """The common axis of a forest: its ends, ticks and vertical lines."""

    low: float
    high: float
    ticks: Sequence[float]
    chance: float = math.nan
    """A dashed line."""
    other: float = math.nan
    """A dotted line."""
    inset: float = field(default=3.0)
    """Per cent kept free on each side."""

    def x(self, value: float) -> float:
        """Per cent of the column's width; what lies outside is put on the edge."""
        share = (min(max(value, self.low), self.high) - self.low) / (self.high - self.low)
        return round(self.inset + (100 - 2 * self.inset) * share, 2)

    def text(self, tick: float) -> str:
        """A tick with as many digits as the steps need."""
        step = self.ticks[1] - self.ticks[0] if len(self.ticks) > 1 else 1.0
        digits = max(0, -math.floor(math.log10(step) + 1e-9))
        digits += not math.isclose(step * 10**digits, round(step * 10**digits))
        return f"{tick:.{digits}f}" if round(tick, digits) else f"{0:.{digits}f}"


def scale_of(
    values: Sequence[float],
    *,
    chance: float = math.nan,
    other: float = math.nan,
    high: float = math.nan,
    n_ticks: int = 7,
) -> Scale:
    """A scale over all finite values and the chance line, that ends on round numbers.

    Args:
        values: Everything that must fit.
        chance: The dashed line, on the scale.
        other: The dotted line.
        high: The upper end, if it is known.
        n_ticks: At most so many.
    """
    finite = [value for value in (*values, chance) if math.isfinite(value)] or [0.0, 1.0]
    top = high if math.isfinite(high) else max(finite)
    bottom = min(finite)
    span = max(top - bottom, 1e-3)
    size = 10.0 ** math.floor(math.log10(span))
    steps = (size * factor for factor in (0.1, 0.2, 0.25, 0.5, 1.0, 2.0, 2.5, 5.0))
    for step in steps:
        first, last = math.floor(bottom / step + 1e-6), math.ceil(top / step - 1e-6)
        last = max(last, first + 1)
        if last - first < n_ticks:
            ticks = [round(i * step, 10) for i in range(first, last + 1)]
            return Scale(low=ticks[0], high=ticks[-1], ticks=ticks, chance=chance, other=other)
    raise AssertionError(f"no step for {bottom} to {top}")


def forest(
    rows: Sequence[ForestRow], scale: Scale, *, headings: Sequence[str], caption: str = ""
) -> str:
    """The table.

    Args:
        rows: From top to bottom.
        scale: Of all rows.
        headings: Of the names' column, of the plot, of each column of cells.
        caption: Above the table.
    """
    n_cells = len(headings) - 2
    name, plot, *others = (escape(text) for text in headings)
    head = f'<th>{name}</th><th class="plot">{plot}</th>'
    head += "".join(f"<th>{text}</th>" for text in others)
    body = "".join(_row(row, scale, n_cells) for row in rows)
    title = f"<caption>{escape(caption)}</caption>" if caption else ""
    return (
        f'<table class="forest">{title}<thead><tr>{head}</tr></thead>\n<tbody>{body}'
        f'<tr class="axis"><td></td><td class="plot">{_axis(scale)}</td>'
        f"{'<td></td>' * n_cells}</tr></tbody></table>\n"
    )


def symbols() -> str:
    """The shapes, once a page: marks and keys refer to them."""
    paths = "".join(f'<path id="mark-{name}" d="{path}"/>' for name, path in _SHAPES.items())
    return (
        f'<svg class="symbols" aria-hidden="true" width="0" height="0"><defs>{paths}</defs></svg>'
    )


def key(entries: Sequence[tuple[Mark | str, str]]) -> str:
    """A legend in one paragraph: a mark, or a line's kind ("chance", "other"), with its text."""
    items = []
    for mark, text in entries:
        if isinstance(mark, Mark):
            glyph = _shape(mark, "50%", 8)
        else:
            glyph = f'<line x1="50%" x2="50%" y1="0" y2="16" {_LINES[mark]}/>'
        svg = f'<svg class="glyph" aria-hidden="true" width="16" height="16">{glyph}</svg>'
        items.append(f"<span>{svg}{escape(text)}</span>")
    return f'<p class="key">{" ".join(items)}</p>\n'


_LINES = {
    "chance": f'stroke="{GREY}" stroke-dasharray="4 3"',
    "other": f'stroke="{INK}" stroke-dasharray="1 3" stroke-width="1.5"',
}


def _row(row: ForestRow, scale: Scale, n_cells: int) -> str:
    if not row.marks:
        return f'<tr class="group"><th colspan="{2 + n_cells}">{escape(row.name)}</th></tr>\n'
    css = "note good" if row.stands_out else "note"
    note = f'<span class="{css}">{escape(row.note)}</span>' if row.note else ""
    cells = "".join(
        f'<td class="lines">{"".join(f"<div>{escape(text)}</div>" for text in lines)}</td>'
        for lines in row.cells
    )
    return (
        f'<tr><td class="name">{escape(row.name)}{note}</td>'
        f'<td class="plot">{_marks(row, scale)}</td>{cells}</tr>\n'
    )


def _marks(row: ForestRow, scale: Scale) -> str:
    height = LINE_PX * len(row.marks)
    parts = [_line(scale.chance, "chance", scale), _line(scale.other, "other", scale)]
    parts += [_shape(mark, f"{scale.x(mark.value)}%", height / 2) for mark in row.across]
    for i, mark in enumerate(row.marks):
        y = LINE_PX * (i + 0.5)
        if math.isfinite(mark.low + mark.high):
            width = 1.5 if mark.hollow else 2.5
            parts.append(
                f'<line x1="{scale.x(mark.low)}%" x2="{scale.x(mark.high)}%" y1="{y}" y2="{y}" '
                f'stroke="{mark.colour}" stroke-width="{width}"/>'
            )
        parts.append(_shape(mark, f"{scale.x(mark.value)}%", y))
    numbers = " and ".join(row.cells[0]) if row.cells else ""
    return (
        f'<svg role="img" aria-label="{escape(f"{row.name}, on the scale: {numbers}")}" '
        f'width="100%" height="{height}">{"".join(parts)}</svg>'
    )


def _line(value: float, kind: str, scale: Scale) -> str:
    if math.isnan(value):
        return ""
    x = scale.x(value)
    return f'<line x1="{x}%" x2="{x}%" y1="0" y2="100%" {_LINES[kind]}/>'


def _shape(mark: Mark, x: str, y: float) -> str:
    paint = f'fill="{mark.colour}" stroke="#fff"'
    if mark.hollow:
        paint = f'fill="#fff" stroke="{mark.colour}" stroke-width="1.7"'
    return f'<use href="#mark-{mark.shape}" x="{x}" y="{y}" {paint}/>'


def _axis(scale: Scale) -> str:
    parts = [
        f'<line x1="{scale.x(scale.low)}%" x2="{scale.x(scale.high)}%" y1="1" y2="1" '
        'stroke="#777"/>'
    ]
    for tick in scale.ticks:
        x = f"{scale.x(tick)}%"
        parts.append(f'<line x1="{x}" x2="{x}" y1="1" y2="6" stroke="#777"/>')
        parts.append(f'<text x="{x}" y="19" text-anchor="middle">{scale.text(tick)}</text>')
    return f'<svg aria-hidden="true" width="100%" height="24">{"".join(parts)}</svg>'


def ceiling_marks(attainable: float, from_recordings: float) -> list[Mark]:
    """The marks of what a perfect model attains and of what the recordings allow."""
    marks = [
        Mark(value=from_recordings, shape="bar", colour=CEILING),
        Mark(value=attainable, shape="diamond", colour=CEILING, hollow=True),
    ]
    return [mark for mark in marks if math.isfinite(mark.value)]
