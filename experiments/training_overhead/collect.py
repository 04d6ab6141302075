"""training_overhead.csv and .png from the runs of `python run.py study=training_overhead`, whose folder is the argument."""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd

from eellm.analysis import load_runs, run_table

HERE = Path(__file__).parent
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
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    looks = {"end": "o", "start": "s", "balance": "^"}
    for axes, column, label in zip(
        panels, ("time_share", "megabytes_added"), ("step time added, share", "peak memory added, MB"), strict=True
    ):
        for (deferred, boundary), own in table.groupby(["deferred", "boundary"]):
            style = "-" if str(deferred) == "True" else "--"
            name = f"{'deferred' if style == '-' else 'eager'}, {boundary}"
            axes.plot(own["exits"], own[column], style, marker=looks[str(boundary)], label=name)
        axes.set(xlabel="exits", ylabel=label, xticks=[1, 2, 3], ylim=(0, None))
        axes.spines[["top", "right"]].set_visible(False)
    panels[1].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=160)


def main(folder: str) -> None:
    table = collected(folder)
    table.round(4).to_csv(HERE / "training_overhead.csv", index=False)
    draw(table, HERE / "training_overhead.png")
    print(table.to_string(index=False, float_format=lambda value: f"{value:.3f}"))


if __name__ == "__main__":
    main(sys.argv[1])
