"""Figures of probes: whether probabilities are right, and what more people to learn from bring."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from brainfusion.eval.report.drawing import (
    BLUE,
    GREEN,
    GREY,
    INK,
    ORANGE,
    PURPLE,
    SKY,
    VERMILLION,
    legend,
    new_axes,
    style,
    to_svg,
)
from brainfusion.eval.report.rows import number, rounded

Row = Mapping[str, Any]

# Colours that colour-blind readers tell apart, each with its own marker and dash.
_LOOKS = (
    (BLUE, "o", "-"),
    (VERMILLION, "s", "--"),
    (GREEN, "^", "-."),
    (ORANGE, "D", ":"),
    (SKY, "v", "-"),
    (PURPLE, "P", "--"),
)
MAX_LINES = len(_LOOKS)


def calibration(bins: Sequence[Row], *, name: str, target: str) -> str:
    """Observed against predicted shares, with intervals; on the diagonal they agree.

    Args:
        bins: With `predicted`, `observed`, `ci_low`, `ci_high`, `n`.
        name: Unique in the page.
        target: What is predicted.
    """
    low = min(min(number(b, "predicted"), number(b, "observed")) for b in bins)
    high = max(max(number(b, "predicted"), number(b, "observed")) for b in bins)
    with style():
        figure, axes = new_axes(3.0)
        axes.plot([0, 1], [0, 1], color=GREY, lw=1.0, ls="--", label="as predicted")
        for one in bins:
            ends = [number(one, "ci_low"), number(one, "ci_high")]
            if math.isfinite(sum(ends)):
                axes.plot([one["predicted"]] * 2, ends, color=INK, lw=0.9)
                low, high = min(low, ends[0]), max(high, ends[1])
        axes.plot(
            [one["predicted"] for one in bins],
            [one["observed"] for one in bins],
            color=BLUE,
            marker="o",
            ms=5,
            lw=1.2,
            label="found, with 95% interval",
        )
        pad = max(0.05 * (high - low), 0.01)
        axes.set_xlim(max(low - pad, -0.02), min(high + pad, 1.02))
        axes.set_ylim(*axes.get_xlim())
        axes.set_xlabel("predicted probability")
        axes.set_ylabel("share of people")
        legend(axes)
        pairs = ", ".join(f"{rounded(b['predicted'])}: {rounded(b['observed'])}" for b in bins)
        label = f"Calibration of {target}: predicted probability and share found, {pairs}."
        return to_svg(figure, name=name, label=label)


def learning(
    curves: Mapping[str, Sequence[Row]],
    *,
    order: Sequence[str],
    name: str,
    target: str,
    metric: str,
    chance: float,
) -> str:
    """The metric of each representation against the number of people learnt from.

    Args:
        curves: Name of the features -> points with `n_train`, `value`, `ci_low`, `ci_high`.
        order: The features to draw, at most `MAX_LINES`; each looks as its place says, in every
            figure that has the same order.
        name: Unique in the page.
        target: What is predicted.
        metric: Its name in words.
        chance: The dashed line.
    """
    said = []
    with style():
        figure, axes = new_axes(3.0)
        widest = max(number(one, "n_train") for points in curves.values() for one in points)
        for place, (text, (colour, marker, dash)) in enumerate(zip(order, _LOOKS, strict=False)):
            if not (points := curves.get(text)):
                continue
            # A little apart, so that intervals do not cover one another.
            aside = (place - (len(order) - 1) / 2) * 0.011 * widest
            sizes = [number(one, "n_train") + aside for one in points]
            values = [number(one, "value") for one in points]
            low, high = ([number(one, end) for one in points] for end in ("ci_low", "ci_high"))
            axes.vlines(sizes, low, high, color=colour, lw=1.0, alpha=0.55)
            axes.plot(sizes, values, color=colour, marker=marker, ms=4, lw=1.3, ls=dash, label=text)
            said.append(f"{text} from {rounded(values[0])} to {rounded(values[-1])}")
        if math.isfinite(chance):
            axes.axhline(chance, color=GREY, lw=1.0, ls="--", label="chance")
        axes.set_xlabel("people to learn from")
        axes.set_ylabel(metric)
        legend(axes, n_columns=2)
        label = f"Learning curves of {target}, {metric}: {'; '.join(said)}."
        return to_svg(figure, name=name, label=label)
