"""training_overhead.csv and .png from the runs of `python run.py study=training_overhead`, whose folder is the argument."""

from __future__ import annotations

import sys
from pathlib import Path

import pandas as pd

from eellm.analysis import load_runs, run_table
from eellm.report.drawing import line_with_bars, mode_style
from eellm.report.study_plot import save_panels

HERE = Path(__file__).parent
BESIDE = 0.04
"""How far neighbouring curves are moved, in exits."""
FIGURES = {
    "time/without_exits": "seconds_without",
    "time/with_exits": "seconds_with",
    "time/added": "seconds_added",
    "time/exits_alone": "seconds_exits_alone",
    "memory/without_exits": "megabytes_without",
    "memory/with_exits": "megabytes_with",
    "memory/added": "megabytes_added",
}


def collected(folder: str) -> pd.DataFrame:
    """A row for each setting; times are medians of alternating pairs, `low` and `high` their difference's 95 % interval."""
    figures = run_table(load_runs(folder), "benchmark")
    figures["exits"] = figures["exits.layers"].str.count(",") + 1
    setting = ["exits", "exits.deferred", "exits.boundary"]
    table = figures.pivot(index=setting, columns="name", values="value")[list(FIGURES)].rename(columns=FIGURES)
    added = figures[figures["name"] == "time/added"].set_index(setting)
    table[["low", "high"]] = added[["low", "high"]]
    table["time_share"] = table["seconds_added"] / table["seconds_without"]
    return (
        table.reset_index()
        .rename(columns=lambda name: name.removeprefix("exits."))
        .sort_values(["exits", "deferred", "boundary"])
    )


def draw(table: pd.DataFrame, path: Path) -> None:
    """Colour and marker say where the exit on the boundary stands; full lines and markers are deferred exits."""
    groups = list(table.groupby(["boundary", "deferred"]))
    boundaries = list(dict.fromkeys(boundary for (boundary, _), _ in groups))

    def curves(axes, ink, column: str, label: str, bars: bool) -> None:
        for index, ((boundary, deferred), rows) in enumerate(groups):
            full = str(deferred) == "True"
            style = {**mode_style(boundaries.index(boundary), ink), "linestyle": "-" if full else (0, (3, 2))}
            style |= {} if full else {"markerfacecolor": ink.background}
            style["label"] = f"{boundary}, {'deferred' if full else 'eager'}"
            interval = [
                rows[column] - rows["low"] / rows["seconds_without"],
                rows["high"] / rows["seconds_without"] - rows[column],
            ]
            line_with_bars(axes, rows["exits"] + BESIDE * (index - 2.5), rows[column], interval if bars else None, style)
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
