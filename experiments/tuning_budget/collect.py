"""tuning_budget.csv and .png from the runs of `python run.py study=tuning_budget`; arguments: their folders."""

from __future__ import annotations

import sys
from pathlib import Path

import pandas as pd

from eellm.analysis import load_runs, metric_history, spread, within_noise
from eellm.metrics.names import VAL_LOSS
from eellm.report.study_plot import mean_curves, save_panels

HERE = Path(__file__).parent
LAYERS, RATE = "tuning.layers", "optimizer.lr"
POINT = [LAYERS, "exit", "tokens"]


def collected(folders: list[str]) -> pd.DataFrame:
    """`difference`...: from the rate in the middle, seed by seed."""
    runs = load_runs(folders, (LAYERS, RATE)).query("status == 'done'")
    shared = runs.attrs["shared"]
    history = metric_history(runs, VAL_LOSS.format(head="exit_*"))
    history["exit"] = history["metric"].str.rpartition("/")[2]
    history["tokens"] = history["step"] * shared["data.global_batch_size"] * shared["data.sequence_length"]
    rates = sorted(history[RATE].unique())
    middle = rates[len(rates) // 2]
    differences = within_noise(history, RATE, "value", middle, each=POINT).drop(columns="n").astype({RATE: float})
    table = spread(history, [*POINT, RATE], "value").merge(differences, on=[*POINT, RATE], how="left")
    return table.sort_values([*POINT, RATE], ignore_index=True)


def draw(table: pd.DataFrame, path: Path) -> None:
    names = {rate: f"{rate:g}" for rate in sorted(table[RATE].unique())}
    together = table[table[LAYERS] == max(table[LAYERS], key=lambda layers: layers.count(","))]

    def panel(head):
        def draw(axes, ink) -> None:
            rows = together[together["exit"] == head]
            mean_curves(axes, ink, rows.assign(thousands=rows["tokens"] / 1000), "thousands", RATE, names)
            axes.set_title(f"exit after layer {int(head.removeprefix('exit_'))}", fontsize=9, color=ink.muted)
            axes.set_xlabel("thousands of tokens")
            axes.set_ylabel("held-out loss (nats), ± deviation")

        return draw

    first, *_, last = sorted(together["exit"].unique())
    save_panels(path, panel(first), panel(last), legend="learning rate")


def main(folders: list[str], output: Path = HERE) -> None:
    table = collected(folders)
    table.round(4).to_csv(output / "tuning_budget.csv", index=False)
    draw(table, output / "tuning_budget.png")


if __name__ == "__main__":
    main(sys.argv[1:])
