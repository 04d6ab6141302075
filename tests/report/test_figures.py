import itertools
import math

import pytest

from eellm.drawing.palette import exit_colours, oklch, paper_ink
from eellm.drawing.plot import PanelPlot, Plot, legend
from eellm.report.figures import plots, save_figures
from eellm.report.run_record import RunRecord, load_run
from tests.report.example_run import THRESHOLDS, write_example_run

NAMES = {"loss_train", "loss_validation", "exit_gap", "speed_quality", "shares", "trade_off", "reliability"}


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    return load_run(write_example_run(tmp_path_factory.mktemp("run") / "example"))


def axes_of(record, name):
    plot = next(plot for plot in plots(record) if plot.name == name)
    return plot.figure(paper_ink(record.heads)).axes[0]


def drawn(axes):
    return {line.get_label(): list(zip(line.get_xdata(), line.get_ydata(), strict=True)) for line in axes.lines}


def test_every_head_is_drawn_with_its_losses(record):
    for name, prefix in (("loss_train", "train/loss/"), ("loss_validation", "val/loss/")):
        lines = drawn(axes_of(record, name))
        assert list(lines) == ["exit_02", "exit_04", "exit_06", "final"]
        for head, points in lines.items():
            assert points == [(row["step"], row[prefix + head]) for row in record.rows if prefix + head in row]


def test_the_gap_is_the_difference_at_the_same_step(record):
    lines = drawn(axes_of(record, "exit_gap"))
    rows = [row for row in record.rows if "val/loss/final" in row]
    assert lines["exit_04"] == [(row["step"], row["val/loss/exit_04"] - row["val/loss/final"]) for row in rows]


def test_shares_fill_each_threshold(record):
    axes = axes_of(record, "shares")
    assert [label.get_text() for label in axes.get_yticklabels()] == list(map(str, THRESHOLDS))
    for index in range(len(THRESHOLDS)):
        assert sum(bars[index].get_width() for bars in axes.containers) == pytest.approx(1.0, abs=2e-3)


def test_all_thresholds_are_named_beside_full_depth(record):
    texts = {text.get_text() for text in axes_of(record, "speed_quality").texts}
    assert texts == {*map(str, THRESHOLDS), "full depth"}


def test_a_task_is_a_panel_with_its_scores_against_speed(tmp_path):
    """The metric with a standard error is drawn, of lower or higher is better."""
    settings = [("full", None, 1.0), ("catch_up", 0.4, 1.3), ("catch_up", 0.8, 0.9), ("self_speculative", 0.4, 1.1)]
    scores = {("one", "loose"): None, ("one", "acc"): 0.03, ("two", "perplexity"): 1.5}
    rows = [
        {"decoding": mode, "threshold": value, "task": task, "metric": metric, "filter": "none", "score": 2.0 - speedup,
         "stderr": error, "higher_is_better": metric == "acc", "speedup": speedup}
        for mode, value, speedup in settings for (task, metric), error in scores.items()
    ]  # fmt: skip
    (plot,) = plots(RunRecord(tmp_path, lm_eval=rows))
    panels = plot.figure(paper_ink(["final"])).axes
    assert [axes.get_title(loc="left") for axes in panels] == ["one", "two"]
    assert [axes.get_ylabel() for axes in panels] == ["acc, higher is better", "perplexity, lower is better"]
    for axes, error in zip(panels, (0.03, 1.5), strict=True):
        drawn_ = {bars.get_label(): bars for bars in axes.containers}
        assert list(drawn_) == ["catch_up", "self_speculative", "full depth"]
        line, _, (bars,) = drawn_["catch_up"]
        assert list(zip(line.get_xdata(), line.get_ydata(), strict=True)) == [(0.9, 1.1), (1.3, 0.7)]
        assert [top - bottom for (_, bottom), (_, top) in bars.get_segments()] == pytest.approx([2 * error] * 2)


def test_every_mode_has_a_curve_of_its_own(record, tmp_path):
    others = [{**row, "decoding": "self_speculative", "agreement": 1.0, "share_final": 1.0} for row in record.early_exit]
    several = RunRecord(tmp_path, speed_quality=[*record.speed_quality, *others])
    axes = axes_of(several, "speed_quality")
    for mode in ("catch_up", "self_speculative"):
        wanted = [(row["agreement"], row["speedup"]) for row in several.early_exit if row["decoding"] == mode]
        assert sorted(drawn(axes)[mode]) == sorted(wanted)
    looks = [
        (line.get_color(), str(line._dash_pattern), line.get_marker())
        for line in axes.lines
        if line.get_label() in several.compared
    ]
    assert all(len(set(look)) == 2 for look in zip(*looks, strict=True))
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["catch_up", "self_speculative"]
    named = [text.get_text() for text in axes.texts]
    assert sorted(named) == sorted([*map(str, THRESHOLDS), "full depth"]), "once for all curves"
    bars = axes_of(several, "shares").get_yticklabels()
    assert [label.get_text() for label in bars] == list(map(str, THRESHOLDS)), "drafts are the final head's tokens"


def test_thresholds_that_make_no_difference_share_a_label(tmp_path):
    def row(threshold, speedup):
        return {"decoding": "catch_up", "threshold": threshold, "agreement": 1.0, "speedup": speedup, "share_final": 1.0}

    speeds = {0.4: 0.85, 0.6: 0.856, 0.8: 0.853}
    record = RunRecord(tmp_path, speed_quality=[row(*pair) for pair in speeds.items()])
    assert {text.get_text() for text in axes_of(record, "speed_quality").texts} == {"0.4, 0.8, 0.6", "full depth"}


@pytest.mark.parametrize("labels", [["a", "b", "c"], [f"a longer name of setting {number}" for number in range(6)]])
def test_a_legend_is_no_wider_than_its_figure(labels):
    def draw(axes, ink):
        for label in labels:
            axes.plot([0, 1], [0, 1], label=label)
        legend(axes, ink)

    for plot in (Plot("x", "", "", draw), PanelPlot("x", "", "", draw, (draw,))):
        figure = plot.figure(paper_ink([]))
        figure.draw_without_rendering()
        for box in (figure.axes[0].get_legend().get_window_extent(), *(each.get_window_extent() for each in figure.legends)):
            assert figure.bbox.x0 <= box.x0 < box.x1 <= figure.bbox.x1
        columns = figure.axes[0].get_legend()._ncols
        assert columns == 3 if len(labels) == 3 else columns < 3


def test_full_depth_is_named_inside_the_axes_and_beside_its_line(record):
    axes = axes_of(record, "speed_quality")
    axes.figure.draw_without_rendering()
    (name,) = [text.get_window_extent() for text in axes.texts if text.get_text() == "full depth"]
    room, one = axes.get_window_extent(), axes.transData.transform((1.0, 1.0))
    assert room.x0 <= name.x0 < name.x1 <= room.x1
    assert not name.y0 <= one[1] <= name.y1


def test_a_missing_share_is_a_gap(record, tmp_path):
    rows = [{**row, "share_exit_04": None} for row in record.early_exit]
    bars = {bar.get_label(): bar for bar in axes_of(RunRecord(tmp_path, speed_quality=rows), "shares").containers}
    assert all(math.isnan(bar.get_width()) for bar in bars["exit_04"])
    assert [bar.get_width() for bar in bars["final"]] == pytest.approx([row["share_final"] for row in rows])
    assert [bar.get_x() for bar in bars["final"]] == pytest.approx([row["share_exit_02"] + row["share_exit_06"] for row in rows])


def test_lines_differ_without_colour(record):
    looks = [(line.get_linestyle(), str(line._dash_pattern), line.get_marker()) for line in axes_of(record, "loss_train").lines]
    assert len(set(looks)) == len(looks)
    assert len({line.get_marker() for line in axes_of(record, "loss_train").lines}) == len(looks)


def test_pngs_are_written_for_what_there_is(record, tmp_path):
    written = save_figures(record, tmp_path / "figures")
    assert {path.stem for path in written} == NAMES
    starts = {".png": b"\x89PNG", ".svg": b"<?xml"}
    assert [path.suffix for path in written] == [".png", ".svg"] * len(NAMES)
    assert all(path.read_bytes().startswith(starts[path.suffix]) for path in written)
    assert save_figures(RunRecord(tmp_path), tmp_path / "none") == []
    assert not (tmp_path / "none").exists()


def luminance(colour):
    channels = [int(colour[index : index + 2], 16) / 255 for index in (1, 3, 5)]
    linear = [channel / 12.92 if channel <= 0.04045 else ((channel + 0.055) / 1.055) ** 2.4 for channel in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("background", ["light", "dark", "terminal"])
@pytest.mark.parametrize("count", [1, 3, 8])
def test_colours_darken_with_depth(background, count):
    grey = [luminance(colour) for colour in exit_colours(count, background)]
    assert all(earlier > later for earlier, later in itertools.pairwise(grey))
    assert len(grey) == count


@pytest.mark.parametrize(
    ("colour", "expected"),
    [((1.0, 0.0, 0.0), "#ffffff"), ((0.0, 0.0, 0.0), "#000000"), ((0.6279554, 0.2576833, 29.2338851), "#ff0000"),
     ((0.4520137, 0.3132144, 264.0520226), "#0000ff")],
)  # fmt: skip
def test_oklch_agrees_with_known_colours(colour, expected):
    assert oklch(*colour) == expected


def test_a_colour_outside_srgb_loses_chroma_only():
    assert luminance(oklch(0.6, 0.4, 150.0)) == pytest.approx(luminance(oklch(0.6, 0.1, 150.0)), abs=0.03)
    assert math.isfinite(luminance(oklch(0.99, 0.4, 260.0)))
