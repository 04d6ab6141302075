"""What figures show is what the frames hold; what tells their parts apart does so without colour."""

import itertools
import re

import pandas as pd
import pytest
from matplotlib.figure import Figure

from eellm.analysis import (
    exit_shares,
    exit_table,
    load_runs,
    pareto_front,
    reliability,
    run_table,
    speed_quality,
    spread,
    token_table,
)
from eellm.analysis.interactive import speed_quality_page
from eellm.analysis.plots import (
    plot_depth_by_position,
    plot_exits,
    plot_heads_by_kind,
    plot_reliability,
    plot_shares,
    plot_speed_quality,
    save_figure,
)
from eellm.drawing.plot import percent_axis
from tests.analysis.example_study import WEIGHTS, write_example_study

WEIGHT = "loss_weights.values"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return load_runs(write_example_study(tmp_path_factory.mktemp("study") / "runs"))


def lines(figure):
    """Series of error bars or lines by name: their points and what tells them apart."""
    (axes,) = figure.axes
    return {container.get_label(): container.lines[0] for container in axes.containers}


def points(line):
    return list(zip(line.get_xdata(), line.get_ydata(), strict=True))


def test_losses_are_means_over_seeds(runs):
    table = exit_table(runs)
    drawn = lines(plot_exits(table, WEIGHT))
    assert list(drawn) == ["0.1", "0.5", "1"]
    for weight, line in zip(WEIGHTS, drawn.values(), strict=True):
        own = table[(table[WEIGHT] == weight)].groupby("layer")["loss"].mean()
        assert points(line) == [(layer, pytest.approx(loss)) for layer, loss in own.items()]
    assert len(lines(plot_exits(table))) == 1


def test_series_are_told_apart_without_colour(runs):
    """Every two lines differ in dash and in marker; heads' colours get darker with depth."""
    for figure in (plot_exits(exit_table(runs), WEIGHT), plot_reliability(reliability(runs))):
        for one, other in itertools.combinations(lines(figure).values(), 2):
            assert one.get_marker() != other.get_marker()
            assert (one.get_linestyle(), one._unscaled_dash_pattern) != (other.get_linestyle(), other._unscaled_dash_pattern)
    bars = plot_heads_by_kind(token_table(runs)).axes[0].containers
    assert len({bar[0].get_hatch() for bar in bars[:-1]}) == len(bars) - 1
    greys = [
        sum(weight * channel for weight, channel in zip((0.3, 0.59, 0.11), bar[0].get_facecolor(), strict=False)) for bar in bars
    ]
    assert all(one > other + 0.05 for one, other in itertools.pairwise(greys))


def test_the_heat_map_says_each_share(runs):
    shares = exit_shares(run_table(runs, "trade_off"))
    axes = plot_shares(shares).axes[0]
    means = spread(shares, ["head", "threshold"], "share")
    texts = [text.get_text() for text in axes.texts]
    assert len(texts) == len(means)
    expected = means[(means["head"] == "exit_02") & (means["threshold"] == 0.2)]["mean"].item()
    assert texts[0] == f"{100 * expected:.0f}%"
    assert [label.get_text() for label in axes.get_yticklabels()] == ["2", "4", "6", "final"]


def test_the_front_is_the_frame_s(runs):
    table = speed_quality(runs)
    axes = plot_speed_quality(table, WEIGHT).axes[0]
    front = pareto_front(table)
    assert points(axes.lines[0]) == list(zip(front["agreement"], front["speedup"], strict=True))
    drawn = {line.get_gid(): line for line in axes.lines if line.get_gid()}
    assert len(drawn) == len(table)
    filled = {gid for gid, line in drawn.items() if line.get_markerfacecolor() == line.get_color()}
    full = {f"point-{place}" for place, mode in enumerate(table["decoding"]) if mode == "full"}
    assert filled - full == {f"point-{place}" for place in front.index} - full


DECODINGS = ("catch_up", "kv_recompute", "pipeline", "self_speculative")


def crowded():
    """Four decodings at six thresholds that come together at full depth."""
    rows = [
        {"decoding": mode, "threshold": limit, "speedup": 2 - limit - 0.05 * number, "agreement": 1 - 0.25 * (1 - limit) ** 2}
        for number, mode in enumerate(DECODINGS)
        for limit in (0.2, 0.4, 0.6, 0.8, 0.9, 1.0)
    ]
    return pd.DataFrame([{"decoding": "full", "threshold": None, "speedup": 1.0, "agreement": 1.0}, *rows])


def test_a_legend_of_six_leaves_the_axes_their_width():
    figure = plot_speed_quality(crowded())
    figure.draw_without_rendering()
    (axes,) = figure.axes
    box, page = axes.get_legend().get_window_extent(), figure.bbox
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["Pareto front", *DECODINGS, "full depth"]
    assert page.x0 <= box.x0 < box.x1 <= page.x1
    assert page.y0 <= box.y0 < box.y1 <= page.y1
    assert axes.get_window_extent().width > 0.8 * page.width


def test_names_of_points_cover_nothing():
    figure = plot_speed_quality(crowded())
    figure.draw_without_rendering()
    (axes,) = figure.axes
    names = [text.get_window_extent() for text in axes.texts]
    assert len(names) > 3
    marked = [axes.transData.transform(line.get_xydata()) for line in axes.lines if line.get_gid()]
    for name in names:
        assert axes.get_window_extent().contains(name.x0, name.y0)
        assert axes.get_window_extent().contains(name.x1, name.y1)
        assert not [place for (place,) in marked if name.contains(*place)]
        assert not axes.lines[0].get_path().transformed(axes.transData).intersects_bbox(name, filled=False)
    assert not [pair for pair in itertools.combinations(names, 2) if pair[0].overlaps(pair[1])]


@pytest.mark.parametrize(
    ("ticks", "expected"),
    [
        ([0.82, 0.84, 0.86], ["82%", "84%", "86%"]),
        ([0.825, 0.85, 0.875], ["82.5%", "85.0%", "87.5%"]),
        ([0.9975, 0.998, 1.0, 1.0005], ["99.75%", "99.80%", "100.00%", ""]),
        ([-0.0, 0.1 + 0.2], ["0%", "30%"]),
    ],
)
def test_ticks_of_shares_say_where_they_stand(ticks, expected):
    axis = Figure().add_subplot().xaxis
    percent_axis(axis)
    axis.set_ticks(ticks)
    assert axis.get_major_formatter().format_ticks(ticks) == expected


def test_calibration_weighs_runs_by_their_tokens():
    bins = pd.DataFrame(
        {"head": "final", "bin": [0, 0, 1], "count": [30, 10, 5], "confidence": [0.4, 0.2, 0.9], "accuracy": [0.5, 0.1, 0.8]}
    )
    assert points(lines(plot_reliability(bins))["final"]) == [
        (pytest.approx(0.35), pytest.approx(0.4)),
        (pytest.approx(0.9), pytest.approx(0.8)),
    ]


def test_depth_by_position_is_a_mean_of_means():
    """Over tokens of a generation first, then over generations."""
    layers = {0: [2, 8, 8, 8], 1: [2, 2, 4, 6]}
    rows = [
        {"run": "a", "generation": generation, "position": position, "exit_layer": layer, "threshold": "0.5"}
        for generation, own in layers.items()
        for position, layer in enumerate(own)
    ]
    drawn = lines(plot_depth_by_position(pd.DataFrame(rows), bins=2))
    assert points(drawn["0.5"]) == [(0.5, pytest.approx(3.5)), (2.5, pytest.approx(6.5))]


def test_kinds_add_up(runs):
    tokens = token_table(runs)
    axes = plot_heads_by_kind(tokens).axes[0]
    for row, kind in enumerate(label.get_text() for label in axes.get_yticklabels()):
        own = tokens[tokens["kind"] == kind]
        widths = [bars[row].get_width() for bars in axes.containers]
        assert sum(widths) == pytest.approx(1.0)
        assert widths[0] == pytest.approx((own["head"] == "exit_02").mean())
        assert axes.texts[row].get_text().startswith(f"{len(own):,} tokens, {own['exit_layer'].mean():.1f}")


def test_files_are_vectors_with_texts_and_repeat_to_the_byte(runs, tmp_path):
    for attempt in ("one", "two"):
        figure = plot_shares(exit_shares(run_table(runs, "trade_off")))
        save_figure(figure, tmp_path / f"{attempt}.pdf", tmp_path / f"{attempt}.svg")
    for ending in ("pdf", "svg"):
        assert (tmp_path / f"one.{ending}").read_bytes() == (tmp_path / f"two.{ending}").read_bytes()
    svg = (tmp_path / "one.svg").read_text()
    assert ">speaks after layer</text>" in svg
    assert "<image" not in svg
    pdf = (tmp_path / "one.pdf").read_bytes()
    assert b"/Subtype /Image" not in pdf
    assert b"/Subtype /Type3" not in pdf, "journals refuse Type 3 fonts"


def test_points_of_the_page_name_their_run_and_values(runs):
    table = speed_quality(runs)
    page = speed_quality_page(table, WEIGHT)
    labels = re.findall(r'<g class="point"[^>]*data-row="(\d+)" aria-label="([^"]*)"', page)
    assert sorted(int(row) for row, _ in labels) == list(range(len(table)))
    for row, label in labels:
        expected = table.iloc[int(row)]
        facts = dict(line.split(" ", 1) for line in label.split("\n"))
        assert facts["run"] == "/".join(expected["run"].split("/")[-2:])
        assert facts[WEIGHT] == f"{expected[WEIGHT]:.4g}"
        assert facts["speedup"] == f"{expected['speedup']:.4g}"
    assert page.count("<tr data-row=") == len(table)
    assert re.findall(r'(?:src|href)="(?!#)[^"]*"|url\((?!#)', page) == []
    hostile = speed_quality_page(table.head(2).assign(name="<script>alert(1)</script>"), WEIGHT)
    assert "alert(1)" in hostile
    assert "<script>alert" not in hostile
