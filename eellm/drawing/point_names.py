"""Names beside points of a figure, where they cover neither points nor lines nor each other.

Where there is room is known only when the figure has its layout: `name_points` and `name_point` write names above their points,
`place_names` moves them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from eellm.drawing.palette import Ink

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.text import Text

NEAR = 0.04
"""Share of a plot's width within which points count as standing upon each other."""
NAME = "name of a point"
DISTANCES = (5, 8, 12, 17, 23)
"""From a point to its name, in points of 1/72 inch."""
DIRECTIONS = ((0, 1), (1, 1), (1, 0), (-1, 1), (-1, 0), (1, -1), (0, -1), (-1, -1))
OUTSIDE = 1000.0
"""What it costs to lie outside the axes; a covered point or piece of a line costs 1, another name OVER_NAME."""
OVER_NAME = 50.0
STEP = 2.0
"""Pixels between the places of a line that are looked at."""
Point = tuple[float, float, str]
"""x, y and name."""


def span_of(points: Sequence[Point]) -> tuple[float, float]:
    """Width and height of what is drawn."""
    xs, ys = [point[0] for point in points], [point[1] for point in points]
    return max(xs) - min(xs), max(ys) - min(ys)


def name_points(axes: Axes, ink: Ink, points: Sequence[Point], span: tuple[float, float] | None = None) -> None:
    """Write the names of points; those that (nearly) coincide share one. `span`: that of all points in the plot, where these are
    not all."""
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
        name_point(axes, ink, (x, y, ", ".join(name for _, _, name in group)))


def name_point(axes: Axes, ink: Ink, point: Point) -> None:
    axes.annotate(
        point[2], point[:2], xytext=(0, DISTANCES[0]), textcoords="offset points", ha="center", va="bottom", fontsize=8,
        color=ink.text, zorder=6, gid=NAME,
    )  # fmt: skip


def place_names(figure: Figure) -> None:
    """Move the names of points to where they cover least; the nearest of such places, above where all are equal."""
    named = [(axes, [text for text in axes.texts if text.get_gid() == NAME]) for axes in figure.axes]
    if not any(names for _, names in named):
        return
    figure.draw_without_rendering()
    for axes, names in named:
        covered = list(_covered(axes)) if names else []
        placed: list[Text] = []
        for name in names:
            name.set_gid(None)
            places = [(distance, direction) for distance in DISTANCES for direction in DIRECTIONS]
            costs = [_cost(axes, name, place, covered, placed) for place in places]
            _move(name, *places[costs.index(min(costs))])
            placed.append(name)


def _move(name: Text, distance: float, direction: tuple[int, int]) -> None:
    right, up = direction
    aslant = 0.8 if right and up else 1.0
    name.set_position((right * distance * aslant, up * distance * aslant))
    name.set(ha=("center", "left", "right")[right], va=("center", "bottom", "top")[up])


def _cost(
    axes: Axes,
    name: Text,
    place: tuple[float, tuple[int, int]],
    covered: Sequence[tuple[np.ndarray, float]],
    placed: Sequence[Text],
) -> float:
    _move(name, *place)
    box, room = name.get_window_extent(), axes.get_window_extent()
    cost = 0.0 if room.contains(box.x0, box.y0) and room.contains(box.x1, box.y1) else OUTSIDE
    for points, radius in covered:
        wide = box.padded(radius)
        inside = (points > (wide.x0, wide.y0)) & (points < (wide.x1, wide.y1))
        cost += float(inside.all(axis=1).sum())
    return cost + OVER_NAME * sum(box.padded(1).overlaps(other.get_window_extent()) for other in placed)


def _covered(axes: Axes) -> Iterator[tuple[np.ndarray, float]]:
    """Places in pixels that names should not cover, (n, 2), and how far around them."""
    import numpy as np

    pixels = axes.figure.dpi / 72
    for line in axes.lines:
        points = line.get_transform().transform(np.asarray(line.get_xydata(), dtype=float))
        points = points[np.isfinite(points).all(axis=1)]
        if line.get_marker() not in ("None", "none", "", " ", None):
            yield points, pixels * (line.get_markersize() / 2 + 0.5)
        if _is_drawn(line):
            yield _along(points), pixels * 0.5 * line.get_linewidth()
    for collection in axes.collections:
        for path in collection.get_paths():
            points = collection.get_transform().transform(path.vertices)
            yield _along(points[np.isfinite(points).all(axis=1)]), pixels


def _is_drawn(line: Line2D) -> bool:
    return line.get_linestyle() not in ("None", "none", "", " ")


def _along(points: np.ndarray) -> np.ndarray:
    """Places STEP apart on the lines between points."""
    import numpy as np

    pieces = [points[:1]]
    for start, end in itertools.pairwise(points):
        count = max(1, math.ceil(float(np.hypot(*(end - start))) / STEP))
        pieces.append(start + (end - start) * np.linspace(0, 1, count + 1)[1:, None])
    return np.concatenate(pieces)
