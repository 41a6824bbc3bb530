"""Figures of an attribution: bars of what each unit is worth, and parcels on a glass brain.

Shape legend: p parcels, u units.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from brainfusion.eval.report.drawing import BLUE, GREY, INK, new_axes, style, to_svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Row = Mapping[str, Any]

# (title, horizontal axis, vertical axis, labels of the left and right end)
_VIEWS = (
    ("from the left", 1, 2, ("P", "A")),
    ("from the front", 0, 2, ("L", "R")),
    ("from above", 0, 1, ("L", "R")),
)
_PAD_MM = 9.0


def drops(rows: Sequence[Row], *, name: str, label: str, measure: str = "AUC") -> str:
    """What hiding each unit costs, with intervals; units that survive the correction are filled.

    Args:
        rows: Of `attribution.json`, the largest drop first.
        name: Unique in the page.
        label: What the figure shows, for people who cannot see it.
        measure: What is lost.
    """
    with style():
        figure, axes = new_axes(0.6 + 0.21 * len(rows))
        for place, row in enumerate(rows):
            sure = row["q_value"] < 0.05 and row["drop"] > 0
            axes.plot([row["ci_low"], row["ci_high"]], [place, place], color=INK, lw=0.9)
            axes.plot(
                row["drop"],
                place,
                marker="o",
                ms=5,
                color=BLUE,
                mfc=BLUE if sure else "white",
                mew=1.1,
            )
        axes.axvline(0, color=GREY, lw=1.0, ls="--")
        axes.set_yticks(range(len(rows)), [str(row["unit"]) for row in rows], parse_math=False)
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.locator_params(axis="x", nbins=6)
        axes.set_xlabel(f"{measure} lost without it (filled: FDR below 5%)")
        return to_svg(figure, name=name, label=label)


def glass_brain(
    xyz_mm: np.ndarray, values: np.ndarray, sure: np.ndarray, *, name: str, label: str
) -> str:
    """Parcels at their centroids in three projections, sized by a value, coloured where it is sure.

    The outline is that of all centroids, a parcel's breadth further out: no template is needed, and
    any atlas gets its own.

    Args:
        xyz_mm: [p, 3] MNI millimetres.
        values: [p]; what is below 0 is drawn as small as 0.
        sure: bool [p]; the others are grey.
        name: Unique in the page.
        label: What the figure shows, for people who cannot see it.
    """
    from matplotlib.figure import Figure

    lost = np.maximum(values, 0.0)
    strongest = float(lost.max()) or 1.0
    order = np.lexsort((lost, sure))
    with style():
        figure = Figure(figsize=(6.4, 2.4), layout="constrained")
        for axes, (title, i, j, ends) in zip(figure.subplots(1, 3), _VIEWS, strict=True):
            _outline(axes, xyz_mm[:, [i, j]])
            share = lost[order] / strongest
            axes.scatter(
                xyz_mm[order, i],
                xyz_mm[order, j],
                s=4 + 60 * share,
                c=np.where(sure[order], BLUE, GREY),
                alpha=np.where(sure[order], 0.25 + 0.65 * share, 0.35),
                linewidths=0,
            )
            axes.set_title(title)
            axes.set_aspect("equal")
            axes.set_axis_off()
            low, high = axes.get_xlim()
            for x, text in ((low, ends[0]), (high, ends[1])):
                axes.annotate(text, (x, axes.get_ylim()[0]), color=GREY, fontsize=8, ha="center")
        return to_svg(figure, name=name, label=label)


def _outline(axes: "Axes", points: np.ndarray) -> None:
    """The hull of discs around the points."""
    from scipy.spatial import ConvexHull

    angle = np.linspace(0, 2 * np.pi, 24, endpoint=False)
    ring = _PAD_MM * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    discs = (points[:, None] + ring).reshape(-1, 2)
    hull = discs[ConvexHull(discs).vertices]
    axes.fill(*hull.T, facecolor="#f2f3f4", edgecolor="#9aa0a6", lw=1.0, zorder=0)
