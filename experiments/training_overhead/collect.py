"""training_overhead.csv and .png, and what is concluded of them over all settings in conclusions.csv, from the runs of
study=training_overhead; arguments: their folders."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pandas as pd

from eellm.analysis import load_runs, run_table, spread, within_noise
from eellm.report.study_plot import mean_curves, save_panels

HERE = Path(__file__).parent
SCHEDULES = {"one_f_one_b": "1F1B", "gpipe": "GPipe", "bubble_filling": "bubble filling", "csv": "from a file"}
LAYOUT = ["parallel.pp", "parallel.vp", "schedule.name"]
SETTING = ["layout", "exits", "boundary", "deferred"]
FIGURES = {
    "time/without_exits": "seconds_without",
    "time/added": "seconds_added",
    "time/exits_alone": "seconds_exits_alone",
    "memory/without_exits": "megabytes_without",
    "memory/with_exits": "megabytes_with",
    "memory/added": "megabytes_added",
    "memory/added_to_rank": "megabytes_added_to_rank",
    "executor/ratio": "executor_ratio",
}


def name_of(pp: int, vp: int, schedule: str) -> str:
    if pp == 1:
        return "one rank"
    if vp > 1:
        return f"{pp} x {vp} chunks, interleaved"
    return f"{pp} stages, {SCHEDULES.get(schedule, '1F1B')}"


def runs_of(folders: list[str]) -> pd.DataFrame:
    """A row for each run; times are medians of alternating pairs, `share` what exits add to the step without them."""
    settings = [*LAYOUT, "exits.layers", "exits.boundary", "exits.deferred", "seed"]
    runs = load_runs(folders, settings).query("status == 'done'").sort_values([*LAYOUT, "exits.layers"])
    figures = run_table(runs, "benchmark")
    names = [name_of(*setting) for setting in figures[LAYOUT].itertuples(index=False)]
    figures["layout"] = pd.Categorical(names, list(dict.fromkeys(names)), ordered=True)
    figures["exits"] = figures["exits.layers"].str.count(",") + 1
    figures = figures.rename(columns={"exits.boundary": "boundary", "exits.deferred": "deferred"})
    table = figures.pivot(index=[*SETTING, "seed"], columns="name", values="value").reindex(columns=list(FIGURES))
    table = table.rename(columns=FIGURES).reset_index()
    table["share"] = table["seconds_added"] / table["seconds_without"]
    table["ratio_to_exits_alone"] = table["seconds_added"] / table["seconds_exits_alone"]
    return table.sort_values(SETTING, ignore_index=True)


def collected(runs: pd.DataFrame) -> pd.DataFrame:
    """A row for each setting: mean over seeds, and the deviation of the share of time."""
    means = runs.groupby(SETTING, observed=True).mean(numeric_only=True).drop(columns=["seed", "share"])
    shares = spread(runs, SETTING, "share").set_index(SETTING).rename(columns={"mean": "share", "std": "share_std"})
    return shares.join(means).reset_index().sort_values(SETTING, ignore_index=True)


def conclusions(runs: pd.DataFrame) -> pd.DataFrame:
    """The share of time that exits add, over runs of all layouts, and what deferral changes of it: each setting and seed with
    deferral against the same without."""
    by_exits = spread(runs, "exits", "share").assign(what=lambda rows: rows["exits"].astype(str) + " exits, share of a step")
    pairs = runs.assign(pair=runs[["layout", "exits", "boundary", "seed"]].astype(str).agg(" ".join, axis=1))
    groups = [("all", pairs), *pairs.groupby("layout", observed=True)]
    deferral = pd.concat(
        within_noise(own, "deferred", "share", False, pair="pair").assign(what=f"deferred minus eager, share of a step, {name}")
        for name, own in groups
    )
    rows = by_exits.rename(columns={"mean": "value"})[["what", "value", "std", "n"]]
    ratios = [
        {"what": name, "value": runs[column].median(), "low": runs[column].quantile(0.25), "high": runs[column].quantile(0.75),
         "n": runs[column].count()}
        for name, column in {"added / exits alone, median and quartiles": "ratio_to_exits_alone",
                             "executor / Megatron's schedule, median and quartiles": "executor_ratio"}.items()
    ]  # fmt: skip
    differences = deferral.rename(columns={"difference": "value"})[["what", "value", "low", "high", "n", "within_noise"]]
    return pd.concat([rows, differences, pd.DataFrame(ratios)], ignore_index=True)


def draw(table: pd.DataFrame, path: Path) -> None:
    """The time added, a panel for each layout. Exits between stages end the first."""
    at_the_end = table[table["boundary"] == "end"]
    layouts = list(dict.fromkeys(at_the_end["layout"]))
    top = (at_the_end["share"] + at_the_end["share_std"].fillna(0.0)).max() * 1.15

    def time_panel(layout: str) -> Callable[..., None]:
        def panel(axes, ink) -> None:
            rows = at_the_end[at_the_end["layout"] == layout].rename(columns={"share": "mean", "share_std": "std"})
            mean_curves(axes, ink, rows, "exits", "deferred", {True: "deferred", False: "eager"})
            axes.axhline(0.0, color=ink.muted, linewidth=1.0)
            axes.set_ylim(min(-0.05, (rows["mean"] - rows["std"].fillna(0.0)).min() * 1.15), top)
            axes.set_xticks(sorted(rows["exits"].unique()))
            axes.set_xlabel(f"exits\n{layout}")
            axes.set_ylabel("step time added, share\n(bars: standard deviation)" if layout == layouts[0] else "")

        return panel

    save_panels(path, *map(time_panel, layouts))


def main(folders: list[str], output: Path = HERE) -> None:
    runs = runs_of(folders)
    table, found = collected(runs), conclusions(runs)
    table.round(4).to_csv(output / "training_overhead.csv", index=False)
    found.round(4).to_csv(output / "conclusions.csv", index=False)
    draw(table, output / "training_overhead.png")
    for frame in (table, found):
        print(frame.to_string(index=False, float_format=lambda value: f"{value:.3f}"))


if __name__ == "__main__":
    main(sys.argv[1:])
