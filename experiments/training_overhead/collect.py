"""training_overhead.csv and .png from the runs of `python run.py study=training_overhead`, whose folder is the argument."""

from __future__ import annotations

import sys
from pathlib import Path

import pandas as pd

from eellm.analysis import load_runs, run_table
from eellm.report.drawing import line_with_bars, mode_style
from eellm.report.study_plot import save_panels

HERE = Path(__file__).parent
BESIDE = 0.03
"""How far neighbouring curves are moved, in exits."""
LAYOUTS = {
    (1, 1, "auto"): "one rank",
    (2, 1, "auto"): "2 stages, 1F1B",
    (2, 1, "gpipe"): "2 stages, GPipe",
    (2, 2, "auto"): "2 x 2 chunks, interleaved",
}
"""(parallel.pp, parallel.vp, schedule.name) -> what it is called, in the order of the figure."""
SETTINGS = ["parallel.pp", "parallel.vp", "schedule.name", "exits.layers", "exits.boundary", "exits.deferred"]
FIGURES = {
    "time/without_exits": "seconds_without",
    "time/with_exits": "seconds_with",
    "time/added": "seconds_added",
    "time/exits_alone": "seconds_exits_alone",
    "time/ratio": "ratio_to_exits_alone",
    "memory/without_exits": "megabytes_without",
    "memory/with_exits": "megabytes_with",
    "memory/added": "megabytes_added",
    "executor/ratio": "executor_ratio",
}


def collected(folder: str) -> pd.DataFrame:
    """A row for each setting; times are medians of alternating pairs, `low` and `high` the 95 % interval of what is added."""
    runs = load_runs(folder)
    for key in set(SETTINGS) - set(runs):  # where only a part of the study has been run
        runs[key] = [runs.attrs["shared"][key]] * len(runs)
    figures = run_table(runs, "benchmark")
    figures["layout"] = [LAYOUTS[tuple(setting)] for setting in figures[SETTINGS[:3]].itertuples(index=False)]
    figures["exits"] = figures["exits.layers"].str.count(",") + 1
    setting = ["layout", "exits", "exits.boundary", "exits.deferred"]
    table = figures.pivot(index=setting, columns="name", values="value").reindex(columns=list(FIGURES)).rename(columns=FIGURES)
    added = figures[figures["name"] == "time/added"].set_index(setting)
    table[["low", "high"]] = added[["low", "high"]]
    for share, seconds in {"time_share": "seconds_added", "share_low": "low", "share_high": "high"}.items():
        table[share] = table[seconds] / table["seconds_without"]
    table = table.reset_index().rename(columns=lambda name: name.removeprefix("exits."))
    return table.sort_values(setting[:2] + ["boundary", "deferred"], key=_places, ignore_index=True)


def _places(column: pd.Series) -> pd.Series:
    return column.map(list(LAYOUTS.values()).index) if column.name == "layout" else column


def draw(table: pd.DataFrame, path: Path) -> None:
    """Colour and marker say the layout; full lines and markers are deferred exits. Exits between stages end the first."""
    at_the_end = table[table["boundary"] == "end"]
    groups = list(at_the_end.groupby(["layout", "deferred"], sort=False))
    layouts = list(LAYOUTS.values())

    def curves(axes, ink, column: str, label: str, bars: bool) -> None:
        for index, ((layout, deferred), rows) in enumerate(groups):
            style = mode_style(layouts.index(layout), ink) | {"label": f"{layout}, {'deferred' if deferred else 'eager'}"}
            style |= {"linestyle": "-"} if deferred else {"linestyle": (0, (3, 2)), "markerfacecolor": ink.background}
            interval = [rows[column] - rows["share_low"], rows["share_high"] - rows[column]]
            places = rows["exits"] + BESIDE * (index - (len(groups) - 1) / 2)
            line_with_bars(axes, places, rows[column], interval if bars else None, style)
        axes.axhline(0.0, color=ink.muted, linewidth=1.0)
        axes.set_xticks([1, 2, 3])
        axes.set_xlabel("exits")
        axes.set_ylabel(label)

    save_panels(
        path,
        lambda axes, ink: curves(axes, ink, "time_share", "step time added, share", bars=True),
        lambda axes, ink: curves(axes, ink, "megabytes_added", "peak memory added, MB", bars=False),
    )


def main(folder: str) -> None:
    table = collected(folder)
    table.round(4).to_csv(HERE / "training_overhead.csv", index=False)
    draw(table, HERE / "training_overhead.png")
    print(table.to_string(index=False, float_format=lambda value: f"{value:.3f}"))


if __name__ == "__main__":
    main(sys.argv[1])
