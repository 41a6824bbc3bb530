"""Figures of a training run: curves over its steps, and what a masked autoencoder rebuilt.

Drawn as those of `figures`: one `<svg>` element each, about 330 points wide.

Shape legend: p parcels, t TRs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from brainfusion.eval.report.drawing import (
    BLUE,
    GREY,
    INK,
    VERMILLION,
    legend,
    new_axes,
    percent,
    style,
    to_svg,
)
from brainfusion.eval.report.figures import curve

Row = Mapping[str, Any]

_MAX_MARKED = 12
_MAX_PICTURE = (200, 400)
_TRACES = (0.25, 0.5, 0.75)


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """One curve of a figure."""

    key: str
    """Of the rows."""
    text: str
    """In the legend."""
    colour: str = BLUE
    dashes: str = "-"


def over_steps(
    rows: Sequence[Row],
    lines: Sequence[Line],
    *,
    name: str,
    label: str,
    unit: str,
    references: Sequence[tuple[float, str]] = (),
    log: bool = False,
    from_zero: bool = False,
    shares: bool = False,
) -> str:
    """Quantities of `metrics.jsonl` against the step.

    Args:
        rows: Rows; those without a key are left out of its curve.
        lines: What to draw; curves without points are left out.
        name: Unique in the page; part of the element ids.
        label: What the figure shows, for people who cannot see it.
        unit: Of the vertical axis.
        references: (value, text) of horizontal lines.
        log: A log scale where all values are above zero and span more than a factor of ten.
        from_zero: The axis starts at 0.
        shares: Values are shares, written as percentages.
    """
    from matplotlib.ticker import MaxNLocator

    with style():
        figure, axes = new_axes(2.3)
        lowest, highest = np.inf, -np.inf
        for line in lines:
            steps, values = curve(rows, line.key)
            if not len(steps):
                continue
            marker = "o" if len(steps) <= _MAX_MARKED else None
            look: dict[str, Any] = {"lw": 1.4, "ls": line.dashes, "marker": marker, "ms": 3}
            axes.plot(steps, values, color=line.colour, label=line.text, **look)
            lowest, highest = min(lowest, values.min()), max(highest, values.max())
        for place, (value, text) in enumerate(references):
            dashes: Any = ("--", ":", "-.")[place % 3]
            axes.axhline(value, color=GREY, lw=1.1, ls=dashes, label=text)
        if log and lowest > 0 and highest > 10 * lowest:
            axes.set_yscale("log")
            unit = f"{unit}, log scale"
        elif from_zero:
            axes.set_ylim(0, max(axes.get_ylim()[1], 1.15 * max(highest, 0.0), 1e-9))
        if shares:
            percent(axes.yaxis)
        axes.set_xlabel("step")
        axes.set_ylabel(unit)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if len(axes.get_lines()) > 1:
            legend(axes, n_columns=2)
        return to_svg(figure, name=name, label=label)


def reconstruction(signal: np.ndarray, rebuilt: np.ndarray, hidden: np.ndarray) -> str:
    """Three pictures of a window [p, t]: what there was, what the encoder saw, what came back.

    Args:
        signal: [p, t], the conditioned window.
        rebuilt: [p, t]; only its hidden values are shown.
        hidden: [p, t] bool.
    """
    signal, rebuilt, hidden = (_thinned(x) for x in (signal, rebuilt, hidden))
    reach = float(np.quantile(np.abs(signal), 0.98)) or 1.0
    seen = np.where(hidden, np.nan, signal)
    pictures = (
        (signal, "the recording"),
        (seen, "what the encoder saw"),
        (np.where(hidden, rebuilt, signal), "hidden values rebuilt"),
    )
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with style():
        figure = Figure(figsize=(4.6, 4.6), layout="constrained")
        panels = figure.subplots(3, 1, sharex=True)
        colours = mpl.colormaps["RdBu_r"].with_extremes(bad="#5b5b5b")
        image = None
        for axes, (values, title) in zip(panels, pictures, strict=True):
            image = axes.imshow(
                np.ma.masked_invalid(values),
                aspect="auto",
                cmap=colours,
                vmin=-reach,
                vmax=reach,
                interpolation="nearest",
            )
            axes.set_title(title, loc="left")
            axes.set_ylabel("parcels")
        panels[-1].set_xlabel("frame")
        assert image is not None
        figure.colorbar(image, ax=panels, fraction=0.04, label="standardised BOLD")
        label = "A window of a recording, what of it the encoder saw, and how the rest was rebuilt."
        return to_svg(figure, name="reconstruction", label=label)


def traces(signal: np.ndarray, rebuilt: np.ndarray, hidden: np.ndarray) -> str:
    """Three parcels of a window over time, with what was rebuilt where they were hidden.

    They are those whose error is at the quartiles among the parcels that have hidden and visible
    values: one of the better, the median one, one of the worse.
    """
    error = np.where(hidden, (rebuilt - signal) ** 2, 0.0).sum(1) / np.maximum(hidden.sum(1), 1)
    mixed = np.flatnonzero(hidden.any(1) & ~hidden.all(1))
    if not len(mixed):
        mixed = np.flatnonzero(hidden.any(1))
    order = mixed[np.argsort(error[mixed], kind="stable")]
    chosen = [int(order[round(q * (len(order) - 1))]) for q in _TRACES] if len(order) else []
    from matplotlib.figure import Figure

    with style():
        figure = Figure(figsize=(4.6, 4.2), layout="constrained")
        panels = figure.subplots(max(len(chosen), 1), 1, sharex=True, squeeze=False)[:, 0]
        words = ("one of the better parcels", "the median parcel", "one of the worse parcels")
        frames = np.arange(signal.shape[1])
        for axes, parcel, text in zip(panels, chosen, words, strict=False):
            there = hidden[parcel]
            axes.fill_between(
                frames, 0, 1, where=there, transform=axes.get_xaxis_transform(),
                color=GREY, alpha=0.2, lw=0, step="mid", label="hidden",
            )  # fmt: skip
            axes.plot(frames, signal[parcel], color=INK, lw=1.0, label="recording")
            values = np.where(there, rebuilt[parcel], np.nan)
            axes.plot(frames, values, color=VERMILLION, lw=1.5, label="rebuilt")
            axes.set_title(text, loc="left")
            axes.set_ylabel("BOLD")
        panels[-1].set_xlabel("frame")
        if chosen:
            legend(panels[0])
        label = "Three parcels over time: the recording, and what was rebuilt where it was hidden."
        return to_svg(figure, name="traces", label=label)


def _thinned(x: np.ndarray) -> np.ndarray:
    """At most so many rows and columns that the picture stays small; every k-th is kept."""
    rows, columns = (-(-n // most) for n, most in zip(x.shape, _MAX_PICTURE, strict=True))
    return x[::rows, ::columns]
