"""A timeline as a Gantt chart: what the drawings on paper and on the page share, and the one on paper.

Kinds differ by hatching and letter besides colour. A long steady phase is left out in the middle: it repeats itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from eellm.drawing.number_text import binary_bytes, percent, time_text
from eellm.drawing.palette import paper_ink, pass_colours
from eellm.metrics.names import FINAL
from eellm.schedule.costs import LAYERS, WEIGHTS
from eellm.schedule.program import FORWARDS, Kind
from eellm.schedule.simulate import Box, Timeline

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

KINDS = {
    "forward": "forward",
    "forward_only": "forward, not back-propagated",
    "backward": "backward",
    "weight": "gradients of weights",
    "exit": "exit",
    "final": "final head",
}
"""Kinds of bars, and what the legend calls them."""
HATCHES = {"forward": "", "forward_only": "---", "backward": "////", "weight": "\\\\\\\\", "exit": "....", "final": "xxxx"}
BREAK = 0.02
"""Width of the gap where a steady phase is left out, as a share of what is drawn."""


@dataclass(frozen=True)
class Bar:
    """A part of a box. `left` and `width` are times on the axis of the drawing."""

    box: Box
    kind: str
    name: str
    left: float
    width: float
    start: float
    """When it really starts."""


@dataclass(frozen=True)
class Cut:
    """Times between `begin` and `end` are left out; `gap` stands for them."""

    begin: float
    end: float
    gap: float

    def place(self, time: float) -> float | None:
        """Where on the axis a time is drawn, if it is."""
        if time <= self.begin:
            return time
        return None if time < self.end else time - self.end + self.begin + self.gap


@dataclass(frozen=True)
class Chart:
    """A timeline ready to be drawn. `seconds`: times are seconds; otherwise they are units."""

    timeline: Timeline
    title: str
    seconds: bool
    bars: tuple[Bar, ...]
    width: float
    cut: Cut | None

    @classmethod
    def of(cls, timeline: Timeline, title: str, seconds: bool = True) -> Chart:
        cut = _cut(timeline)
        bars = tuple(bar for boxes in timeline.ranks for box in boxes for bar in _bars(box, cut))
        width = timeline.time if cut is None else cut.place(timeline.time) or 0.0
        return cls(timeline, title, seconds, bars, width, cut)

    @property
    def kinds(self) -> list[str]:
        """Those that occur, in the legend's order."""
        there = {bar.kind for bar in self.bars}
        return [kind for kind in KINDS if kind in there]

    def time(self, value: float) -> str:
        return time_text(value) if self.seconds else f"{value:g} units"

    @property
    def summary(self) -> str:
        words = f"{self.time(self.timeline.time)}, bubble {percent(self.timeline.bubble, 1)}"
        peak = max(self.timeline.peak_bytes)
        return f"{words}, activations up to {binary_bytes(peak)} a rank" if peak else words

    def tip(self, bar: Bar) -> str:
        """What a bar says when it is pointed at."""
        box, program = bar.box, self.timeline.program
        place = f"rank {box.rank}, stage {box.stage}" if program.num_chunks > 1 else f"stage {box.stage}"
        name = KINDS[bar.kind] if bar.name in (LAYERS, WEIGHTS) else f"{bar.name} in the {_direction(box)} pass"
        lines = [f"microbatch {box.action.microbatch}: {name}", place, f"start {self.time(bar.start)}"]
        lines.append(f"length {self.time(bar.width)}")
        return "\n".join(lines + ([f"activations {binary_bytes(box.memory)}"] if box.memory else []))


def _direction(box: Box) -> str:
    return "forward" if box.action.kind in FORWARDS else "backward"


def _bars(box: Box, cut: Cut | None) -> list[Bar]:
    bars, start = [], box.start
    for name, length in box.parts:
        left = start if cut is None else cut.place(start)
        whole = cut is None or (cut.place(start + length) is not None and not start < cut.begin < start + length)
        if left is not None and whole and length > 0:
            bars.append(Bar(box, _kind(box, name), name, left, length, start))
        start += length
    return bars


def _kind(box: Box, part: str) -> str:
    if part not in (LAYERS, WEIGHTS):
        return "final" if part == FINAL else "exit"
    names = {Kind.FORWARD_ONLY: "forward_only", Kind.BACKWARD: "backward", Kind.WEIGHT: "weight"}
    return names.get(box.action.kind, "forward")


def _cut(timeline: Timeline) -> Cut | None:
    """Leave out the middle where more than a few rounds of the pipeline stand on either side."""
    program = timeline.program
    rounds = 2 * program.pp + 8
    if program.num_microbatches <= 3 * rounds:
        return None
    kept = timeline.time * rounds / program.num_microbatches
    return Cut(kept, timeline.time - kept, BREAK * 2 * kept)


def shared_width(charts: list[Chart]) -> float | None:
    """Of a time axis for all charts; None where steady phases are left out: equal lengths are not equal times there."""
    return max(chart.width for chart in charts) if all(chart.cut is None for chart in charts) else None


def save_png(charts: list[Chart], path: Path) -> None:
    figure_of(charts).savefig(path, dpi=160)


def figure_of(charts: list[Chart]) -> Figure:
    """Charts below each other, on one time axis unless steady phases are left out, on white."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    ink, colours = paper_ink([FINAL]), pass_colours()
    heights = [chart.timeline.program.pp for chart in charts]
    figure = Figure(figsize=(11, 0.9 + sum(0.34 * height + 0.75 for height in heights)), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    rows = figure.subplots(len(charts), 1, height_ratios=[height + 1 for height in heights], squeeze=False)
    widest = shared_width(charts)
    for axes, chart in zip(rows[:, 0], charts, strict=True):
        _draw(axes, chart, colours, ink.muted)
        axes.set_xlim(0, widest or chart.width)
        axes.set_title(f"{chart.title}: {chart.summary}", fontsize=9.5, loc="left", color=ink.text)
    rows[-1, 0].set_xlabel("seconds" if charts[-1].seconds else "units", fontsize=9, color=ink.muted)
    kinds = [kind for kind in KINDS if any(kind in chart.kinds for chart in charts)]
    patches = [Patch(facecolor=colours[kind], hatch=HATCHES[kind], edgecolor="#00000088", label=KINDS[kind]) for kind in kinds]
    figure.legend(handles=patches, loc="outside lower left", ncols=len(kinds), frameon=False, fontsize=8.5, labelcolor=ink.text)
    return figure


def _draw(axes: Axes, chart: Chart, colours: dict[str, str], muted: str) -> None:
    for kind in chart.kinds:
        own = [bar for bar in chart.bars if bar.kind == kind]
        axes.barh(
            [bar.box.rank for bar in own], [bar.width for bar in own], left=[bar.left for bar in own], height=0.86,
            color=colours[kind], hatch=HATCHES[kind], edgecolor="#00000070", linewidth=0.4,
        )  # fmt: skip
    for bar in chart.bars:
        text = str(bar.box.action.microbatch)
        if bar.name in (LAYERS, WEIGHTS) and bar.width > 0.0085 * len(text) * chart.width:
            box = {"boxstyle": "square,pad=0.08", "facecolor": colours[bar.kind], "edgecolor": "none"}
            middle = bar.left + bar.width / 2
            axes.text(middle, bar.box.rank, text, ha="center", va="center", fontsize=6.5, bbox=box, clip_on=True)
    if chart.cut is not None:
        _draw_break(axes, chart, chart.cut, muted)
    axes.set_yticks(range(chart.timeline.program.pp), [f"rank {rank}" for rank in range(chart.timeline.program.pp)])
    axes.set_ylim(chart.timeline.program.pp - 0.5, -0.5)
    axes.tick_params(colors=muted, labelsize=8, length=2)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)


def _draw_break(axes: Axes, chart: Chart, cut: Cut, muted: str) -> None:
    """The steady phase that is left out, and times behind it as they are."""
    middle = cut.begin + cut.gap / 2
    axes.text(
        middle, (chart.timeline.program.pp - 1) / 2, "\N{MIDLINE HORIZONTAL ELLIPSIS}", ha="center", va="center", color=muted
    )
    shift = cut.end - cut.begin - cut.gap
    axes.xaxis.set_major_formatter(lambda value, _: f"{value if value <= cut.begin else value + shift:.4g}")
