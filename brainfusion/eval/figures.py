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

from brainfusion.eval.drawing import (
    BLUE,
    BRAIN,
    CEILING,
    DNA,
    GREEN,
    GREY,
    INK,
    ORANGE,
    PURPLE,
    SKY,
    VERMILLION,
    legend,
    new_axes,
    percent,
    row_labels,
    style,
    to_svg,
)
from brainfusion.eval.verdict import (
    CONTROL_LIMIT,
    DIRECTIONS,
    attainable,
    base_name,
    direction_of,
    is_confounds,
    is_residualised,
    number,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Row = Mapping[str, Any]

DIRECTION_COLOURS = {"brain_to_dna": BRAIN, "dna_to_brain": DNA}
DIRECTION_NAMES = {"brain_to_dna": "brain to DNA", "dna_to_brain": "DNA to brain"}
MARKERS = "osD^vP"

_MAX_LINE_POINTS = 300
_MAX_MAP_PEOPLE = 500
_MAX_VECTOR_MARKS = 400


def losses(rows: Sequence[Row], *, name: str, label: str, best_step: int | None = None) -> str:
    """Training and validation loss against the step; with `log_n` in the rows, that line as well.

    Args:
        rows: Rows of a `metrics.jsonl`; rows without a key are left out of its curve.
        name: Unique in the page; part of the element ids.
        label: What the figure shows, for people who cannot see it.
        best_step: Where the model was kept, marked by a vertical line.
    """
    with style():
        figure, axes = new_axes(2.5)
        for key, text, colour, width in (
            ("loss", "training", BLUE, 1.0),
            ("validation_loss", "validation", VERMILLION, 1.6),
        ):
            steps, values = _curve(rows, key)
            if len(steps):
                marker = "o" if len(steps) <= 12 else None
                axes.plot(steps, values, color=colour, lw=width, label=text, marker=marker, ms=3)
        steps, values = _curve(rows, "log_n")
        if len(steps):
            axes.plot(steps, values, color=GREY, lw=1.0, ls="--", label="log N (guessing)")
        _mark_best(axes, best_step)
        axes.set_xlabel("step")
        axes.set_ylabel("loss" if not len(steps) else "loss (nats)")
        legend(axes)
        return to_svg(figure, name=name, label=label)


def validation_auc(rows: Sequence[Row], *, best_step: int | None = None) -> str:
    """The retrieval AUC on the validation people against the step, with chance."""
    with style():
        figure, axes = new_axes(2.5)
        steps, values = _curve(rows, "validation_auc")
        axes.plot(steps, values, color=INK, lw=1.4, marker="o", ms=3, label="validation AUC")
        axes.axhline(0.5, color=GREY, lw=1.0, ls="--", label="chance")
        _mark_best(axes, best_step)
        axes.set_ylim(min(0.45, *axes.get_ylim()), max(0.6, *axes.get_ylim()))
        axes.set_xlabel("step")
        axes.set_ylabel("AUC, validation people")
        legend(axes)
        label = f"Validation AUC over {len(steps)} evaluations, best {np.max(values):.2f}."
        return to_svg(figure, name="validation-auc", label=label)


def shared_space(brain: np.ndarray, dna: np.ndarray, *, n_lines: int = 40) -> str:
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


def similarity(pairs: np.ndarray, non_pairs: np.ndarray) -> str:
    """Overlaid histograms of the scores of true pairs [n] and of non-pairs [m]."""
    low = min(pairs.min(), non_pairs.min())
    high = max(pairs.max(), non_pairs.max())
    bins = np.linspace(low, high if high > low else low + 1.0, 41)
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
        axes.set_xlabel("similarity in the shared space")
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


def auc_intervals(groups: Sequence[tuple[str, Mapping[str, Sequence[Row]]]]) -> str:
    """Dots with 95% intervals: the AUC of the aligner, baselines, control and strata.

    Args:
        groups: (heading, name -> rows, one a direction or one in all); a row has `auc` and may have
            `direction`, `ci_low`, `ci_high`, `standard_error` (drawn as +-3 of them when there is
            no interval), `attainable` and `attainable_from_bold`.
    """
    lines: list[tuple[str, Sequence[Row]]] = []
    for heading, named in groups:
        lines.append((heading, []))
        lines += named.items()
    with style():
        figure, axes = new_axes(0.75 + 0.26 * len(lines))
        for y, (_, rows) in enumerate(lines):
            for i, row in enumerate(rows):
                _interval_mark(axes, y + 0.26 * (i - (len(rows) - 1) / 2), row)
            for row in rows[:1]:
                for key, marks in _CEILINGS.items():
                    value = attainable(row) if key == "attainable" else number(row, key)
                    if math.isfinite(value):
                        axes.plot([value], [y], **marks)
        every = [row for _, rows in lines for row in rows]
        for direction, marker in _DIRECTION_MARKERS.items():
            if any(direction_of(row) == direction for row in every):
                name, colour = DIRECTION_NAMES[direction], DIRECTION_COLOURS[direction]
                axes.plot([], [], marker, color=colour, ms=5, label=name)
        axes.axvline(0.5, color=GREY, lw=1.0, ls="--", zorder=0, label="chance")
        for key, text in _CEILING_NAMES.items():
            if any(math.isfinite(number(row, key)) for row in every):
                axes.plot([], [], **_CEILINGS[key], label=text)
        row_labels(axes, [(text, not rows) for text, rows in lines])
        axes.set_xlabel("AUC, 95% interval")
        legend(axes, n_columns=2)
        label = "AUC: " + "; ".join(
            f"{text} {' and '.join(format(row['auc'], '.2f') for row in rows)}"
            for text, rows in lines
            if rows
        )
        return to_svg(figure, name="auc", label=label + ". Chance is 0.50.")


_DIRECTION_MARKERS = {"brain_to_dna": "o", "dna_to_brain": "^"}
_CEILINGS: dict[str, dict[str, Any]] = {
    "attainable": {"marker": "D", "color": "white", "mec": CEILING, "mew": 1.5, "ms": 5, "ls": ""},
    "attainable_from_bold": {"marker": "|", "color": CEILING, "mew": 2.0, "ms": 10, "ls": ""},
}
_CEILING_NAMES = {"attainable": "attainable", "attainable_from_bold": "from recordings"}


def _interval_mark(axes: "Axes", y: float, row: Row) -> None:
    direction = direction_of(row)
    colour = DIRECTION_COLOURS[direction] if direction else INK
    low, high = _bounds(row)
    if math.isfinite(low + high):
        axes.plot([low, high], [y, y], color=colour, lw=1.7, solid_capstyle="butt")
    marker = _DIRECTION_MARKERS[direction] if direction else "s"
    axes.plot([row["auc"]], [y], marker, color=colour, ms=5.5, mec="white", mew=0.6)


def probe_forest(rows: Sequence[Row], *, metric: str, title: str, order: Sequence[str]) -> str:
    """A forest plot of probes: targets down, one dot and interval a representation, chance line.

    Args:
        rows: Probe rows of one metric.
        metric: The metric's key, part of the element ids.
        title: The metric in words, with its unit or range; the x label.
        order: Representations (without "residualised") in drawing order, the same in all panels.
            Residualised rows are drawn below their own, hollow.
    """
    targets = list(dict.fromkeys(str(row["target"]) for row in rows))
    colours = representation_colours(order)
    hollow = any(is_residualised(str(row["features"])) for row in rows)
    step = 0.84 / max(len(order), 1)
    with style():
        figure, axes = new_axes(
            1.0 + len(targets) * (0.16 + (0.19 if hollow else 0.15) * len(order))
        )
        for row in rows:
            base, is_hollow = base_name(str(row["features"])), is_residualised(str(row["features"]))
            i, colour = order.index(base), colours[base]
            y = targets.index(str(row["target"])) - 0.42 + step * (i + (0.3 if hollow else 0.5))
            y += 0.38 * step * is_hollow
            low, high = number(row, "ci_low"), number(row, "ci_high")
            if math.isfinite(low + high):
                axes.plot(
                    [low, high],
                    [y, y],
                    color=colour,
                    lw=0.8 if is_hollow else 1.5,
                    solid_capstyle="butt",
                )
            axes.plot(
                [number(row, "value")], [y], MARKERS[i % len(MARKERS)], ms=4 if is_hollow else 5,
                color="white" if is_hollow else colour, mec=colour if is_hollow else "white",
                mew=1.0 if is_hollow else 0.5,
            )  # fmt: skip
        for i, name in enumerate(order):
            axes.plot([], [], MARKERS[i % len(MARKERS)], color=colours[name], ms=5, label=name)
        if hollow:
            text = "hollow: confounds taken out"
            axes.plot([], [], "o", color="white", mec=INK, mew=1.0, ms=4, label=text)
        for value in sorted({number(row, "chance", math.inf) for row in rows} - {math.inf}):
            axes.axvline(value, color=GREY, lw=1.0, ls="--", zorder=0)
        axes.plot([], [], color=GREY, lw=1.0, ls="--", label="chance")
        for line in range(1, len(targets)):
            axes.axhline(line - 0.5, color="#dddddd", lw=0.6, zorder=0)
        row_labels(axes, [(target, False) for target in targets])
        axes.set_ylim(len(targets) - 0.5, -0.5)
        axes.set_xlabel(f"{title}, 95% interval")
        legend(axes, n_columns=2)
        label = f"Forest plot of {title} for {len(targets)} targets: " + ", ".join(order) + "."
        return to_svg(figure, name=f"probes-{metric}", label=label)


def gauge(row: Row, *, label: str, colour: str = INK, low: float = 0.4) -> str:
    """A small scale from `low` to 1 with the AUC, its interval, chance and the ceiling."""
    width, middle = 240.0, 13.0

    def x(value: float) -> float:
        return round(6 + (width - 12) * (min(max(value, low), 1.0) - low) / (1.0 - low), 1)

    left, right = _bounds(row)
    parts = [
        f'<line x1="6" x2="{width - 6}" y1="{middle}" y2="{middle}" stroke="#d5d5d5"/>',
        f'<path d="M{x(0.5)} 3v20" stroke="{GREY}" stroke-dasharray="3 2"/>',
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
        f'<svg class="gauge" viewBox="0 0 {width:.0f} 26" role="img" '
        f'aria-label="{escape(label)}">{"".join(parts)}</svg>'
    )


def representation_colours(order: Sequence[str]) -> dict[str, str]:
    """Grey for the confounds, then Okabe-Ito colours in order."""
    palette = iter([BLUE, VERMILLION, GREEN, ORANGE, PURPLE, SKY, INK] * (1 + len(order)))
    return {name: GREY if is_confounds(name) else next(palette) for name in order}


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


def _bounds(row: Row) -> tuple[float, float]:
    low, high = number(row, "ci_low"), number(row, "ci_high")
    if math.isnan(low + high):
        reach = CONTROL_LIMIT * number(row, "standard_error")
        return row["auc"] - reach, row["auc"] + reach
    return low, high


def _curve(rows: Sequence[Row], key: str) -> tuple[np.ndarray, np.ndarray]:
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
