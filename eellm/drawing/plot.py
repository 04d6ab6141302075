"""What all figures are drawn with: frames, lines that can be told apart in grey, legends that fit.

Nothing global is touched: figures are made without pyplot, on the Agg canvas.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from eellm.drawing.palette import Ink, mode_colour
from eellm.drawing.point_names import place_names
from eellm.metrics.names import FINAL

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

SIZE = (4.9, 3.2)
LEGEND_FONT_SIZE, BESIDE_AXES = 7.5, 0.7
"""Points; inches to the left of the axes, for ticks and their title, and a margin to the right."""
DASHES: list[Any] = ["-", (0, (5, 1.5)), (0, (1.2, 1.2)), (0, (6, 1.5, 1.2, 1.5)), (0, (3, 1, 1, 1, 1, 1))]
MARKERS = "osD^vPX*<>"
MODE_MARKERS = "os^vPX"
MOST_POINTS = 600
PANEL_COLUMNS, PANEL_SIZE = 3, (3.0, 2.6)
START_SHARE = 0.08
"""Share of a run whose fast first fall may leave the top of a loss plot, so that the end is legible."""


@dataclass(frozen=True)
class Curve:
    """A metric over optimizer steps."""

    steps: list[float]
    values: list[float]


@dataclass(frozen=True)
class Plot:
    """A figure that can be drawn in any ink: file name, what it shows, and how."""

    name: str
    title: str
    caption: str
    draw: Callable[[Axes, Ink], None]

    def figure(self, ink: Ink) -> Figure:
        figure = _empty_figure(SIZE, ink)
        axes = figure.add_subplot()
        _frame(axes, ink)
        self.draw(axes, ink)
        place_names(figure)
        return figure


@dataclass(frozen=True)
class PanelPlot(Plot):
    """Several drawings side by side; `draw` is the first panel's, `others` are the rest."""

    others: tuple[Callable[[Axes, Ink], None], ...] = ()

    def figure(self, ink: Ink) -> Figure:
        panels = [self.draw, *self.others]
        columns = min(PANEL_COLUMNS, len(panels))
        rows = math.ceil(len(panels) / columns)
        figure = _empty_figure((max(SIZE[0], PANEL_SIZE[0] * columns), 0.6 + PANEL_SIZE[1] * rows), ink)
        for index, draw in enumerate(panels):
            axes = figure.add_subplot(rows, columns, index + 1)
            _frame(axes, ink)
            draw(axes, ink)
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower left", **_legend_style(labels, figure.get_figwidth(), ink))
        place_names(figure)
        return figure


def _legend_style(labels: Sequence[str], width: float, ink: Ink) -> dict[str, Any]:
    """A legend of at most five columns, as many as fit into `width` inches. Entries go down them, the first are longer."""
    lengths = {"handlelength": 2.3, "handletextpad": 0.5, "columnspacing": 1.1}
    beside = sum(lengths.values()) * LEGEND_FONT_SIZE / 72
    widths = [_width(label) + beside for label in labels]
    columns = min(5, len(labels))
    while columns > 1 and _columns_width(widths, columns) > width:
        columns -= 1
    return {"ncols": columns, "fontsize": LEGEND_FONT_SIZE, "frameon": False, "labelcolor": ink.text, **lengths}


def _columns_width(widths: Sequence[float], columns: int) -> float:
    rows, longer = divmod(len(widths), columns)
    ends = [(column + 1) * rows + min(column + 1, longer) for column in range(columns)]
    return sum(max(widths[start:end]) for start, end in zip([0, *ends], ends, strict=False))


def _width(text: str) -> float:
    """Of a legend's text, in inches."""
    from matplotlib.textpath import TextPath

    return TextPath((0, 0), text, size=LEGEND_FONT_SIZE).get_extents().width / 72 if text.strip() else 0.0


def _empty_figure(size: tuple[float, float], ink: Ink) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained", facecolor=ink.background)
    FigureCanvasAgg(figure)
    return figure


def points_of(curve: Curve) -> list[tuple[float, float]]:
    return list(zip(curve.steps, curve.values, strict=True))


def thinned(curve: Curve) -> Curve:
    """At most MOST_POINTS points: the page carries its figures inside."""
    stride = max(1, math.ceil(len(curve.steps) / MOST_POINTS))
    return Curve(curve.steps[::stride], curve.values[::stride])


def legible_range(curves: Sequence[Curve]) -> tuple[float, float]:
    """y limits that leave out the fast fall at the start."""
    last = max(max(curve.steps) for curve in curves)
    values = [
        value for curve in curves for step, value in points_of(curve) if step >= START_SHARE * last and math.isfinite(value)
    ]
    low, high = min(values, default=0.0), max(values, default=1.0)
    margin = 0.06 * (high - low) or 0.1
    return low - margin, high + margin


def line(axes: Axes, curve: Curve, style: dict[str, Any]) -> None:
    spacing = max(1, len(curve.steps) // 8)
    axes.plot(curve.steps, curve.values, markevery=spacing, markersize=4.5, **style)


def line_with_bars(axes: Axes, x: Any, y: Any, error: Any, style: dict[str, Any]) -> None:
    """`error`: half the length of each bar of y, 0 where there is none; all are sequences or pandas columns of one length."""
    axes.errorbar(x, y, yerr=error, **{"linewidth": 1.5, "markersize": 4.5, "elinewidth": 0.9, "capsize": 2.0, **style})


def head_style(index: int, head: str, ink: Ink) -> dict[str, Any]:
    """How a head's line looks: the final head's is full, with dots; `index` counts the heads of the figure."""
    if head == FINAL:
        return {"color": ink.heads[head], "linestyle": "-", "marker": "o"}
    marks = {"linestyle": DASHES[(index + 1) % len(DASHES)], "marker": MARKERS[1 + index % (len(MARKERS) - 1)]}
    return {"color": ink.heads[head], **marks}


def mode_style(index: int, ink: Ink) -> dict[str, Any]:
    """How the line of a way of decoding, or of another setting, looks."""
    return {
        "color": mode_colour(index, ink),
        "linestyle": DASHES[index % len(DASHES)],
        "marker": MODE_MARKERS[index % len(MODE_MARKERS)],
    }


def calibration_frame(axes: Axes, ink: Ink) -> None:
    """What a calibration diagram stands in: confidence over the share that is right, and the dotted line where they agree."""
    axes.plot([0, 1], [0, 1], color=ink.muted, linewidth=1.0, linestyle=(0, (2, 2)))
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    axes.set_xlabel("confidence")
    axes.set_ylabel("share that is right")
    percent_axis(axes.xaxis)
    percent_axis(axes.yaxis)


def percent_axis(axis: Axis) -> None:
    """Ticks of shares as per cent, with as many digits as they need; none above 100 %, where only a margin is."""

    def text(value: float, _: object) -> str:
        shares = [100 * tick for tick in axis.get_majorticklocs()]
        digits = next((digits for digits in range(4) if all(abs(share - round(share, digits)) < 1e-7 for share in shares)), 4)
        return f"{100 * value + 0.0:.{digits}f}%" if value < 1.0001 else ""

    axis.set_major_formatter(text)


def _frame(axes: Axes, ink: Ink) -> None:
    axes.set_facecolor(ink.background)
    axes.grid(True, color=ink.grid, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(ink.muted)
    axes.tick_params(colors=ink.muted, labelsize=8.5, length=3)
    for axis in (axes.xaxis, axes.yaxis):
        axis.label.set_color(ink.muted)
        axis.label.set_fontsize(9)


def legend(axes: Axes, ink: Ink) -> None:
    """Above the axes, no wider than they are."""
    figure, (handles, labels) = axes.get_figure(), axes.get_legend_handles_labels()
    style = _legend_style(labels, figure.get_figwidth() - BESIDE_AXES, ink)
    axes.legend(handles, labels, loc="lower left", bbox_to_anchor=(-0.02, 1.0), borderaxespad=0.2, **style)
