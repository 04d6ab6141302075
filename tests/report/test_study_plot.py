"""Figures of a study: what is drawn is the table's, and each setting looks the same in every panel."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

from eellm.drawing.palette import paper_ink
from eellm.drawing.plot import PanelPlot
from eellm.report.study_plot import mean_curves, mean_points, measured_curves, save_panels

TABLE = pd.DataFrame(
    [("a", 1, 5.0, 0.1), ("a", 2, 4.0, 0.2), ("b", 1, 3.0, float("nan")), ("b", 2, 2.0, 0.4)], columns=["by", "x", "mean", "std"]
)
NAMES = {"a": "first", "b": "second"}


def test_curves_are_the_tables_and_a_setting_looks_the_same_where_others_are_missing() -> None:
    figure_module = pytest.importorskip("matplotlib.figure")
    axes, others = figure_module.Figure().subplots(1, 2)
    mean_curves(axes, paper_ink(()), TABLE, "x", "by", NAMES)
    mean_curves(others, paper_ink(()), TABLE[TABLE["by"] == "b"], "x", "by", NAMES)
    first, second = axes.containers
    assert [bars.get_label() for bars in (first, second)] == ["first", "second"]
    assert first[0].get_ydata().tolist() == [5.0, 4.0]
    assert first[0].get_xdata() == pytest.approx([1, 2], abs=0.02)
    (bars,) = first[2]
    assert [segment[:, 1].tolist() for segment in bars.get_segments()] == [[4.9, 5.1], [3.8, 4.2]]
    # one seed has no spread: a bar of no length, not a missing point
    assert [segment[:, 1].tolist() for segment in second[2][0].get_segments()] == [[3.0, 3.0], [1.6, 2.4]]
    alone = next(bars for bars in others.containers if bars.get_label() == "second")
    for look in ("get_color", "get_linestyle", "get_marker"):
        assert getattr(second[0], look)() == getattr(alone[0], look)()
        assert getattr(second[0], look)() != getattr(first[0], look)()


def drawn(table: pd.DataFrame, names: dict[str, str], draw: Callable[..., None] = mean_curves) -> list:
    axes = pytest.importorskip("matplotlib.figure").Figure().subplots()
    draw(axes, paper_ink(()), table, "x", "by", names)
    return axes.containers


def test_a_measured_x_stays_where_it_was_measured() -> None:
    first, second = drawn(TABLE, NAMES, measured_curves)
    assert first[0].get_xdata().tolist() == second[0].get_xdata().tolist() == [1, 2]
    first, second = drawn(TABLE, NAMES)
    assert first[0].get_xdata()[0] < 1 < second[0].get_xdata()[0]


def test_curves_alone_at_their_x_stay_there() -> None:
    table = TABLE.assign(x=[1, 2, 3, 4])
    assert [bars[0].get_xdata().tolist() for bars in drawn(table, NAMES)] == [[1, 2], [3, 4]]


def test_points_without_an_order_are_not_joined() -> None:
    assert [bars[0].get_linestyle() for bars in drawn(TABLE, NAMES, mean_points)] == ["None", "None"]


def test_a_setting_without_a_name_is_refused() -> None:
    with pytest.raises(ValueError, match="by=b has no name: there are names for a"):
        drawn(TABLE, {"a": "first"})


def test_eight_settings_look_different() -> None:
    names = {name: name for name in "abcdefgh"}
    table = pd.DataFrame([(name, 1, 1.0, 0.1) for name in names], columns=TABLE.columns)
    looks = {(bars[0].get_color(), bars[0].get_marker()) for bars in drawn(table, names)}
    assert len({colour for colour, _ in looks}) == len(looks) == 8


def test_the_legend_has_a_title(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, path, dpi: figures.append(figure))
    save_panels(tmp_path / "study.png", lambda axes, ink: mean_curves(axes, ink, TABLE, "x", "by", NAMES), legend="exits after")
    assert figures[0].legends[0].get_title().get_text() == "exits after"


def test_panels_are_written_side_by_side(tmp_path: Path) -> None:
    def panel(axes, ink) -> None:
        mean_curves(axes, ink, TABLE, "x", "by", NAMES)

    save_panels(tmp_path / "study.png", panel, panel)
    content = (tmp_path / "study.png").read_bytes()
    width, height = (int.from_bytes(content[at : at + 4], "big") for at in (16, 20))
    assert content.startswith(b"\x89PNG")
    assert width > 1.5 * height


@pytest.mark.parametrize("names", [["a", "b"], ["balance, deferred"] * 6, ["a name as long as a name of a setting can be"] * 4])
def test_the_legend_fits_under_the_panels(names: list[str]) -> None:
    def panel(axes, ink) -> None:
        for name in names:
            axes.plot([0, 1], [0, 1], label=name)

    figure = PanelPlot("study", "", "", panel, (panel,)).figure(paper_ink(()))
    figure.canvas.draw()
    (legend,) = figure.legends
    assert legend.get_window_extent().x1 <= figure.bbox.x1
