"""claim_3_1.csv and .png from the runs of study=claim_3_1; arguments: their folders."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pandas as pd

from eellm.analysis import load_runs
from eellm.drawing.plot import mode_style
from eellm.report.study_plot import save_panels

HERE = Path(__file__).parent
SECONDS, COST = "plan/one_f_one_b/seconds", "plan/one_f_one_b/exits_cost"
LAYERS, HEAD, BATCH = "exits.layers", "exits.head", "data.global_batch_size"
COLUMNS = ["after", HEAD, "load", "added_ms_few", "added_ms_many", "added_ms_a_microbatch", "added_share_few", "added_share_many"]


def collected(folders: list[str]) -> pd.DataFrame:
    runs = load_runs(folders, (LAYERS, HEAD)).query("status == 'done'")
    runs = runs.drop_duplicates([LAYERS, HEAD, BATCH])
    runs = runs.assign(added_ms=1e3 * runs[SECONDS] * (1 - 1 / (1 + runs[COST])), added_share=runs[COST])
    runs["load"] = runs["run"].map(load)
    runs["after"] = runs["run"].map(placed)
    few = runs[runs[BATCH] == runs[BATCH].min()]
    many = runs[runs[BATCH] == runs[BATCH].max()]
    table = few.merge(many, on=[LAYERS, HEAD, "after", "load"], suffixes=("_few", "_many"))
    span = table[f"{BATCH}_many"] - table[f"{BATCH}_few"]
    # + 0.0: what is lost in rounding is no cost below nothing
    table["added_ms_a_microbatch"] = ((table["added_ms_many"] - table["added_ms_few"]) / span).round(6) + 0.0
    return table.sort_values([HEAD, "after"], ascending=[False, True], ignore_index=True)[COLUMNS]


def stages(run: str) -> list[dict]:
    return json.loads((Path(run) / "plan.json").read_text())["stages"]


def placed(run: str) -> str:
    """Stage of each exit, counted from 0: `1 1` = two on the second."""
    return " ".join(str(stage["index"]) for stage in stages(run) for name in stage["exits"] if name != "final")


def load(run: str) -> float:
    """Forward and backward of the slowest stage but the last, over those of the last."""
    *others, last = [stage["forward"] + stage["backward"] for stage in stages(run)]
    return max(others) / last


def draw(table: pd.DataFrame, path: Path) -> None:
    places = list(table["after"].unique())

    def panel(column: str, title: str, label: str):
        def draw(axes, ink) -> None:
            for index, (head, rows) in enumerate(table.groupby(HEAD, sort=False)):
                # beside each other, so that equal costs do not cover each other
                beside = rows["after"].map(places.index) + 0.16 * (index - 0.5)
                style = mode_style(1 + index, ink) | {"linestyle": "none", "label": f"{head} head"}
                axes.plot(beside, rows[column], markersize=5, **style)
            axes.axhline(0.0, color=ink.muted, linewidth=1.0)
            axes.set_title(title, fontsize=9, color=ink.muted)
            axes.set_xticks(range(len(places)), [place.replace(" ", ", ") for place in places])
            axes.set_xlabel("stages of the exits")
            axes.set_ylabel(label)

        return draw

    save_panels(
        path,
        panel("added_ms_few", "few microbatches", "added per step (ms)"),
        panel("added_ms_a_microbatch", "each further microbatch", "added per microbatch (ms)"),
    )


def main(folders: list[str], output: Path = HERE) -> None:
    table = collected(folders)
    table.round(4).to_csv(output / "claim_3_1.csv", index=False)
    draw(table, output / "claim_3_1.png")


if __name__ == "__main__":
    main(sys.argv[1:])
