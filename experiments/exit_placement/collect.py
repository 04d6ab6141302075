"""exit_placement.csv and .png from the runs of study=exit_placement, with those of study=final_head_guard as their control;
arguments: the folders of both."""

from __future__ import annotations

import sys
from pathlib import Path

import pandas as pd

from eellm.analysis import load_runs, metric_history, spread, within_noise
from eellm.metrics.names import FINAL, VAL_LOSS, depth
from eellm.report.study_plot import mean_curves, mean_points, save_panels

HERE = Path(__file__).parent
SETTING, CONTROL = "exits.layers", "[]"


def collected(folders: list[str]) -> pd.DataFrame:
    """Some settings are in both studies: the first finished run of a setting and seed counts."""
    runs = load_runs(folders).query("status == 'done'").drop_duplicates([SETTING, "seed"])
    # the last validation, which every run has: those that were evaluated too are so on other text
    heads = metric_history(runs, VAL_LOSS.format(head="*")).query("step == step.max()").rename(columns={"value": "loss"})
    heads["head"] = heads["metric"].str.rpartition("/")[2]
    num_layers = runs.attrs["shared"]["model.num_layers"]
    heads["layer"] = [num_layers if head == FINAL else depth(head)[1] for head in heads["head"]]
    losses = spread(heads, [SETTING, "head", "layer"], "loss")
    final = within_noise(heads[heads["head"] == FINAL], SETTING, "loss", CONTROL).assign(head=FINAL)
    table = losses.merge(final.drop(columns="n"), on=[SETTING, "head"], how="left")
    exits = table[table["head"] != FINAL].sort_values("layer").groupby(SETTING)["layer"].agg(tuple)
    table["exits"] = [", ".join(map(str, exits.get(setting, ()))) or "none" for setting in table[SETTING]]
    order = table[SETTING].map({setting: (len(layers), layers) for setting, layers in exits.items()} | {CONTROL: (0, ())})
    return table.assign(order=order).sort_values(["order", "layer"], ignore_index=True).drop(columns=["order", SETTING])


def draw(table: pd.DataFrame, path: Path) -> None:
    names = {name: name for name in table["exits"].unique()}
    compared = table.dropna(subset=["difference"])
    bars = compared.assign(mean=compared["difference"], std=compared["high"] - compared["difference"], place=range(len(compared)))

    def loss_panel(axes, ink) -> None:
        mean_curves(axes, ink, table, "layer", "exits", names)
        axes.set_xlabel("layers in front of the head")
        axes.set_ylabel("held-out loss (nats), ± deviation")

    def final_panel(axes, ink) -> None:
        axes.axhline(0.0, color=ink.text)
        mean_points(axes, ink, bars, "place", "exits", names)
        axes.set_xticks(range(len(bars)), list(bars["exits"]), fontsize=7)
        axes.set_xlabel("exits after layers")
        axes.set_ylabel("final head minus control, 95 %")

    save_panels(path, loss_panel, final_panel, legend="exits after layers")


def main(folders: list[str], output: Path = HERE) -> None:
    table = collected(folders)
    table[["exits", *table.columns.drop("exits")]].round(4).to_csv(output / "exit_placement.csv", index=False)
    draw(table, output / "exit_placement.png")


if __name__ == "__main__":
    main(sys.argv[1:])
