"""pipeline_latency.csv and .png from the runs of study=pipeline_latency; argument: their folder."""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd

from eellm.analysis import load_runs, run_table

HERE = Path(__file__).parent
LAYERS = "exits.layers"


def main(folder: str) -> None:
    runs = load_runs(folder).query("status == 'done'")
    stages = int(runs.attrs["shared"]["parallel.pp"])
    table = run_table(runs, "benchmark")
    table = table[table["name"] == "stages/speedup"].assign(speedup=table["median"])
    table["depth"] = table[LAYERS].str.strip("[]").astype(float)
    # what the token waits for: the layers up to its exit; but every stage passes every token
    table["bound"] = 1 / table["depth"].clip(lower=1 / stages)
    table = table[["depth", "speedup", "low", "high", "bound"]].sort_values("depth")
    table.round(3).to_csv(HERE / "pipeline_latency.csv", index=False)
    draw(table)


def draw(table: pd.DataFrame) -> None:
    figure, axes = plt.subplots(figsize=(5, 3.4), layout="constrained")
    axes.plot(table["depth"], table["bound"], "--", color="#0072B2", label="time to the exit, stages alike")
    bars = (table["speedup"] - table["low"], table["high"] - table["speedup"])
    axes.errorbar(
        table["depth"], table["speedup"], yerr=bars, marker="s", color="#D55E00", fillstyle="none", label="measured", capsize=2
    )
    axes.axhline(1.0, color="grey", linewidth=0.8, linestyle=":")
    axes.set_xlabel("depth of the exit")
    axes.set_ylabel("speed / full depth on the same stages")
    axes.legend(frameon=False)
    figure.savefig(HERE / "pipeline_latency.png", dpi=160)


if __name__ == "__main__":
    main(sys.argv[1])
