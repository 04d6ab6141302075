"""recompute_crossover.csv and .png from the runs of study=recompute_crossover; argument: their folder."""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd

from eellm.analysis import load_runs, run_table

HERE = Path(__file__).parent
PENDING, TYPE = "decoding.max_pending", "precision.dtype"
LOOKS = {"kv_recompute": ("s", "#D55E00", "run again from layer 1"), "catch_up": ("o", "#0072B2", "hidden states kept")}


def main(folder: str) -> None:
    runs = load_runs(folder).query("status == 'done'")
    for setting in (PENDING, TYPE):  # a column of its own only where it differs between the runs
        runs[setting] = runs.get(setting, runs.attrs["shared"].get(setting))
    table = run_table(runs, "benchmark")
    table = table[table["name"].isin([f"{mode}/speedup" for mode in LOOKS])]
    table = table.assign(mode=table["name"].str.removesuffix("/speedup"), speedup=table["median"])
    table = table[[TYPE, "mode", PENDING, "speedup", "low", "high"]].sort_values([TYPE, "mode", PENDING])
    table.round(3).to_csv(HERE / "recompute_crossover.csv", index=False)
    draw(table)


def draw(table: pd.DataFrame) -> None:
    types = sorted(table[TYPE].unique(), reverse=True)
    figure, panels = plt.subplots(
        1, len(types), figsize=(3.6 * len(types), 3.4), sharey=True, squeeze=False, layout="constrained"
    )
    for axes, dtype in zip(panels[0], types, strict=True):
        for mode, (marker, colour, label) in LOOKS.items():
            rows = table[(table[TYPE] == dtype) & (table["mode"] == mode)]
            bars = (rows["speedup"] - rows["low"], rows["high"] - rows["speedup"])
            axes.errorbar(
                rows[PENDING], rows["speedup"], yerr=bars, marker=marker, color=colour, fillstyle="none", label=label, capsize=2
            )
        axes.axhline(1.0, color="grey", linewidth=0.8, linestyle=":")
        axes.set_xscale("log", base=2)
        axes.set_xticks(sorted(table[PENDING].unique()), sorted(table[PENDING].unique()))
        axes.set_title(dtype)
        axes.set_xlabel("tokens that may wait")
    panels[0][0].set_ylabel("speed / full depth")
    panels[0][0].legend(frameon=False, fontsize=8)
    figure.savefig(HERE / "recompute_crossover.png", dpi=160)


if __name__ == "__main__":
    main(sys.argv[1])
