"""Forest plots: every mark where its number is, every number beside its mark."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from brainfusion.eval.report.drawing import BLUE
from brainfusion.eval.report.forest import (
    ForestRow,
    Mark,
    ceiling_marks,
    forest,
    key,
    scale_of,
    symbols,
)


def value_at(scale, percent: float) -> float:
    """The inverse of `Scale.x`, from its definition."""
    return scale.low + (percent - 3.0) / 94.0 * (scale.high - scale.low)


@given(
    st.lists(st.floats(-50, 50).filter(lambda v: abs(v) > 1e-3), min_size=1, max_size=8),
    st.integers(4, 9),
)
def test_a_scale_holds_all_values_between_a_few_round_ticks(values, n_ticks):
    scale = scale_of(values, n_ticks=n_ticks)
    span = max(max(values) - min(values), 1e-3)
    assert scale.low <= min(values) + 1e-5 * span
    assert scale.high >= max(values) - 1e-5 * span
    assert 2 <= len(scale.ticks) <= n_ticks
    assert scale.high - scale.low <= 5 * span + 1e-9
    texts = [scale.text(tick) for tick in scale.ticks]
    assert [float(text) for text in texts] == pytest.approx(list(scale.ticks), abs=1e-9)
    assert len(set(texts)) == len(texts)


def test_a_scale_of_aucs_goes_from_its_floor_to_one():
    scale = scale_of([0.4, 0.79, 0.96], chance=0.5, high=1.0)
    assert (scale.low, scale.high) == (0.4, 1.0)
    assert [scale.text(tick) for tick in scale.ticks] == [
        "0.4", "0.5", "0.6", "0.7", "0.8", "0.9", "1.0",
    ]  # fmt: skip


def test_a_scale_always_shows_chance():
    assert scale_of([0.2, 0.3], chance=0.0).low == 0.0
    assert scale_of([float("nan")], chance=0.5).low <= 0.5


def test_marks_and_intervals_are_where_their_values_are():
    scale = scale_of([0.0, 1.0], chance=0.5)
    row = ForestRow(name="x", marks=[Mark(value=0.7, low=0.6, high=0.85)], cells=[["0.70"]])
    text = forest([row], scale, headings=["", "", "AUC"])
    line = re.search(r'<line x1="([\d.]+)%" x2="([\d.]+)%" y1="11.0" y2="11.0"', text)
    mark = re.search(r'<use href="#mark-dot" x="([\d.]+)%" y="11.0"', text)
    chance = re.search(r'<line x1="([\d.]+)%" x2="\1%" y1="0" y2="100%"', text)
    assert line
    assert mark
    assert chance
    places = [*line.groups(), mark[1], chance[1]]
    values = [value_at(scale, float(place)) for place in places]
    assert values == pytest.approx([0.6, 0.85, 0.7, 0.5], abs=1e-3)


def test_what_is_off_the_scale_is_put_on_its_edge():
    scale = scale_of([0.4, 1.0])
    assert scale.x(-3.0) == 3.0
    assert scale.x(7.0) == 97.0


def test_each_number_stands_beside_its_mark():
    marks = [Mark(value=0.7), Mark(value=0.6, shape="triangle", colour=BLUE)]
    row = ForestRow(name="a <b>", marks=marks, cells=[["first", "second"], ["p1", "p2"]])
    text = forest([row], scale_of([0, 1]), headings=["", "", "value", "p"])
    assert 'height="44"' in text
    assert "<div>first</div><div>second</div>" in text
    assert 'y="11.0"' in text
    assert 'y="33.0"' in text
    assert 'aria-label="a &lt;b&gt;, on the scale: first and second"' in text


def test_hollow_marks_and_marks_without_an_interval_are_drawn_as_such():
    row = ForestRow(name="x", marks=[Mark(value=0.7, colour=BLUE, hollow=True)], cells=[["0.70"]])
    text = forest([row], scale_of([0, 1]), headings=["", "", ""])
    assert f'fill="#fff" stroke="{BLUE}"' in text
    assert "y1=" not in text.split('class="axis"')[0]


def test_headings_span_the_table_and_have_no_marks():
    text = forest([ForestRow(name="group")], scale_of([0, 1]), headings=["", "", "a", "b"])
    assert '<th colspan="4">group</th>' in text


def test_every_mark_refers_to_a_shape_that_the_page_defines():
    shapes = set(re.findall(r'id="(mark-[a-z]+)"', symbols()))
    marks = [Mark(value=0.5, shape=name) for name in ("dot", "triangle", "square")]
    marks += ceiling_marks(0.9, 0.8)
    used = set(re.findall(r'href="#([^"]+)"', key([(mark, "text") for mark in marks])))
    assert used == shapes


def test_an_unknown_ceiling_has_no_mark():
    assert ceiling_marks(float("nan"), float("nan")) == []
    assert [mark.value for mark in ceiling_marks(0.9, float("nan"))] == [0.9]
