"""Gantt charts show what the timeline says: every part where it is, with its tip, on paper and on the page."""

from __future__ import annotations

import re
from html import unescape
from pathlib import Path

import pytest
from matplotlib.image import imread

from eellm.drawing.palette import pass_colours
from eellm.report.gantt import HATCHES, KINDS, Chart, save_png
from eellm.report.gantt_svg import PATTERNS, figure, figures, legend
from eellm.schedule.costs import Costs, HeadCosts, StageCosts
from eellm.schedule.programs import forward_only, one_f_one_b, zero_bubble_h1
from eellm.schedule.simulate import simulate

EXIT, FINAL = HeadCosts("exit_06", 1, 2, 3 * 2**20), HeadCosts("final", 1, 2, is_exit=False)
COSTS = Costs([StageCosts(2, 4, 2, heads, kept_bytes=2**20) for heads in ((), (EXIT,), (FINAL,))])


def test_every_part_is_a_bar() -> None:
    timeline = simulate(zero_bubble_h1(3, 4), COSTS)
    chart = Chart.of(timeline, "ZB-H1", seconds=False)
    assert sum(bar.width for bar in chart.bars) == sum(timeline.busy)
    assert chart.kinds == ["forward", "backward", "weight", "exit", "final"]
    assert {bar.start for bar in chart.bars} == {bar.left for bar in chart.bars}
    first = next(bar for bar in chart.bars if bar.kind == "exit")
    box = first.box
    assert chart.tip(first).splitlines() == [
        "microbatch 0: exit_06 in the backward pass",
        "stage 1",
        f"start {box.start:g} units",
        "length 3 units",
        "activations 5.0 MiB",
    ]
    assert Chart.of(simulate(forward_only(3, 2), COSTS), "", False).kinds == ["forward_only", "exit", "final"]


def test_a_long_steady_phase_is_left_out() -> None:
    timeline = simulate(one_f_one_b(3, 400), COSTS)
    chart = Chart.of(timeline, "1F1B")
    assert chart.cut is not None
    assert len(chart.bars) < 300
    assert chart.width < timeline.time / 10
    shown = {bar.box.action.microbatch for bar in chart.bars}
    assert {0, 399} <= shown
    assert 200 not in shown
    for bar in chart.bars:
        assert 0 <= bar.left <= bar.left + bar.width <= chart.width + 1e-9
        assert bar.left == bar.start or bar.left == pytest.approx(bar.start - timeline.time + chart.width)


def test_kinds_differ_without_colour() -> None:
    assert list(KINDS) == list(HATCHES) == list(PATTERNS) == list(pass_colours())
    assert len(set(HATCHES.values())) == len(set(PATTERNS.values())) == len(set(pass_colours().values())) == len(KINDS)


def test_the_page_has_a_bar_with_a_tip_for_each_part() -> None:
    chart = Chart.of(simulate(one_f_one_b(3, 5), COSTS), "1F1B & exits", seconds=False)
    html = figure(chart)
    tips = [unescape(tip) for tip in re.findall(r'data-tip="([^"]*)"', html)]
    assert tips == [chart.tip(bar) for bar in chart.bars]
    assert "1F1B &amp; exits" in html
    assert html.count('class="memory"') == 3
    assert all(words in legend([chart]) for words in ("forward", "backward", "exit", "final head"))
    assert KINDS["weight"] not in legend([chart])


def test_equal_times_are_equally_long_in_all_charts_of_a_page() -> None:
    charts = [Chart.of(simulate(one_f_one_b(3, count), COSTS), "1F1B") for count in (3, 6)]
    short, long = (float(width) for width in re.findall(r'<svg width="(\d+)"', figures(charts)))
    assert short / long == pytest.approx(charts[0].width / charts[1].width, rel=2e-3)
    pixels = [float(width) for width in re.findall(r'<rect x="[^"]*" y="[^"]*" width="([\d.]+)"', figures(charts))]
    assert pixels[0] == pytest.approx(pixels[len(charts[0].bars)]), "the first forward pass"


def test_the_picture_is_written(tmp_path: Path) -> None:
    charts = [Chart.of(simulate(one_f_one_b(3, count), COSTS), "1F1B") for count in (4, 400)]
    save_png(charts, tmp_path / "gantt.png")
    height, width, _ = imread(tmp_path / "gantt.png").shape
    assert width == 11 * 160
    assert 400 < height < width
