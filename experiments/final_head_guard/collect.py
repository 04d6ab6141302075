"""final_head_guard.csv and .png from the runs of `python run.py study=final_head_guard`, whose folder is the argument."""

from __future__ import annotations

import sys
from pathlib import Path

import pandas as pd

from eellm.analysis import load_runs, metric_history, spread, within_noise
from eellm.metrics.names import FINAL, VAL_LOSS
from eellm.report.study_plot import mean_curves, save_panels

HERE = Path(__file__).parent
SETTING, CONTROL = "exits.layers", "[]"
NAMES = {"[]": "no exits", "[0.25,0.5]": "exits 1, 2", "[0.25,0.5,0.75]": "exits 1, 2, 3"}


def main(folder: str) -> None:
    history = metric_history(load_runs(folder), VAL_LOSS.format(head=FINAL))
    losses = spread(history, [SETTING, "step"], "value")
    steps = [within_noise(rows, SETTING, "value", CONTROL).assign(step=step) for step, rows in history.groupby("step", sort=True)]
    differences = pd.concat(steps, ignore_index=True)
    table = losses.merge(differences.drop(columns="n"), on=[SETTING, "step"], how="left")
    table.round(4).to_csv(HERE / "final_head_guard.csv", index=False)
    bars = differences.assign(mean=differences["difference"], std=differences["high"] - differences["difference"])

    def loss_panel(axes, ink) -> None:
        mean_curves(axes, ink, losses, "step", SETTING, NAMES)
        axes.set_ylabel("final head's held-out loss (nats)")
        axes.set_xlabel("step")

    def difference_panel(axes, ink) -> None:
        axes.axhline(0.0, color=ink.text)
        mean_curves(axes, ink, bars, "step", SETTING, NAMES)
        axes.set_ylabel("with exits minus without (95 %)")
        axes.set_xlabel("step")

    save_panels(HERE / "final_head_guard.png", loss_panel, difference_panel)


if __name__ == "__main__":
    main(sys.argv[1])
