"""init_copy_vs_random.csv and .png from the runs of `python run.py study=init_copy_vs_random`; arguments: their folders."""

from __future__ import annotations

import sys
from pathlib import Path

import pandas as pd

from eellm.analysis import load_runs, metric_history, spread
from eellm.metrics.names import VAL_LOSS
from eellm.report.study_plot import mean_curves, save_panels

HERE = Path(__file__).parent
HEADS, INIT = "exits.head", "exits.init"


def collected(folders: list[str]) -> pd.DataFrame:
    runs = load_runs(folders, (HEADS, INIT)).query("status == 'done'")
    # `exits.head` also names the heads that the model brought along
    runs["kind"] = runs[HEADS].str.strip("[]").str.split(",").str[0]
    history = metric_history(runs, VAL_LOSS.format(head="exit_*"))
    history["head"] = history["metric"].str.rpartition("/")[2]
    keys = ["kind", INIT, "head", "step"]
    return spread(history, keys, "value").sort_values(keys, ignore_index=True)


def draw(table: pd.DataFrame, path: Path) -> None:
    table = table.assign(curve=table["kind"].replace("mlp", "MLP") + ", " + table[INIT])
    names = {curve: curve for curve in table["curve"].unique()}

    def panel(head):
        def draw(axes, ink) -> None:
            mean_curves(axes, ink, table[table["head"] == head], "step", "curve", names)
            axes.set_title(f"exit after layer {int(head.removeprefix('exit_'))}", fontsize=9, color=ink.muted)
            axes.set_xlabel("step")
            axes.set_ylabel("held-out loss (nats), ± deviation")

        return draw

    first, *_, last = sorted(table["head"].unique())
    save_panels(path, panel(first), panel(last), legend="head and its first values")


def main(folders: list[str], output: Path = HERE) -> None:
    table = collected(folders)
    table.round(4).to_csv(output / "init_copy_vs_random.csv", index=False)
    draw(table, output / "init_copy_vs_random.png")


if __name__ == "__main__":
    main(sys.argv[1:])
