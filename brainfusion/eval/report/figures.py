"""The report's figures: matplotlib to inline SVG text, Okabe-Ito colours, no pyplot.

Each function takes plain numbers and returns one `<svg>` element that scales with its column. They
are drawn about 330 points wide, so that their text is still readable on a phone. Text stays text;
marks that would make the file large are embedded as a picture.

Shape legend: n people, m sampled non-pairs.
"""

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np

from brainfusion.eval.report.drawing import (
    BLUE,
    BRAIN,
    CEILING,
    DIRECTION_COLOURS,
    DNA,
    GREEN,
    GREY,
    INK,
    VERMILLION,
    legend,
    new_axes,
    percent,
    style,
    to_svg,
)
from brainfusion.eval.report.rows import DIRECTION_NAMES, DIRECTIONS, attainable, bar_ends, number

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Row = Mapping[str, Any]

_MAX_LINE_POINTS = 300
_MAX_MAP_PEOPLE = 500
_MAX_VECTOR_MARKS = 400


def losses(rows: Sequence[Row], *, name: str, label: str, best_step: int | None = None) -> str:
    """Training and validation loss against the step, beside the loss of knowing nothing.

    That is `log_n` or `loss_of_mean_target`, where the rows have it. Losses over many orders of
    magnitude are drawn on a log scale; a start far above all the rest is cut off and written down.

    Args:
        rows: Rows of a `metrics.jsonl`; rows without a key are left out of its curve.
        name: Unique in the page; part of the element ids.
        label: What the figure shows, for people who cannot see it.
        best_step: Where the model was kept, marked by a vertical line.
    """
    with style():
        figure, axes = new_axes(2.5)
        curves = []
        looks: list[tuple[str, str, str, dict[str, Any]]] = [
            ("loss", "training", BLUE, {"lw": 1.0}),
            ("validation_loss", "validation", VERMILLION, {"lw": 1.6, "ms": 3}),
            ("loss_of_mean_target", "guessing the mean target", GREEN, {"lw": 1.2, "ls": "-."}),
            ("log_n", "log N (guessing)", GREY, {"lw": 1.0, "ls": "--"}),
        ]
        for key, text, colour, look in looks:
            steps, values = curve(rows, key)
            if len(steps):
                curves.append((steps, values))
                marker = "o" if len(steps) <= 12 and "ms" in look else None
                axes.plot(steps, values, color=colour, label=text, marker=marker, **look)
        _mark_best(axes, best_step)
        axes.set_xlabel("step")
        nats = any("log_n" in row and row["log_n"] is not None for row in rows)
        axes.set_ylabel("loss (nats)" if nats else "loss")
        if curves:
            _loss_scale(axes, *map(np.concatenate, zip(*curves, strict=True)))
        legend(axes)
        return to_svg(figure, name=name, label=label)


def _loss_scale(axes: "Axes", steps: np.ndarray, values: np.ndarray) -> None:
    """A log scale for a wide range; else the top at what comes after the first 2% of the steps."""
    lowest, highest = float(values.min()), float(values.max())
    if lowest > 0 and highest / lowest > 20:
        from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

        axes.set_yscale("log")
        subs = (1.0, 2.0, 5.0) if highest / lowest < 1000 else (1.0,)
        axes.yaxis.set_major_locator(LogLocator(subs=subs))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.set_ylabel(f"{axes.get_ylabel()}, log scale")
        return
    later = values[steps > 0.02 * steps.max()]
    if not len(later) or highest - later.max() <= 0.35 * (later.max() - lowest):
        return
    span = float(later.max()) - lowest
    axes.set_ylim(lowest - 0.05 * span, float(later.max()) + 0.16 * span)
    first = int(steps[values.argmax()])
    text = f"from {highest:.3g} at step {first:,}, above the scale"
    place: Any = {"xycoords": "axes fraction", "va": "top", "ha": "right"}
    axes.annotate(text, xy=(0.99, 0.98), **place, fontsize=8.0, color=VERMILLION)


def validation_auc(rows: Sequence[Row], *, best_step: int | None = None) -> str:
    """The retrieval AUC on the validation people against the step, with chance."""
    with style():
        figure, axes = new_axes(2.5)
        steps, values = curve(rows, "validation_auc")
        axes.plot(steps, values, color=INK, lw=1.4, marker="o", ms=3, label="validation AUC")
        axes.axhline(0.5, color=GREY, lw=1.0, ls="--", label="chance")
        _mark_best(axes, best_step)
        axes.set_ylim(min(0.45, *axes.get_ylim()), max(0.6, *axes.get_ylim()))
        axes.set_xlabel("step")
        axes.set_ylabel("AUC, validation people")
        legend(axes)
        label = f"Validation AUC over {len(steps)} evaluations, best {np.max(values):.2f}."
        return to_svg(figure, name="validation-auc", label=label)


def shared_space(brain: np.ndarray, dna: np.ndarray, *, n_lines: int = 25) -> str:
    """A map of the shared space: every person's brain and DNA, lines joining some pairs.

    Args:
        brain: [n, 2] brain embeddings of the test people, projected.
        dna: [n, 2] DNA embeddings of the same people, row for row.
        n_lines: Pairs joined by a line, spread evenly over the rows.
    """
    shown = _spread(len(brain), _MAX_MAP_PEOPLE)
    joined = _spread(len(shown), n_lines)
    brain, dna = brain[shown], dna[shown]
    with style():
        figure, axes = new_axes(3.6)
        for start, end in zip(brain[joined], dna[joined], strict=True):
            axes.plot([start[0], end[0]], [start[1], end[1]], color=INK, lw=0.7, alpha=0.6)
        for points, colour, marker, text in (
            (brain, BRAIN, "o", "brain"),
            (dna, DNA, "^", "DNA"),
        ):
            axes.plot(
                points[:, 0],
                points[:, 1],
                marker,
                color=colour,
                ms=3.4,
                alpha=0.65,
                mew=0,
                label=text,
                rasterized=len(points) > _MAX_VECTOR_MARKS,
            )
        axes.plot([], [], color=INK, lw=0.8, label=f"the same person ({len(joined)} shown)")
        axes.set_xlabel("first principal axis (unitless)")
        axes.set_ylabel("second principal axis (unitless)")
        axes.set_aspect("equal", adjustable="datalim")
        legend(axes)
        label = (
            f"Map of the shared space: brain and DNA of {len(brain)} test people, with lines "
            f"joining the two of {len(joined)} of them."
        )
        return to_svg(figure, name="shared-space", label=label)


def similarity(pairs: np.ndarray, non_pairs: np.ndarray, *, score: str = "similarity") -> str:
    """Overlaid histograms of the scores of true pairs [n] and of non-pairs [m]."""
    low = min(pairs.min(), non_pairs.min())
    high = max(pairs.max(), non_pairs.max())
    n_bins = int(np.clip(4 * len(pairs) ** (1 / 3), 12, 60))
    bins = np.linspace(low, high if high > low else low + 1.0, n_bins + 1)
    with style():
        figure, axes = new_axes(3.6)
        for scores, colour, text in ((non_pairs, GREY, "non-pairs"), (pairs, BLUE, "true pairs")):
            axes.hist(
                scores, bins=bins, density=True, histtype="stepfilled", color=colour, alpha=0.35
            )
            axes.hist(scores, bins=bins, density=True, histtype="step", color=colour, lw=1.2)
            axes.axvline(float(scores.mean()), color=colour, lw=1.2, ls=(0, (4, 2)))
            axes.fill_between(
                [], [], color=colour, alpha=0.5, lw=0, label=f"{text} (n = {len(scores):,})"
            )
        axes.plot([], [], color=INK, lw=1.0, ls=(0, (4, 2)), label="means")
        axes.set_xlabel(score)
        axes.set_ylabel("density")
        legend(axes, n_columns=2)
        label = (
            f"Histograms of similarity: {len(pairs)} true pairs with mean {pairs.mean():.2f}, "
            f"{len(non_pairs)} non-pairs with mean {non_pairs.mean():.2f}."
        )
        return to_svg(figure, name="similarity", label=label)


def rank_curves(ranks: Mapping[str, np.ndarray]) -> str:
    """The share of people whose partner is within the first x of the gallery; area = AUC.

    Args:
        ranks: Direction -> [n], the share of other people whom the partner outranks: 1 is first.
            The bands are pointwise 95% Wilson intervals, people taken as independent.
    """
    grid = np.linspace(0.0, 1.0, 101)
    with style():
        figure, axes = new_axes(3.3)
        for direction, values in ranks.items():
            share = np.searchsorted(np.sort(1.0 - values), grid + 1e-12, side="right") / len(values)
            low, high = wilson(share, len(values))
            colour = DIRECTION_COLOURS[direction]
            axes.fill_between(grid, low, high, color=colour, alpha=0.15, lw=0)
            axes.plot(grid, share, color=colour, lw=1.5, label=DIRECTION_NAMES[direction])
        axes.plot([0, 1], [0, 1], color=GREY, lw=1.0, ls="--", label="chance")
        axes.set_xlim(0, 1)
        axes.set_ylim(0, 1.01)
        percent(axes.xaxis)
        percent(axes.yaxis)
        axes.set_xlabel("share of the gallery looked at, best first")
        axes.set_ylabel("partners found")
        legend(axes)
        label = "Share of partners found against the share of the gallery looked at, with chance."
        return to_svg(figure, name="rank-curves", label=label)


def recall_bars(retrieval: Row, ks: Sequence[int]) -> str:
    """Recall at k in both directions with 95% intervals, chance and, where known, the ceiling."""
    rows = {name: retrieval[name] for name in DIRECTIONS if retrieval.get(name)}
    with style():
        figure, axes = new_axes(3.3)
        ceilings = False
        for place, (direction, row) in enumerate(rows.items()):
            x = np.arange(len(ks)) + (place - (len(rows) - 1) / 2) * 0.36
            value = np.array([number(row, f"recall_at_{k}") for k in ks])
            bounds = np.array([recall_interval(row, k) for k in ks])
            error = np.abs(bounds - value[:, None]).T
            colour = DIRECTION_COLOURS[direction]
            axes.bar(x, value, 0.32, color=colour, alpha=0.8, label=DIRECTION_NAMES[direction])
            axes.errorbar(x, value, error, fmt="none", ecolor=INK, elinewidth=0.9)
            chance = [number(row, f"recall_at_{k}_chance") for k in ks]
            axes.plot(
                x, chance, "_", color=INK, ms=15, mew=1.6, label="chance" if not place else None
            )
            ceiling = [attainable(row, f"recall_at_{k}") for k in ks]
            if np.isfinite(ceiling).any():
                axes.plot(
                    x,
                    ceiling,
                    "_",
                    color=CEILING,
                    ms=15,
                    mew=2.2,
                    label=None if ceilings else "attainable",
                )
                ceilings = True
        axes.set_xticks(range(len(ks)), [f"first {k}" if k > 1 else "first" for k in ks])
        axes.set_ylim(0, None)
        percent(axes.yaxis)
        axes.set_xlabel("partner is among the")
        axes.set_ylabel("people")
        legend(axes, n_columns=2, first=list(DIRECTION_NAMES.values()))
        label = "Recall at " + ", ".join(map(str, ks)) + " in each direction, with chance."
        return to_svg(figure, name="recall", label=label)


def gauge(row: Row, *, label: str, colour: str = INK, low: float = 0.4) -> str:
    """A small scale from `low` to 1 with the AUC, its interval, chance and the ceiling."""
    width, middle = 240.0, 13.0

    def x(value: float) -> float:
        return round(6 + (width - 12) * (min(max(value, low), 1.0) - low) / (1.0 - low), 1)

    left, right = bar_ends(row)
    parts = [
        f'<line x1="6" x2="{width - 6}" y1="{middle}" y2="{middle}" stroke="#d5d5d5"/>',
        f'<path d="M{x(0.5)} 3v20" stroke="{GREY}" stroke-dasharray="3 2"/>',
        f'<text x="{x(0.5)}" y="35" text-anchor="middle">0.5</text>',
        f'<text x="{width}" y="35" text-anchor="end">1</text>',
    ]
    if math.isfinite(from_bold := number(row, "attainable_from_bold")):
        parts.append(f'<path d="M{x(from_bold)} 5v16" stroke="{CEILING}" stroke-width="3"/>')
    if math.isfinite(ceiling := attainable(row)):
        parts.append(
            f'<path d="M{x(ceiling)} 7l6 6l-6 6l-6-6z" fill="#fff" stroke="{CEILING}" '
            'stroke-width="2"/>'
        )
    if math.isfinite(left + right):
        parts.append(
            f'<line x1="{x(left)}" x2="{x(right)}" y1="{middle}" y2="{middle}" '
            f'stroke="{colour}" stroke-width="4"/>'
        )
    parts.append(f'<circle cx="{x(row["auc"])}" cy="{middle}" r="6" fill="{colour}"/>')
    return (
        f'<svg class="gauge" viewBox="0 0 {width:.0f} 37" role="img" '
        f'aria-label="{escape(label)}">{"".join(parts)}</svg>'
    )


def wilson(share: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """The 95% Wilson score interval of shares out of n (Wilson 1927, JASA 22, 209)."""
    z = 1.96
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * np.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return np.clip(centre - half, 0, 1), np.clip(centre + half, 0, 1)


def recall_interval(row: Row, k: int) -> tuple[float, float]:
    """The row's own interval of recall at k, or Wilson's over the people of the gallery."""
    low, high = number(row, f"recall_at_{k}_ci_low"), number(row, f"recall_at_{k}_ci_high")
    n = int(number(row, "n_queries", number(row, "n_gallery", 0.0)))
    value = number(row, f"recall_at_{k}")
    if math.isfinite(low + high) or n < 1 or math.isnan(value):
        return low, high
    lower, upper = wilson(np.array([value]), n)
    return float(lower[0]), float(upper[0])


def curve(rows: Sequence[Row], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of the rows that have `key`; long curves become means of blocks."""
    points = np.array(
        [(row["step"], number(row, key)) for row in rows if math.isfinite(number(row, key))]
    ).reshape(-1, 2)
    if len(points) > _MAX_LINE_POINTS:
        blocks = np.array_split(points, _MAX_LINE_POINTS)
        points = np.array([block.mean(axis=0) for block in blocks])
    return points[:, 0], points[:, 1]


def _spread(n: int, limit: int) -> np.ndarray:
    return np.unique(np.linspace(0, n - 1, min(n, limit)).astype(np.int64)) if n else np.arange(0)


def _mark_best(axes: "Axes", best_step: int | None) -> None:
    if best_step is not None:
        axes.axvline(best_step, color=INK, lw=0.8, ls=":", label=f"kept (step {best_step:,})")
