"""head_architecture.csv and .png from the runs of `python run.py study=head_architecture`, whose folder is the argument."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pandas as pd

from eellm.analysis import exit_table, load_runs, run_table, spread, within_noise
from eellm.report.study_plot import mean_curves, save_panels

HERE = Path(__file__).parent
SETTING = "kind"
NAMES = {"embedding": "embedding", "norm": "norm", "mlp": "MLP", "block": "block"}


def main(folder: str) -> None:
    runs = load_runs(folder)
    # between the exits that are tuned stand those that the reference model has
    tuned = json.loads(str(runs.attrs["shared"]["tuning.layers"]))
    runs["kind"] = runs["exits.head"].str.strip("[]").str.split(",").str[0]
    heads = exit_table(runs)
    exits = heads[heads["layer"].isin(tuned)]
    losses, agreements = (spread(exits, [SETTING, "layer"], value) for value in ("loss", "agreement"))
    table = losses.merge(agreements.drop(columns="n"), on=[SETTING, "layer"], suffixes=("", "_agreement"))
    untuned = run_table(runs, "exits_untuned")
    start = spread(untuned, [SETTING, "layer"], "loss")[[SETTING, "layer", "mean"]].rename(columns={"mean": "untuned"})
    against_norm = [
        within_noise(rows, SETTING, "loss", "norm").drop(columns="n").assign(layer=layer)
        for layer, rows in exits.groupby("layer")
    ]
    table = table.merge(start, on=[SETTING, "layer"]).merge(pd.concat(against_norm), on=[SETTING, "layer"], how="left")
    table.round(4).to_csv(HERE / "head_architecture.csv", index=False)

    def panel(table, label):
        def draw(axes, ink) -> None:
            mean_curves(axes, ink, table, "layer", SETTING, NAMES)
            axes.set_xlabel("layers in front of the exit")
            axes.set_ylabel(label)

        return draw

    save_panels(
        HERE / "head_architecture.png", panel(losses, "held-out loss (nats)"), panel(agreements, "same token as the final head")
    )


if __name__ == "__main__":
    main(sys.argv[1])
