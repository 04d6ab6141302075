"""The figures of a run, drawn once for PNG files and for the page. Lines differ by colour, dash and marker, so that they can be
told apart in grey."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eellm.drawing.number_text import threshold
from eellm.drawing.palette import Ink, paper_ink
from eellm.drawing.plot import (
    Curve,
    PanelPlot,
    Plot,
    calibration_frame,
    head_style,
    legend,
    legible_range,
    line,
    line_with_bars,
    mode_style,
    percent_axis,
    points_of,
    thinned,
)
from eellm.drawing.point_names import Point, name_point, name_points, span_of
from eellm.metrics.names import FINAL, TRAIN_LOSS, VAL_LOSS, depth, share_column
from eellm.metrics.tables import Cell
from eellm.report.run_record import RunRecord, TableRows

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_PANELS = 12


def plots(record: RunRecord) -> list[Plot]:
    """The figures that a run has data for."""
    train, validation = record.curves(TRAIN_LOSS), record.curves(VAL_LOSS)
    trailing = validation if _longest(validation) >= 3 else train
    found: list[Plot | None] = [
        _loss_plot("loss_train", "Training loss", train),
        _loss_plot("loss_validation", "Validation loss", validation),
        _gap_plot(trailing),
        _speed_plot(record),
        _share_plot(record),
        _trade_off_plot(record),
        _reliability_plot(record),
        _tasks_plot(record),
    ]
    return [plot for plot in found if plot is not None]


def save_figures(record: RunRecord, folder: Path) -> list[Path]:
    """Write every figure on white, as PNG and as SVG."""
    ink, paths = paper_ink(record.heads), []
    for plot in plots(record):
        folder.mkdir(parents=True, exist_ok=True)
        figure = plot.figure(ink)
        figure.suptitle(plot.title, fontsize=11, x=0.01, ha="left", color=ink.text)
        for ending in ("png", "svg"):
            paths.append(folder / f"{plot.name}.{ending}")
            figure.savefig(paths[-1], dpi=160)
    return paths


def _longest(curves: dict[str, Curve]) -> int:
    return max((len(curve.steps) for curve in curves.values()), default=0)


def _loss_plot(name: str, title: str, curves: dict[str, Curve]) -> Plot | None:
    if _longest(curves) < 2:
        return None
    heads = list(curves)

    def draw(axes: Axes, ink: Ink) -> None:
        for head, curve in curves.items():
            line(axes, thinned(curve), _style(heads, head, ink))
        axes.set_ylim(*legible_range(list(curves.values())))
        axes.set_xlabel("optimizer steps")
        axes.set_ylabel("nats per token")
        legend(axes, ink)

    return Plot(name, title, f"{title} of every head over the run, in nats per token.", draw)


def _gap_plot(curves: dict[str, Curve]) -> Plot | None:
    final = curves.get(FINAL)
    exits = [head for head in curves if head != FINAL]
    if final is None or not exits or len(final.steps) < 3:
        return None
    reference = dict(zip(final.steps, final.values, strict=True))

    def draw(axes: Axes, ink: Ink) -> None:
        for head in exits:
            points = [(step, value - reference[step]) for step, value in points_of(curves[head]) if step in reference]
            style = _style(list(curves), head, ink)
            line(axes, thinned(Curve([step for step, _ in points], [gap for _, gap in points])), style)
        axes.axhline(0.0, color=ink.heads[FINAL], linewidth=1.4, label=FINAL)
        axes.set_xlabel("optimizer steps")
        axes.set_ylabel("nats per token above final")
        legend(axes, ink)

    caption = "How far each exit is behind the final head: its loss minus the final head's at the same step."
    return Plot("exit_gap", "Distance of the exits", caption, draw)


def _speed_plot(record: RunRecord) -> Plot | None:
    rows = [row for row in record.early_exit if _all_numbers(row, "agreement", "speedup")]
    if not rows:
        return None

    modes = list(dict.fromkeys(str(row["decoding"]) for row in rows))

    def draw(axes: Axes, ink: Ink) -> None:
        axes.axhline(1.0, color=ink.muted, linewidth=1.0, linestyle=(0, (2, 2)))
        curves = {mode: _speed_points([row for row in rows if row["decoding"] == mode]) for mode in modes}
        span = span_of([(1.0, 1.0, ""), *(point for points in curves.values() for point in points)])
        for index, (mode, points) in enumerate(curves.items()):
            curve = Curve([point[0] for point in points], [point[1] for point in points])
            line(axes, curve, {**mode_style(index, ink), "label": mode})
            if index == 0:  # all curves have the same thresholds, falling from right to left
                name_points(axes, ink, points, span)
        axes.plot([1.0], [1.0], color=ink.text, marker="D", markersize=7, markerfacecolor=ink.background, zorder=4, clip_on=False)
        name_point(axes, ink, (1.0, 1.0, "full depth"))
        axes.margins(x=0.12, y=0.18)
        if len(modes) > 1:
            legend(axes, ink)
        axes.set_xlabel("same token as full depth")
        axes.set_ylabel("speed, times full depth")
        percent_axis(axes.xaxis)

    caption = "Speed against quality of generated text by threshold. Above the dotted line early exit is faster than full depth."
    return Plot("speed_quality", "Speed against quality", caption, draw)


def _speed_points(rows: list[dict[str, Cell]]) -> list[Point]:
    points = [(_float(row, "agreement"), _float(row, "speedup"), threshold(row.get("threshold"))) for row in rows]
    return sorted(points, key=lambda point: point[:2])


def _share_plot(record: RunRecord) -> Plot | None:
    rows = record.leaving or record.trade_off
    heads = [head for head in record.heads if any(share_column(head) in row for row in rows)]
    if not rows or not heads:
        return None

    def draw(axes: Axes, ink: Ink) -> None:
        names = [threshold(row.get("threshold")) for row in rows]
        starts = [0.0] * len(rows)
        for head in heads:
            widths = [_float(row, share_column(head)) for row in rows]
            axes.barh(
                range(len(rows)), widths, left=starts, height=0.72, label=head,
                color=ink.heads[head], edgecolor=ink.background, linewidth=1.2,
            )  # fmt: skip
            starts = [start if math.isnan(width) else start + width for start, width in zip(starts, widths, strict=True)]
        axes.set_yticks(range(len(rows)), names)
        axes.invert_yaxis()
        axes.set_xlim(0, 1)
        percent_axis(axes.xaxis)
        axes.grid(False, axis="y")
        axes.set_xlabel("share of tokens")
        axes.set_ylabel("threshold")
        legend(axes, ink)

    source = "generated tokens" if record.leaving else "held-out tokens"
    return Plot("shares", "Where tokens leave", f"Share of {source} that leave at each exit, by threshold.", draw)


def _trade_off_plot(record: RunRecord) -> Plot | None:
    rows = [row for row in record.trade_off if _all_numbers(row, "mean_layers", "accuracy")]
    if not rows:
        return None
    fixed_rows = [row for row in record.exits if _all_numbers(row, "layer", "accuracy")]

    def draw(axes: Axes, ink: Ink) -> None:
        points = sorted((_float(row, "mean_layers"), _float(row, "accuracy"), threshold(row.get("threshold"))) for row in rows)
        depths, accuracies = [point[0] for point in points], [point[1] for point in points]
        axes.plot(depths, accuracies, color=ink.text, linewidth=1.4, marker=".", markersize=8, label="by threshold", zorder=3)
        name_points(axes, ink, points)
        heads = [str(row["head"]) for row in fixed_rows]
        for row, head in zip(fixed_rows, heads, strict=True):
            style = _style(heads, head, ink)
            axes.plot(
                [_float(row, "layer")], [_float(row, "accuracy")], linestyle="none", label=head,
                marker=style["marker"], markersize=7, color=style["color"], markeredgecolor=ink.text, markeredgewidth=0.7,
            )  # fmt: skip
        axes.margins(x=0.08, y=0.15)
        axes.set_xlabel("mean layers per token")
        axes.set_ylabel("accuracy")
        percent_axis(axes.yaxis)
        legend(axes, ink)

    caption = (
        "Accuracy on held-out text against mean depth when tokens leave by threshold, and when all of them use one head "
        "(markers): a line above the markers means that confidence picks the right tokens to leave early."
    )
    return Plot("trade_off", "Depth against accuracy", caption, draw)


def _reliability_plot(record: RunRecord) -> Plot | None:
    rows = [row for row in record.reliability if _all_numbers(row, "confidence", "accuracy")]
    if not rows:
        return None
    heads = sorted({str(row["head"]) for row in rows}, key=depth)
    if len(rows) < 2 * len(heads):
        return None

    def draw(axes: Axes, ink: Ink) -> None:
        calibration_frame(axes, ink)
        for head in heads:
            own = sorted((_float(row, "confidence"), _float(row, "accuracy")) for row in rows if row["head"] == head)
            line(axes, Curve([x for x, _ in own], [y for _, y in own]), _style(heads, head, ink))
        legend(axes, ink)

    caption = "How often a head is right at a given confidence. On the dotted line its confidence can be taken at its word."
    return Plot("reliability", "Calibration", caption, draw)


def _tasks_plot(record: RunRecord) -> Plot | None:
    """A panel a task: its first metric that has a standard error, else its first."""
    chosen: dict[str, tuple[str, TableRows]] = {}
    for (task, metric, _), rows in record.task_scores.items():
        rows = [row for row in rows if _all_numbers(row, "score", "speedup")]
        if rows and (task not in chosen or (_error(rows[0]) and not _error(chosen[task][1][0]))):
            chosen[task] = (metric, rows)
    if not chosen:
        return None
    panels = [_task_panel(task, metric, rows) for task, (metric, rows) in list(chosen.items())[:MOST_PANELS]]
    left_out = f" The first {MOST_PANELS} of {len(chosen)} tasks." if len(chosen) > MOST_PANELS else ""
    caption = (
        "Tasks of lm-evaluation-harness: score, with one standard error, against how fast the same setting decodes, by "
        f"threshold. Scores of one task share their documents, so their errors are not independent.{left_out}"
    )
    return PanelPlot("lm_eval", "Tasks: speed against score", caption, panels[0], tuple(panels[1:]))


def _task_panel(task: str, metric: str, rows: TableRows) -> Callable[[Axes, Ink], None]:
    modes = list(dict.fromkeys(str(row["decoding"]) for row in rows if row["decoding"] != "full"))

    def draw(axes: Axes, ink: Ink) -> None:
        axes.axvline(1.0, color=ink.muted, linewidth=1.0, linestyle=(0, (2, 2)))
        for index, mode in enumerate(modes):
            own = sorted((row for row in rows if row["decoding"] == mode), key=lambda row: _float(row, "speedup"))
            points = [(_float(row, "speedup"), _float(row, "score"), threshold(row.get("threshold"))) for row in own]
            xs, ys, errors = [x for x, _, _ in points], [y for _, y, _ in points], [_error(row) for row in own]
            line_with_bars(axes, xs, ys, errors, {**mode_style(index, ink), "label": mode})
            if index == 0:
                name_points(axes, ink, [(x, y + _error(row), name) for (x, y, name), row in zip(points, own, strict=True)])
        for row in (row for row in rows if row["decoding"] == "full"):
            hollow = {"color": ink.text, "markerfacecolor": ink.background, "marker": "D", "linestyle": "none", "zorder": 4}
            line_with_bars(axes, [1.0], [_float(row, "score")], [_error(row)], {**hollow, "label": "full depth"})
        axes.margins(x=0.12, y=0.18)
        axes.set_xlabel("speed, times full depth")
        better = {True: ", higher is better", False: ", lower is better"}
        axes.set_ylabel(metric + next((text for value, text in better.items() if rows[0].get("higher_is_better") is value), ""))
        axes.set_title(task, fontsize=9, loc="left", color=ink.text)

    return draw


def _error(row: dict[str, Cell]) -> float:
    """0, which draws no bar, where there is none."""
    error = _float(row, "stderr")
    return 0.0 if math.isnan(error) else error


def _style(heads: Sequence[str], head: str, ink: Ink) -> dict[str, Any]:
    return {**head_style(heads.index(head), head, ink), "linewidth": 2.0 if head == FINAL else 1.6, "label": head}


def _all_numbers(row: dict[str, Cell], *columns: str) -> bool:
    return all(isinstance(row.get(column), (int, float)) for column in columns)


def _float(row: dict[str, Cell], column: str) -> float:
    """NaN, which is drawn as a gap, where there is none."""
    value = row.get(column)
    return float(value) if isinstance(value, (int, float)) else math.nan
