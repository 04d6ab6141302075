"""What all figures are drawn with: frames, lines that can be told apart in grey, names of points that do not cover each other.

Nothing global is touched: figures are made without pyplot, on the Agg canvas.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from eellm.metrics.names import FINAL
from eellm.report.number_text import percent
from eellm.report.palette import Ink, mode_colour
from eellm.report.run_record import Curve

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SIZE = (4.9, 3.2)
DASHES: list[Any] = ["-", (0, (5, 1.5)), (0, (1.2, 1.2)), (0, (6, 1.5, 1.2, 1.5)), (0, (3, 1, 1, 1, 1, 1))]
MARKERS = "osD^vPX*<>"
MODE_MARKERS = "os^vPX"
NEAR = 0.04
"""Share of a plot's width within which points count as standing upon each other."""
Point = tuple[float, float, str]
"""x, y and name."""
MOST_POINTS = 600
PANEL_COLUMNS, PANEL_SIZE = 3, (3.0, 2.6)
START_SHARE = 0.08
"""Share of a run whose fast first fall may leave the top of a loss plot, so that the end is legible."""


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
        figure.legend(
            handles, labels, loc="outside lower left", ncols=_legend_columns(labels, figure.get_figwidth()), frameon=False,
            fontsize=8, labelcolor=ink.text, handlelength=2.6,
        )  # fmt: skip
        return figure


def _legend_columns(labels: Sequence[str], width: float) -> int:
    """How many columns of a legend fit into `width` inches, at most five. Entries go down them, the first are longer."""
    for columns in range(min(5, len(labels)), 1, -1):
        rows, longer = divmod(len(labels), columns)
        ends = [(column + 1) * rows + min(column + 1, longer) for column in range(columns)]
        longest = [max(map(len, labels[start:end])) for start, end in zip([0, *ends], ends, strict=False)]
        if sum(0.07 * length + 0.55 for length in longest) <= width:
            return columns
    return 1


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
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda value, _: percent(value))


def span_of(points: Sequence[Point]) -> tuple[float, float]:
    """Width and height of what is drawn."""
    xs, ys = [point[0] for point in points], [point[1] for point in points]
    return max(xs) - min(xs), max(ys) - min(ys)


def name_points(axes: Axes, ink: Ink, points: Sequence[Point], span: tuple[float, float] | None = None) -> None:
    """Write names above points, beside them where they stand upon each other; points that (nearly) coincide share one.

    `span`: that of all points in the plot, where these are not all.
    """
    width, height = (extent or 1.0 for extent in span or span_of(points))
    upright = len(points) > 1 and span_of(points)[0] < NEAR * width
    groups: list[list[Point]] = []
    for point in sorted(points):
        last = groups[-1][-1] if groups else (math.inf, math.inf, "")
        if abs(point[0] - last[0]) < NEAR * width and abs(point[1] - last[1]) < (0.06 if upright else 0.12) * height:
            groups[-1].append(point)
        else:
            groups.append([point])
    for group in groups:
        x, y, _ = group[len(group) // 2] if upright else max(group, key=lambda point: point[1])
        name_point(axes, ink, (x, y, ", ".join(name for _, _, name in group)), "right" if upright else "above")


def name_point(axes: Axes, ink: Ink, point: Point, where: Literal["above", "left", "right"]) -> None:
    offset, align = {"above": ((0, 7), "center"), "left": ((-8, 5), "right"), "right": ((8, -3), "left")}[where]
    name, place = point[2], point[:2]
    axes.annotate(
        name, place, xytext=offset, textcoords="offset points", ha=align, fontsize=8, color=ink.text, zorder=5
    )  # fmt: skip


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
    axes.legend(
        loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=5, borderaxespad=0.2, frameon=False, fontsize=7.5,
        labelcolor=ink.text, handlelength=2.3, columnspacing=1.1, handletextpad=0.5,
    )  # fmt: skip
