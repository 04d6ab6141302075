"""Figures of a study: panels of curves, each point a mean over seeds with its spread."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from eellm.drawing.palette import Ink, paper_ink, run_colour
from eellm.drawing.plot import PanelPlot, line_with_bars, mode_style

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BESIDE = 0.015
"""How far neighbouring curves are moved, as a share of the range of x."""
Panel = Callable[["Axes", Ink], None]


def save_panels(path: Path, *panels: Panel, legend: str = "") -> None:
    """Draw panels side by side on white; curves are named once, by the labels of the first panel. `legend`: its title."""
    figure = PanelPlot(path.stem, "", "", panels[0], tuple(panels[1:])).figure(paper_ink(()))
    figure.set_layout_engine("constrained", wspace=0.08)
    if legend:
        (names,) = figure.legends
        names.set_title(legend)
        names.get_title().set_fontsize(8)
        names.set_alignment("left")
    figure.savefig(path, dpi=160)


def mean_curves(axes: Axes, ink: Ink, table: pd.DataFrame, x: str, by: str, names: Mapping[Any, str]) -> None:
    """One curve for every value of `by`: `mean` over `x`, with bars of half width `std`, the columns of `eellm.analysis.spread`.

    `names`: value -> what the legend says; its place there gives a curve its colour, dash and marker, the same in all panels.
    Curves that have the same `x` are moved a little to the side, so that their bars stay apart. Raises ValueError for a value of
    `by` without a name, which would be missing from the figure.
    """
    for rows, moved, style in _curves(table, x, by, names, ink):
        line_with_bars(axes, rows[x] + moved, rows["mean"], rows["std"].fillna(0.0), style)


def mean_points(axes: Axes, ink: Ink, table: pd.DataFrame, x: str, by: str, names: Mapping[Any, str]) -> None:
    """As `mean_curves`, for an `x` without an order: no lines."""
    for rows, moved, style in _curves(table, x, by, names, ink):
        line_with_bars(axes, rows[x] + moved, rows["mean"], rows["std"].fillna(0.0), {**style, "linestyle": "none"})


def measured_curves(axes: Axes, ink: Ink, table: pd.DataFrame, x: str, by: str, names: Mapping[Any, str]) -> None:
    """As `mean_curves`, for an `x` that was measured: it is where it was measured."""
    for rows, _, style in _curves(table, x, by, names, ink):
        line_with_bars(axes, rows[x], rows["mean"], rows["std"].fillna(0.0), style)


def _curves(
    table: pd.DataFrame, x: str, by: str, names: Mapping[Any, str], ink: Ink
) -> Iterator[tuple[pd.DataFrame, float, dict[str, Any]]]:
    """Rows of each curve, how far it is moved, and its style."""
    unnamed = sorted(set(table[by]) - set(names), key=str)
    if unnamed:
        raise ValueError(f"{by}={', '.join(map(str, unnamed))} has no name: there are names for {', '.join(map(str, names))}")
    side = BESIDE * (table[x].max() - table[x].min()) if table[x].duplicated().any() else 0.0
    for index, (value, name) in enumerate(names.items()):
        moved = side * (index - (len(names) - 1) / 2)
        yield table[table[by] == value], moved, {**mode_style(index, ink), "color": run_colour(index, ink.text), "label": name}
