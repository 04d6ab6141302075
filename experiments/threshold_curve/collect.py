"""threshold_curve.csv and .png from the runs of the README's commands; arguments: their folders."""

from __future__ import annotations

import sys
from pathlib import Path

import pandas as pd

from eellm.analysis import load_runs, speed_quality, spread, within_noise
from eellm.analysis.comparison import t_quantile
from eellm.report.study_plot import mean_curves, measured_curves, save_panels

HERE = Path(__file__).parent
POINT = ["decoding", "threshold", "agreement", "mean_layers"]
RECOMPUTED, STAGES = "kv_recompute", "pipeline"


def collected(folders: list[str]) -> pd.DataFrame:
    """`low` and `high`: the 95 % interval of the mean over seeds. `difference`...: from `kv_recompute`, seed by seed; not of
    `pipeline`, whose full depth is another one's."""
    rows = speed_quality(load_runs(folders).query("status == 'done'"))
    rows = rows[rows["decoding"] != "full"]
    table = spread(rows, POINT, "speedup")
    half = [t_quantile(n - 1) * std / n**0.5 if n > 1 else float("nan") for n, std in zip(table["n"], table["std"], strict=True)]
    table = table.assign(low=table["mean"] - half, high=table["mean"] + half)
    on_one = rows[rows["decoding"] != STAGES]
    if RECOMPUTED in set(on_one["decoding"]):
        differences = within_noise(on_one, "decoding", "speedup", RECOMPUTED, each="threshold").drop(columns="n")
        differences = differences.rename(columns={"low": "difference_low", "high": "difference_high"})
        table = table.merge(differences, on=["decoding", "threshold"], how="left")
    return table.sort_values(["decoding", "threshold"], ignore_index=True)


def draw(table: pd.DataFrame, path: Path) -> None:
    """`pipeline` has a panel of its own: its speed is relative to two stages, which is another clock."""
    names = {mode: mode for mode in table["decoding"].unique()}

    def panel(rows: pd.DataFrame, x: str, label: str, title: str):
        def draw(axes, ink) -> None:
            axes.axhline(1.0, color=ink.muted, linestyle=":")
            draw_curves = mean_curves if x == "threshold" else measured_curves
            draw_curves(axes, ink, rows, x, "decoding", names)
            axes.set_title(title, fontsize=9, color=ink.muted)
            axes.set_xlabel(label)
            axes.set_ylabel("speed / full depth, ± deviation")

        return draw

    one, staged = table[table["decoding"] != STAGES], table[table["decoding"] == STAGES]
    panels = []
    if len(one):
        panels += [
            panel(one, "agreement", "same token as full depth", "on one rank"),
            panel(one, "threshold", "threshold", "on one rank"),
        ]
    if len(staged):
        panels.append(panel(staged, "threshold", "threshold", "over pipeline stages"))
    save_panels(path, *panels, legend="decoding")


def main(folders: list[str], output: Path = HERE) -> None:
    table = collected(folders)
    table.round(4).to_csv(output / "threshold_curve.csv", index=False)
    draw(table, output / "threshold_curve.png")


if __name__ == "__main__":
    main(sys.argv[1:])
