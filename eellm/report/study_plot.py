"""Figures of a study: panels of curves, each point a mean over seeds with its spread."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from eellm.report.drawing import PanelPlot, line_with_bars, mode_style
from eellm.report.palette import Ink, paper_ink

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BESIDE = 0.015
"""How far neighbouring curves are moved, as a share of the range of x."""
Panel = Callable[["Axes", Ink], None]


def save_panels(path: Path, *panels: Panel) -> None:
    """Draw panels side by side on white; curves are named once, by the labels of the first panel."""
    PanelPlot(path.stem, "", "", panels[0], tuple(panels[1:])).figure(paper_ink(())).savefig(path, dpi=160)


def mean_curves(axes: Axes, ink: Ink, table: pd.DataFrame, x: str, by: str, names: Mapping[Any, str]) -> None:
    """One curve for every value of `by`: `mean` over `x`, with bars of half width `std`, the columns of `eellm.analysis.spread`.

    `names`: value -> what the legend says. A value's place there gives its colour, dash and marker, the same in all panels, and
    moves the curve a little to the side, so that bars at the same `x` stay apart.
    """
    side = BESIDE * (table[x].max() - table[x].min())
    for index, (value, name) in enumerate(names.items()):
        rows = table[table[by] == value]
        places = rows[x] + side * (index - (len(names) - 1) / 2)
        style = {**mode_style(index, ink), "label": name}
        line_with_bars(axes, places, rows["mean"], rows["std"].fillna(0.0), style)
