"""The figures of a page of many runs. Runs differ by colour, dash and marker, and keep theirs from figure to figure; what they
are called stands in a key beside the figures, which serves all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import pandas as pd

from eellm.analysis import pareto_front
from eellm.drawing.palette import Ink, run_colour
from eellm.drawing.plot import DASHES, MARKERS, Curve, Plot, calibration_frame, legible_range, line, percent_axis
from eellm.drawing.point_names import name_point
from eellm.metrics.names import FINAL, STEP, TRAIN_LOSS, VAL_LOSS, depth, heads_in
from eellm.report.runs.compared import Line

if TYPE_CHECKING:
    from matplotlib.axes import Axes

HISTORY = [family.format(head="*") for family in (VAL_LOSS, TRAIN_LOSS)]
"""What `loss_plots` may draw."""
MOST_PANELS = 9
MOST_POINTS = 160
"""Points of a curve: there may be many curves, and the page carries them all."""
FEWEST_STEPS = 3
"""Validations from which on they say more than the training loss does."""
LINE_WIDTH = 1.5


def loss_plots(history: pd.DataFrame, lines: Sequence[Line]) -> list[Plot]:
    """Loss of each head over the optimizer steps, a figure a head. `history`: of `eellm.analysis.metric_history`."""
    family = VAL_LOSS
    heads, steps = _heads_and_steps(history, family)
    if steps < FEWEST_STEPS:
        family = TRAIN_LOSS
        heads, steps = _heads_and_steps(history, family)
    if steps < 2:
        return []
    kind = "Validation loss" if family == VAL_LOSS else "Training loss"
    return [
        Plot(f"runs_loss_{head}", f"{kind} of {head}", "", _loss_drawing(_by_run(history, family.format(head=head)), lines))
        for head in _shown_heads(heads)
    ]


def depth_plot(exits: pd.DataFrame, lines: Sequence[Line]) -> Plot | None:
    """Loss of the heads by depth. `exits`: of `eellm.analysis.exit_table`."""
    table = exits.dropna(subset=["loss", "layer"])
    if table.empty or table["layer"].nunique() < 2:
        return None

    def draw(axes: Axes, ink: Ink) -> None:
        for index, own in enumerate(lines):
            means = table[table["run"].isin(own.runs)].groupby("layer")["loss"].mean()
            if not means.empty:
                axes.plot(means.index.tolist(), means.tolist(), markersize=5, **_style(index, ink))
        axes.set_xlabel("layers before the head")
        axes.set_ylabel("nats per token")

    caption = "Loss of every head by its depth, from evaluation, or else the last validation."
    return Plot("runs_depth", "Loss by depth", caption, draw)


def speed_plot(table: pd.DataFrame, lines: Sequence[Line]) -> Plot | None:
    """Speed against quality of all runs. `table`: rows of `eellm.analysis.speed_quality` with early exit."""
    known = table.dropna(subset=["agreement", "speedup"])
    if known.empty:
        return None
    front = pareto_front(known)

    def draw(axes: Axes, ink: Ink) -> None:
        axes.axhline(1.0, color=ink.muted, linewidth=1.0, linestyle=(0, (2, 2)))
        drawn = {run for own in lines for run in own.runs}
        rest = known[~known["run"].isin(drawn)]
        axes.plot(rest["agreement"].tolist(), rest["speedup"].tolist(), ".", color=ink.muted, markersize=4, alpha=0.6)
        for index, own in enumerate(lines):
            rows = known[known["run"].isin(own.runs)]
            if not rows.empty:
                style = {**_style(index, ink), "linestyle": "none", "alpha": 0.85}
                axes.plot(rows["agreement"].tolist(), rows["speedup"].tolist(), markersize=5, **style)
        best = front.sort_values("agreement")
        axes.plot(best["agreement"].tolist(), best["speedup"].tolist(), color=ink.text, linewidth=1.2, zorder=1)
        axes.plot([1.0], [1.0], color=ink.text, marker="D", markersize=7, markerfacecolor=ink.background, zorder=4, clip_on=False)
        name_point(axes, ink, (1.0, 1.0, "full depth"))
        axes.margins(x=0.12, y=0.18)
        axes.set_xlabel("same token as full depth")
        axes.set_ylabel("speed, times full depth")
        percent_axis(axes.xaxis)

    caption = (
        "Every decoding and threshold of every run; the line joins those that no other beats in both; the table below lists "
        "them. Neighbours on it may differ by no more than noise. Both axes are relative to the run's own full depth: a "
        "poor model can agree with itself as well as a good one."
    )
    return Plot("runs_speed", "Speed against quality", caption, draw)


def calibration_plots(table: pd.DataFrame, lines: Sequence[Line]) -> list[Plot]:
    """Reliability diagrams, a figure a head; of a line that is several runs, the first of them. `table`: of
    `eellm.analysis.reliability`."""
    heads = sorted(map(str, table["head"].unique()), key=depth) if len(table) else []
    return [
        Plot(f"runs_calibration_{head}", head, "", _calibration_drawing(table[table["head"] == head], lines))
        for head in _shown_heads(heads)
    ]


def _loss_drawing(values: pd.DataFrame, lines: Sequence[Line]) -> Callable[[Axes, Ink], None]:
    """`values`: a column a run, a row a step."""
    curves = [(index, _curve(values, own.runs)) for index, own in enumerate(lines)]
    there = [(index, curve) for index, curve in curves if curve.steps]
    whole = values.shape[1] > sum(len(own.runs) for own in lines)

    def draw(axes: Axes, ink: Ink) -> None:
        if whole:
            band = _thinned(values)
            axes.fill_between(band.index.tolist(), band.min(axis=1), band.max(axis=1), color=ink.grid, linewidth=0)
        for index, curve in there:
            line(axes, curve, _style(index, ink))
        if there:
            axes.set_ylim(*legible_range([curve for _, curve in there]))
        axes.set_xlabel("optimizer steps")
        axes.set_ylabel("nats per token")

    return draw


def _calibration_drawing(table: pd.DataFrame, lines: Sequence[Line]) -> Callable[[Axes, Ink], None]:
    def draw(axes: Axes, ink: Ink) -> None:
        calibration_frame(axes, ink)
        for index, own in enumerate(lines):
            rows = table[table["run"] == own.runs[0]].sort_values("confidence")
            axes.plot(rows["confidence"].tolist(), rows["accuracy"].tolist(), markersize=4, **_style(index, ink))

    return draw


def _heads_and_steps(history: pd.DataFrame, family: str) -> tuple[list[str], int]:
    """Heads that have a loss of this family, and at how many steps there is any."""
    heads = heads_in(family, history["metric"].unique())
    own = history["metric"].isin([family.format(head=head) for head in heads])
    return heads, history.loc[own, STEP].nunique()


def _by_run(history: pd.DataFrame, metric: str) -> pd.DataFrame:
    """A column a run, a row a step; where a resumed run has written a step twice, what it wrote last."""
    own = history[history["metric"] == metric]
    return own.drop_duplicates([STEP, "run"], keep="last").pivot(index=STEP, columns="run", values="value").sort_index()


def _curve(values: pd.DataFrame, runs: Sequence[str]) -> Curve:
    """The mean over some runs, at the steps that all of them have."""
    there = [run for run in runs if run in values]
    means = _thinned(values[there].dropna()).mean(axis=1)
    return Curve(means.index.tolist(), means.tolist())


def _thinned(values: pd.DataFrame) -> pd.DataFrame:
    return values.iloc[:: max(1, -(-len(values) // MOST_POINTS))]


def _shown_heads(heads: Sequence[str]) -> list[str]:
    """As many heads as there are panels, the final one among them."""
    if len(heads) <= MOST_PANELS:
        return list(heads)
    return [*[head for head in heads if head != FINAL][: MOST_PANELS - 1], *(head for head in heads if head == FINAL)]


def _style(index: int, ink: Ink) -> dict[str, Any]:
    return {
        "color": run_colour(index, ink.text),
        "linestyle": DASHES[index % len(DASHES)],
        "marker": MARKERS[index % len(MARKERS)],
        "linewidth": LINE_WIDTH,
    }
