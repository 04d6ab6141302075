"""recompute_crossover.csv and .png from the runs of study=recompute_crossover; arguments: their folders."""

from __future__ import annotations

import sys
from pathlib import Path

from eellm.analysis import load_runs, run_table, spread, within_noise
from eellm.report.study_plot import mean_curves, save_panels

HERE = Path(__file__).parent
PENDING, TYPE = "decoding.max_pending", "precision.dtype"
NAMES = {"catch_up": "hidden states kept", "kv_recompute": "run again from layer 1"}


def main(folders: list[str], output: Path = HERE) -> None:
    runs = load_runs(folders, (PENDING, TYPE, "seed")).query("status == 'done'")
    figures = run_table(runs, "benchmark")
    figures = figures[figures["name"].isin([f"{mode}/speedup" for mode in NAMES])]
    speeds = figures.assign(mode=figures["name"].str.removesuffix("/speedup"))[[TYPE, PENDING, "mode", "seed", "value"]]
    setting = [TYPE, PENDING]
    means = spread(speeds, [*setting, "mode"], "value").sort_values([TYPE, "mode", PENDING])
    kept = within_noise(speeds, "mode", "value", "kv_recompute", each=setting)
    table = means.merge(kept.drop(columns="n"), on=[*setting, "mode"], how="left")
    table.round(3).to_csv(output / "recompute_crossover.csv", index=False)
    waits = sorted(means[PENDING].unique())
    means["place"] = means[PENDING].map(waits.index)

    def panel_of(dtype: str):
        def panel(axes, ink) -> None:
            mean_curves(axes, ink, means[means[TYPE] == dtype], "place", "mode", NAMES)
            axes.axhline(1.0, color=ink.muted, linewidth=0.8, linestyle=":")
            axes.set_xticks(range(len(waits)), [f"{wait:g}" for wait in waits])
            axes.set_ylim(0.0, 1.1 * (means["mean"] + means["std"].fillna(0.0)).max())
            axes.set_xlabel("tokens that may wait")
            axes.set_ylabel(f"{dtype}: speed, times full depth\n(bars: standard deviation over seeds)")

        return panel

    save_panels(output / "recompute_crossover.png", *map(panel_of, sorted(means[TYPE].unique(), reverse=True)))


if __name__ == "__main__":
    main(sys.argv[1:])
