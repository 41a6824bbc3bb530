"""How the report's figures are drawn: one style, Okabe-Ito colours, legends, SVG text.

matplotlib is loaded on first use, and only its Figure: nothing global is changed for good.
"""

import io
import re
import warnings
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito (2008), the colours that the common forms of colour blindness keep apart.
BLUE, VERMILLION, GREEN, ORANGE = "#0072B2", "#D55E00", "#009E73", "#E69F00"
SKY, PURPLE, INK, GREY = "#56B4E9", "#CC79A7", "#222222", "#8a8a8a"
BRAIN, DNA, CEILING = BLUE, VERMILLION, GREEN
DIRECTION_COLOURS = {"brain_to_dna": BRAIN, "dna_to_brain": DNA}

_STYLE: Any = {
    "svg.fonttype": "none",
    "font.size": 9.0,
    "axes.labelsize": 9.0,
    "axes.titlesize": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.7,
    "axes.edgecolor": "#555555",
    "axes.labelcolor": INK,
    "xtick.color": "#444444",
    "ytick.color": "#444444",
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "legend.handlelength": 1.4,
    "legend.borderaxespad": 0.0,
    "figure.dpi": 72.0,
}


def style() -> Any:
    """A context in which figures are made."""
    import matplotlib as mpl

    return mpl.rc_context(dict(_STYLE))


def new_axes(height_in: float) -> "tuple[Figure, Axes]":
    """One pair of axes, 4.6 inches wide."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6, height_in), layout="constrained")
    return figure, figure.subplots()


def percent(axis: Any) -> None:
    """Shares as percentages."""
    from matplotlib.ticker import PercentFormatter

    axis.set_major_formatter(PercentFormatter(xmax=1.0, decimals=None))


def legend(axes: "Axes", *, n_columns: int = 3, first: Sequence[str] = ()) -> None:
    """Above the data, so that it never covers any; `first` names what comes first."""
    figure, (handles, labels) = axes.get_figure(root=True), axes.get_legend_handles_labels()
    assert figure is not None
    order = list(range(len(labels)))
    order.sort(key=lambda i: labels[i] not in first)
    box = figure.legend(
        [handles[i] for i in order],
        [labels[i] for i in order],
        loc="outside upper left",
        ncols=n_columns,
        columnspacing=1.2,
    )
    for text in box.get_texts():
        text.set_parse_math(False)


def to_svg(figure: "Figure", *, name: str, label: str) -> str:
    """The figure as one `<svg>` element: no prolog, no metadata, ids unique in a page."""
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    name, buffer = re.sub(r"\W+", "-", name), io.StringIO()
    with mpl.rc_context({"svg.hashsalt": name}), warnings.catch_warnings():
        # Text stays text, so a letter that matplotlib's own font lacks is drawn by the browser's.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        FigureCanvasSVG(figure)
        figure.savefig(buffer, format="svg", dpi=144, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    box = re.search(r'viewBox="([^"]+)"', text)
    assert box is not None
    text = re.sub(
        r"<svg[^>]*>",
        f'<svg class="figure" viewBox="{box[1]}" role="img" aria-label="{escape(label)}">',
        text,
        count=1,
    )
    text = text.replace("xlink:href", "href")
    text = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', text)
    text = re.sub(r'(href="#|url\(#)', rf"\1{name}-", text)
    text = re.sub(r"font: ([^;\"]*?)([\d.]+px)[^;\"]*", r"font: \1\2 sans-serif", text)
    text = re.sub(r"font-family: [^;\"]*", "font-family: sans-serif", text)
    return re.sub(r"\n\s*", "\n", text).strip()
