"""loss_weights.csv and .png from the runs of both commands of the README; arguments: their folders."""

from __future__ import annotations

import sys
from pathlib import Path

import pandas as pd

from eellm.analysis import load_runs, metric_history, spread, within_noise
from eellm.metrics.names import FINAL, VAL_LOSS
from eellm.report.study_plot import mean_curves, mean_points, save_panels

HERE = Path(__file__).parent
KIND, VALUES = "loss_weights.kind", "loss_weights.values"
BASELINE = "constant 0.5"


def collected(folders: list[str]) -> pd.DataFrame:
    runs = load_runs(folders, (KIND, VALUES)).query("status == 'done'")
    # the last validation, which every run has: those that were evaluated too are so on other text
    heads = metric_history(runs, VAL_LOSS.format(head="*")).query("step == step.max()").rename(columns={"value": "loss"})
    heads["head"] = heads["metric"].str.rpartition("/")[2]
    heads["setting"] = heads[KIND] + " " + heads[VALUES].astype(str)
    losses = spread(heads, ["head", KIND, VALUES, "setting"], "loss")
    differences = within_noise(heads, "setting", "loss", BASELINE, each="head").drop(columns="n")
    table = losses.merge(differences, on=["head", "setting"], how="left")
    table["schedule"] = table[KIND] != "constant"
    table = table.sort_values(["schedule", KIND, VALUES, "head"], ignore_index=True)
    return table.drop(columns=["setting", "schedule"])


def draw(table: pd.DataFrame, path: Path) -> None:
    """Left the losses by size of the weight, right the differences of schedules from the constant weight."""
    names = {
        head: "final" if head == FINAL else f"exit after {int(head.removeprefix('exit_'))}" for head in table["head"].unique()
    }
    sizes = table[table[KIND] == "constant"]
    schedules = table[table[KIND] != "constant"].dropna(subset=["low"])
    kinds = list(schedules[KIND].unique())
    places = schedules[KIND].map({kind: place for place, kind in enumerate(kinds)})
    bars = schedules.assign(place=places, mean=schedules["difference"], std=schedules["high"] - schedules["difference"])

    def size_panel(axes, ink) -> None:
        mean_curves(axes, ink, sizes, VALUES, "head", names)
        axes.set_xlabel("weight of each exit")
        axes.set_ylabel("held-out loss (nats), ± deviation")

    def kind_panel(axes, ink) -> None:
        axes.axhline(0.0, color=ink.text)
        mean_points(axes, ink, bars, "place", "head", names)
        axes.set_xticks(range(len(kinds)), [kind.replace("_", "\n") for kind in kinds], fontsize=7)
        axes.set_xlabel("schedule of the weight")
        axes.set_ylabel(f"loss minus {BASELINE}, 95 %")

    save_panels(path, size_panel, *([kind_panel] if kinds else []), legend="head")


def main(folders: list[str], output: Path = HERE) -> None:
    table = collected(folders)
    table.round(4).to_csv(output / "loss_weights.csv", index=False)
    draw(table, output / "loss_weights.png")


if __name__ == "__main__":
    main(sys.argv[1:])
