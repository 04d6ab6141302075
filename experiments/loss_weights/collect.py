"""loss_weights.csv and .png from the runs of both commands of the README; arguments: their folders."""

from __future__ import annotations

import sys
from pathlib import Path

import pandas as pd

from eellm.analysis import exit_table, load_runs, spread, within_noise
from eellm.report.study_plot import mean_curves, save_panels

HERE = Path(__file__).parent
KINDS = ("warmup", "constant", "token_confidence", "rotating", "cooldown")
HEADS = {"exit_01": "after layer 1", "exit_02": "after layer 2", "final": "final"}
BASELINE = "constant 0.5"


def main(folders: list[str]) -> None:
    runs = load_runs(folders)
    heads = exit_table(runs[runs["status"] == "done"])
    heads["setting"] = heads["loss_weights.kind"] + " " + heads["loss_weights.values"].astype(str)
    losses = spread(heads, ["head", "loss_weights.kind", "loss_weights.values", "setting"], "loss")
    compared = [within_noise(rows, "setting", "loss", BASELINE).assign(head=head) for head, rows in heads.groupby("head")]
    table = losses.merge(pd.concat(compared).drop(columns="n"), on=["head", "setting"], how="left")
    table.drop(columns="setting").round(4).to_csv(HERE / "loss_weights.csv", index=False)

    drawn = losses[losses["n"] > 1]  # one seed is no result
    sizes = drawn[drawn["loss_weights.kind"] == "constant"].sort_values("loss_weights.values")
    schedules = drawn[drawn["loss_weights.values"] == 0.5]
    kinds = [kind for kind in KINDS if kind in set(schedules["loss_weights.kind"])]

    def size_panel(axes, ink) -> None:
        mean_curves(axes, ink, sizes, "loss_weights.values", "head", HEADS)
        axes.set_xlabel("weight of each exit")
        axes.set_ylabel("held-out loss (nats)")

    def kind_panel(axes, ink) -> None:
        places = schedules["loss_weights.kind"].map({kind: place for place, kind in enumerate(kinds)})
        mean_curves(axes, ink, schedules.assign(place=places).sort_values("place"), "place", "head", HEADS)
        axes.set_xticks(range(len(kinds)), [kind.replace("_", "\n") for kind in kinds], fontsize=7)
        axes.set_xlabel("schedule of the weight 0.5")
        axes.set_ylabel("held-out loss (nats)")

    panels = [size_panel] if sizes["loss_weights.values"].nunique() > 1 else []
    save_panels(HERE / "loss_weights.png", *panels, kind_panel)


if __name__ == "__main__":
    main(sys.argv[1:])
