"""init_copy_vs_random.csv and .png from the runs of `python run.py study=init_copy_vs_random`, whose folder is the argument."""

from __future__ import annotations

import sys
from pathlib import Path

from eellm.analysis import load_runs, metric_history, spread
from eellm.metrics.names import VAL_LOSS
from eellm.report.study_plot import mean_curves, save_panels

HERE = Path(__file__).parent
SETTING = ["kind", "exits.init"]
NAMES = {"mlp copy": "MLP, copy", "mlp random": "MLP, random", "block copy": "block, copy", "block random": "block, random"}


def main(folder: str) -> None:
    runs = load_runs(folder)
    # behind the exits that are tuned, the list names those that the reference model has
    runs["kind"] = runs["exits.head"].str.strip("[]").str.split(",").str[0]
    history = metric_history(runs, VAL_LOSS.format(head="exit_*"))
    history["head"] = history["metric"].str.rpartition("/")[2]
    losses = spread(history, [*SETTING, "head", "step"], "value").sort_values([*SETTING, "head", "step"])
    losses.round(4).to_csv(HERE / "init_copy_vs_random.csv", index=False)
    losses["curve"] = losses["kind"] + " " + losses["exits.init"]

    def panel(head):
        def draw(axes, ink) -> None:
            mean_curves(axes, ink, losses[losses["head"] == head], "step", "curve", NAMES)
            axes.set_title(head, fontsize=9, color=ink.muted)
            axes.set_xlabel("step")
            axes.set_ylabel("held-out loss (nats)")

        return draw

    first, *_, last = sorted(losses["head"].unique())
    save_panels(HERE / "init_copy_vs_random.png", panel(first), panel(last))


if __name__ == "__main__":
    main(sys.argv[1])
