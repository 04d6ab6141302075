"""Figures of a study: panels of curves, each point a mean over seeds with its spread."""

from __future__ import annotations

from collections.abc import Callable, Mapping
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


def mean_curves(
    axes: Axes,
    ink: Ink,
    table: pd.DataFrame,
    x: str,
    by: str,
    names: Mapping[Any, str],
    *,
    beside: bool = True,
    joined: bool = True,
) -> None:
    """One curve for every value of `by`: `mean` over `x`, with bars of half width `std`, the columns of `eellm.analysis.spread`.

    `names`: value -> what the legend says; its place there gives a curve its colour, dash and marker, the same in all panels.
    `beside`: curves are moved a little to the side, so that bars at the same `x` stay apart: not where `x` was measured, which
    would no longer be true. `joined`: points are joined by lines: not where `x` has no order. Raises ValueError for a value of
    `by` without a name, which would be missing from the figure.
    """
    unnamed = sorted(set(table[by]) - set(names), key=str)
    if unnamed:
        raise ValueError(f"{by}={', '.join(map(str, unnamed))} has no name: there are names for {', '.join(map(str, names))}")
    side = BESIDE * (table[x].max() - table[x].min()) if beside else 0.0
    for index, (value, name) in enumerate(names.items()):
        rows = table[table[by] == value]
        places = rows[x] + side * (index - (len(names) - 1) / 2)
        style = {**mode_style(index, ink), "color": run_colour(index, ink.text), "label": name}
        line_with_bars(axes, places, rows["mean"], rows["std"].fillna(0.0), style | ({} if joined else {"linestyle": "none"}))
