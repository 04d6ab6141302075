"""tuning_budget.csv and .png from the runs of `python run.py study=tuning_budget`, whose folder is the argument."""

from __future__ import annotations

import sys
from pathlib import Path

from eellm.analysis import load_runs, metric_history, spread
from eellm.metrics.names import VAL_LOSS
from eellm.report.study_plot import mean_curves, save_panels

HERE = Path(__file__).parent
RATES = {0.001: "1e-3", 0.003: "3e-3", 0.01: "1e-2"}


def main(folder: str) -> None:
    runs = load_runs(folder)
    shared = runs.attrs["shared"]
    history = metric_history(runs, VAL_LOSS.format(head="exit_*"))
    history["exit"] = history["metric"].str.rpartition("/")[2]
    history["tokens"] = history["step"] * shared["data.global_batch_size"] * shared["data.sequence_length"]
    losses = spread(history, ["tuning.layers", "exit", "optimizer.lr", "tokens"], "value")
    losses.round(4).to_csv(HERE / "tuning_budget.csv", index=False)
    together = losses[losses["tuning.layers"] == max(losses["tuning.layers"], key=len)]

    def panel(exit_):
        def draw(axes, ink) -> None:
            rows = together[together["exit"] == exit_]
            mean_curves(axes, ink, rows.assign(thousands=rows["tokens"] / 1000), "thousands", "optimizer.lr", RATES)
            axes.set_title(exit_, fontsize=9, color=ink.muted)
            axes.set_xlabel("thousands of tokens")
            axes.set_ylabel("held-out loss (nats)")

        return draw

    first, *_, last = sorted(together["exit"].unique())
    save_panels(HERE / "tuning_budget.png", panel(first), panel(last))


if __name__ == "__main__":
    main(sys.argv[1])
