"""final_head_guard.csv and .png from the runs of `python run.py study=final_head_guard`; arguments: their folders."""

from __future__ import annotations

import sys
from pathlib import Path

import pandas as pd

from eellm.analysis import load_runs, metric_history, spread, within_noise
from eellm.metrics.names import FINAL, VAL_LOSS, depth
from eellm.report.study_plot import mean_curves, save_panels

HERE = Path(__file__).parent
CONTROL = "none"


def collected(folders: list[str]) -> pd.DataFrame:
    runs = load_runs(folders).query("status == 'done'")
    history = metric_history(runs, VAL_LOSS.format(head="*"))
    history["head"] = history["metric"].str.rpartition("/")[2]
    exits = history[history["head"] != FINAL].groupby("run")["head"].agg(lambda heads: sorted({depth(head)[1] for head in heads}))
    history["exits"] = [", ".join(map(str, exits.get(run, []))) or CONTROL for run in history["run"]]
    history = history[history["head"] == FINAL]
    differences = within_noise(history, "exits", "value", CONTROL, each="step").drop(columns="n")
    table = spread(history, ["exits", "step"], "value").merge(differences, on=["exits", "step"], how="left")
    order = table["exits"].map(lambda name: 0 if name == CONTROL else 1 + name.count(","))
    return table.assign(order=order).sort_values(["order", "exits", "step"], ignore_index=True).drop(columns="order")


def draw(table: pd.DataFrame, path: Path) -> None:
    names = {name: name for name in table["exits"].unique()}
    compared = table.dropna(subset=["difference"])
    bars = compared.assign(mean=compared["difference"], std=compared["high"] - compared["difference"])

    def loss_panel(axes, ink) -> None:
        mean_curves(axes, ink, table, "step", "exits", names)
        axes.set_ylabel("final head's loss (nats), ± deviation")
        axes.set_xlabel("step")

    def difference_panel(axes, ink) -> None:
        axes.axhline(0.0, color=ink.text)
        mean_curves(axes, ink, bars, "step", "exits", names)
        axes.set_ylabel("with exits minus without, 95 %")
        axes.set_xlabel("step")

    save_panels(path, loss_panel, difference_panel, legend="exits after layers")


def main(folders: list[str], output: Path = HERE) -> None:
    table = collected(folders)
    table.round(4).to_csv(output / "final_head_guard.csv", index=False)
    draw(table, output / "final_head_guard.png")


if __name__ == "__main__":
    main(sys.argv[1:])
