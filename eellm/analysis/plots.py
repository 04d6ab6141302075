"""Figures for papers and notebooks, each from one frame: vectors, told apart by marker, dash and hatch as well as by colour.

Series get hues that differ for all kinds of sight; heads those of `eellm.drawing.palette`, lighter to darker with depth.
Every function returns a matplotlib Figure made without pyplot; `save_figure` writes it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from eellm.analysis.comparison import listed, pareto_front, spread
from eellm.analysis.tokens import KINDS
from eellm.drawing.number_text import percent, threshold
from eellm.drawing.palette import Ink, exit_colours, mode_colour, oklch, paper_ink
from eellm.drawing.plot import DASHES, MARKERS, Plot, calibration_frame, head_style, legend, line_with_bars, percent_axis
from eellm.drawing.point_names import name_points
from eellm.metrics.names import FINAL, depth

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

By = str | Sequence[str] | None
AXES = {
    "loss": "held-out loss (nats per token)",
    "perplexity": "held-out perplexity",
    "accuracy": "accuracy on held-out text",
    "agreement": "same token as full depth",
    "calibration_error": "expected calibration error",
    "speedup": "speed, times full depth",
    "tokens_per_second": "tokens per second",
    "mean_layers": "mean layers per token",
}
HATCHES = ("", "///", "...", "\\\\\\", "xxx", "---", "ooo")
POSITION_BINS = 16


def save_figure(figure: Figure, *paths: str | Path) -> None:
    """Write a figure, in the form that each name ends in (.pdf, .svg, .png): texts stay texts, equal figures give equal files."""
    import matplotlib

    no_date = {".pdf": {"CreationDate": None}, ".svg": {"Date": None}}
    with matplotlib.rc_context({"pdf.fonttype": 42, "svg.fonttype": "none", "svg.hashsalt": "eellm"}):
        for path in map(Path, paths):
            figure.savefig(path, dpi=200, metadata=no_date.get(path.suffix))


def plot_exits(exits: pd.DataFrame, by: By = None, value: str = "loss") -> Figure:
    """A measure of every head over the layers in front of it, from `exit_table`: a line a setting of `by`, the mean over its
    runs with bars of one standard deviation. The final head's marker is hollow."""
    means = spread(exits, [*listed(by), "head", "layer"], value)
    means = means.assign(_final=means["head"] == FINAL).sort_values(["layer", "_final"])

    def draw(axes: Axes, ink: Ink) -> None:
        groups = _series(means, by)
        for index, (label, rows) in enumerate(groups):
            style = _series_style(index, len(groups), ink)
            line_with_bars(axes, rows["layer"], rows["mean"], rows["std"].fillna(0.0), {**style, "label": label})
            final = rows[rows["_final"]]
            hollow = {**style, "linestyle": "none", "markerfacecolor": ink.background, "markersize": 7}
            axes.plot(final["layer"], final["mean"], zorder=4, **hollow)
        axes.set_xticks(sorted(means["layer"].unique()))
        axes.set_xlabel("layers in front of the head")
        axes.set_ylabel(AXES.get(value, value))
        _name_series(axes, ink, by)

    return _figure("exits", draw)


def plot_shares(shares: pd.DataFrame) -> Figure:
    """Heat map of which head speaks at which threshold, from `exit_shares`: mean share of tokens over runs. Deep heads are on
    top; shares are written in the cells, darker is more."""
    table = shares.dropna(subset=["threshold"]).pivot_table(index="head", columns="threshold", values="share", aggfunc="mean")
    table = table.loc[sorted(table.index, key=depth)]

    def draw(axes: Axes, ink: Ink) -> None:
        from matplotlib.colors import LinearSegmentedColormap

        blues = LinearSegmentedColormap.from_list("shares", [oklch(0.98 - 0.62 * step / 8, 0.11, 250) for step in range(9)])
        axes.pcolormesh(table.to_numpy(), cmap=blues, vmin=0, vmax=1, edgecolors=ink.background, linewidth=1.5)
        for row, head in enumerate(table.index):
            for column, share in enumerate(table.loc[head]):
                colour = ink.background if share > 0.5 else ink.text
                axes.text(column + 0.5, row + 0.5, percent(share), ha="center", va="center", fontsize=7.5, color=colour)
        axes.set_xticks([column + 0.5 for column in range(table.shape[1])], [threshold(value) for value in table.columns])
        axes.set_yticks([row + 0.5 for row in range(len(table))], [_layers(head) for head in table.index])
        axes.tick_params(length=0)
        axes.grid(False)
        for spine in axes.spines.values():
            spine.set_visible(False)
        axes.set_xlabel("threshold")
        axes.set_ylabel("speaks after layer")

    return _figure("shares", draw)


def plot_speed_quality(frame: pd.DataFrame, by: By = "decoding", speed: str = "speedup", quality: str = "agreement") -> Figure:
    """Speed against quality, from `speed_quality`: a point a row, filled where no other row beats it (the Pareto front, a line);
    thresholds stand beside the points of the front. Full depth is a star. `by` tells series apart."""
    return Plot("speed_quality", "", "", speed_quality_drawing(frame, by, speed, quality)).figure(paper_ink(()))


def speed_quality_drawing(frame: pd.DataFrame, by: By, speed: str, quality: str) -> Any:
    """What `plot_speed_quality` draws; points carry `point-<n>` as their id in an SVG, n counting the rows of the frame."""
    known = frame.assign(_place=range(len(frame))).dropna(subset=[speed, quality])
    full = known["decoding"] == "full"
    front = pareto_front(known, speed, quality)
    unbeaten = set(front["_place"])

    def draw(axes: Axes, ink: Ink) -> None:
        axes.plot(front[quality], front[speed], color=ink.muted, linewidth=1.2, label="Pareto front", zorder=1)
        groups = _series(known[~full], by)
        for index, (label, rows) in enumerate(groups):
            style = {**_series_style(index, len(groups), ink), "linestyle": "none", "markersize": 5.5}
            axes.plot([], [], label=label, **style)
            for x, y, place in rows[[quality, speed, "_place"]].itertuples(index=False):
                own: dict[str, Any] = {"zorder": 3} if place in unbeaten else {"zorder": 2, "markerfacecolor": ink.background}
                axes.plot([x], [y], gid=f"point-{place}", **{**style, **own})
        star: dict[str, Any] = {"color": ink.text, "marker": "*", "markersize": 10, "linestyle": "none"}
        for number, (x, y, place) in enumerate(known.loc[full, [quality, speed, "_place"]].itertuples(index=False)):
            axes.plot([x], [y], gid=f"point-{place}", zorder=4, label="full depth" if number == 0 else None, **star)
        named = front[(front["decoding"] != "full") & front["threshold"].notna()]
        if len(named):
            points = zip(named[quality], named[speed], named["threshold"], strict=True)
            name_points(axes, ink, [(x, y, threshold(value)) for x, y, value in points])
        axes.margins(x=0.1, y=0.15)
        axes.set_xlabel(AXES.get(quality, quality))
        axes.set_ylabel(AXES.get(speed, speed))
        if quality in ("agreement", "accuracy"):
            percent_axis(axes.xaxis)
        _name_series(axes, ink, by)

    return draw


def plot_reliability(bins: pd.DataFrame) -> Figure:
    """Calibration diagram, from `reliability`: how often a head is right at a given confidence, over all runs in the frame. On
    the dotted line its confidence can be taken at its word. Bars: one binomial standard error, which takes tokens for
    independent and so is too short."""
    heads = sorted(bins["head"].unique(), key=depth)
    weighted = bins.assign(confidence=bins["confidence"] * bins["count"], accuracy=bins["accuracy"] * bins["count"])
    sums = weighted.groupby(["head", "bin"])[["confidence", "accuracy", "count"]].sum().reset_index()

    def draw(axes: Axes, ink: Ink) -> None:
        calibration_frame(axes, ink)
        for index, head in enumerate(heads):
            own = sums[sums["head"] == head].sort_values("bin")
            right = own["accuracy"] / own["count"]
            error = (right * (1 - right) / own["count"]) ** 0.5
            style = {**head_style(index, head, ink), "label": _head_name(head)}
            line_with_bars(axes, own["confidence"] / own["count"], right, error, style)
        legend(axes, ink)

    return _figure("reliability", draw, heads)


def plot_depth_by_position(tokens: pd.DataFrame, by: By = "threshold", bins: int = POSITION_BINS) -> Figure:
    """Mean layers a token passed, by its place in the generated text, from `token_table`: a line a setting of `by`. Bars: one
    standard error over generations."""
    width = max(1, math.ceil((tokens["position"].max() + 1) / bins))
    binned = tokens.assign(_bin=(tokens["position"] // width) * width + (width - 1) / 2)
    groups_by = listed(by)
    single = binned.groupby([*groups_by, "run", "generation", "_bin"], sort=False)["exit_layer"].mean().reset_index()
    means = spread(single, [*groups_by, "_bin"], "exit_layer").sort_values("_bin")

    def draw(axes: Axes, ink: Ink) -> None:
        groups = _series(means, by)
        for index, (label, rows) in enumerate(groups):
            error = rows["std"] / rows["n"] ** 0.5
            style = {**_series_style(index, len(groups), ink), "label": label}
            line_with_bars(axes, rows["_bin"], rows["mean"], error.fillna(0.0), style)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("position in the generated text (tokens)")
        axes.set_ylabel("mean layers passed")
        _name_series(axes, ink, by)

    return _figure("depth_by_position", draw)


def plot_heads_by_kind(tokens: pd.DataFrame) -> Figure:
    """Which heads emit which kind of token, from `token_table`: shares of each kind, how many there are, and their mean depth."""
    heads = sorted(tokens["head"].unique(), key=depth)
    kinds = [kind for kind in KINDS if kind in set(tokens["kind"])]
    counts = tokens.groupby(["kind", "head"]).size().unstack(fill_value=0).reindex(index=kinds, columns=heads)
    shares = counts.div(counts.sum(axis=1), axis=0)
    layers = tokens.groupby("kind")["exit_layer"].mean()

    def draw(axes: Axes, ink: Ink) -> None:
        left = pd.Series(0.0, index=kinds)
        for index, head in enumerate(heads):
            hatch = "" if head == FINAL else HATCHES[index % len(HATCHES)]
            axes.barh(
                range(len(kinds)), shares[head], left=left, height=0.7, label=_head_name(head), color=ink.heads[head],
                edgecolor=ink.background, linewidth=1.0, hatch=hatch,
            )  # fmt: skip
            left = left + shares[head]
        for row, kind in enumerate(kinds):
            note = f"{counts.loc[kind].sum():,} tokens, {layers[kind]:.1f} layers"
            axes.text(1.02, row, note, va="center", fontsize=7.5, color=ink.muted)
        axes.set_yticks(range(len(kinds)), kinds)
        axes.invert_yaxis()
        axes.set_xlim(0, 1)
        percent_axis(axes.xaxis)
        axes.grid(False, axis="y")
        axes.set_xlabel("share of the tokens of a kind")
        legend(axes, ink)

    return _figure("heads_by_kind", draw, heads)


def _figure(name: str, draw: Any, heads: Sequence[str] = ()) -> Figure:
    return Plot(name, "", "", draw).figure(paper_ink(heads))


def _series(frame: pd.DataFrame, by: By) -> list[tuple[str | None, pd.DataFrame]]:
    """What is drawn as one line or one kind of marker, with its name."""
    columns = listed(by)
    if not columns:
        return [(None, frame)]
    groups = list(frame.groupby(columns, sort=True, dropna=False))
    return [(", ".join(map(_setting, key)), rows) for key, rows in groups]


def _setting(value: object) -> str:
    if value is None or value != value:
        return "null"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _series_style(index: int, count: int, ink: Ink) -> dict[str, Any]:
    colour = mode_colour(index, ink) if count <= 4 else exit_colours(count, "light")[index]
    return {"color": colour, "linestyle": DASHES[index % len(DASHES)], "marker": MARKERS[index % len(MARKERS)]}


def _name_series(axes: Axes, ink: Ink, by: By) -> None:
    """A legend that says which settings its entries are values of."""
    if listed(by):
        legend(axes, ink)
        box = axes.get_legend()
        box.set_title(", ".join(listed(by)))
        box.get_title().set(fontsize=7.5, color=ink.muted)
        box.set_alignment("left")


def _head_name(head: str) -> str:
    return head.replace("_", " ")


def _layers(head: str) -> str:
    return FINAL if head == FINAL else str(int(head.removeprefix("exit_")))
