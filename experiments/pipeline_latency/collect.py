"""pipeline_latency.csv and .png from the runs of study=pipeline_latency; arguments: their folders."""

from __future__ import annotations

import sys
from pathlib import Path

from eellm.analysis import load_runs, run_table, spread
from eellm.report.study_plot import mean_curves, save_panels

HERE = Path(__file__).parent
LAYERS = "exits.layers"
FIGURES = {"stages/full": "full_tokens_per_second", "stages/pipeline": "tokens_per_second", "stages/speedup": "speedup"}


def main(folders: list[str], output: Path = HERE) -> None:
    runs = load_runs(folders, (LAYERS, "seed")).query("status == 'done'")
    stages = int(runs.attrs["shared"]["parallel.pp"])
    figures = run_table(runs, "benchmark")
    figures["depth"] = figures[LAYERS].str.strip("[]").astype(float)
    table = figures.pivot(index=["depth", "seed"], columns="name", values="value")[list(FIGURES)].rename(columns=FIGURES)
    means = spread(table.reset_index(), "depth", "speedup").sort_values("depth")
    # what the token waits for: the layers up to its exit; but every stage passes every token
    means["bound"] = 1 / means["depth"].clip(lower=1 / stages)
    speeds = table.groupby("depth")[["full_tokens_per_second", "tokens_per_second"]].mean().reset_index()
    means = means.merge(speeds, on="depth")
    means.round(3).to_csv(output / "pipeline_latency.csv", index=False)

    def panel(axes, ink) -> None:
        curves = means.assign(curve="measured")
        mean_curves(axes, ink, curves, "depth", "curve", {"measured": "measured"})
        axes.plot(means["depth"], means["bound"], "--", color=ink.muted, label="the time of a stage, or to the exit")
        axes.axhline(1.0, color=ink.muted, linewidth=0.8, linestyle=":")
        axes.set_xlabel("depth of the exit, share of the layers")
        axes.set_ylabel("speed, times full depth\n(bars: standard deviation over seeds)")

    save_panels(output / "pipeline_latency.png", panel)


if __name__ == "__main__":
    main(sys.argv[1:])
