"""claim_3_1.csv and .png from the runs of study=claim_3_1; argument: their folder."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd

from eellm.analysis import load_runs

HERE = Path(__file__).parent
SECONDS, COST = "plan/one_f_one_b/seconds", "plan/one_f_one_b/exits_cost"
WORDS = {"3": "on the last stage", "1 1": "two on stage 1"}
LAYERS, HEAD, BATCH = "exits.layers", "exits.head", "data.global_batch_size"


def main(folder: str) -> None:
    runs = load_runs(folder).query("status == 'done'")
    runs = runs.assign(microbatches=runs[BATCH], added_ms=1e3 * runs[SECONDS] * (1 - 1 / (1 + runs[COST])))
    runs["load"] = runs["run"].map(load)
    runs["after"] = runs["run"].map(placed)
    few = runs[runs["microbatches"] == runs["microbatches"].min()]
    many = runs[runs["microbatches"] == runs["microbatches"].max()]
    table = few.merge(many, on=[LAYERS, HEAD, "after", "load"], suffixes=("_few", "_many"))
    span = table["microbatches_many"] - table["microbatches_few"]
    table["added_ms_a_microbatch"] = (table["added_ms_many"] - table["added_ms_few"]) / span
    table["added_share_many"] = table[f"{COST}_many"]
    columns = ["after", HEAD, "load", "added_ms_few", "added_ms_many", "added_ms_a_microbatch", "added_share_many"]
    table = table.sort_values([HEAD, "added_ms_many"], ascending=[False, True])[columns]
    table.round(4).to_csv(HERE / "claim_3_1.csv", index=False)
    draw(table)


def stages(run: str) -> list[dict]:
    return json.loads((Path(run) / "plan.json").read_text())["stages"]


def placed(run: str) -> str:
    """Stage of each exit, counted from 0: `1 1` = two on the second."""
    return " ".join(str(stage["index"]) for stage in stages(run) for name in stage["exits"] if name != "final")


def load(run: str) -> float:
    """Forward and backward of the slowest stage but the last, over those of the last."""
    *others, last = [stage["forward"] + stage["backward"] for stage in stages(run)]
    return max(others) / last


def draw(table: pd.DataFrame) -> None:
    figure, axes = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
    for (head, rows), marker, colour in zip(table.groupby(HEAD), "so", ("#D55E00", "#0072B2"), strict=True):
        axes.plot(rows["load"], rows["added_ms_a_microbatch"], marker, color=colour, fillstyle="none", label=f"{head} heads")
        for _, row in rows[rows["after"].isin(WORDS)].iterrows():
            place = (row["load"], row["added_ms_a_microbatch"])
            axes.annotate(WORDS[row["after"]], place, (6, 4), textcoords="offset points", fontsize=8)
    axes.axvline(1.0, color="grey", linewidth=0.8, linestyle=":")
    axes.set_xlim(0.5, 1.6)
    axes.set_xlabel("slowest other stage's load / last stage's load")
    axes.set_ylabel("added time per microbatch (ms)")
    axes.legend(frameon=False)
    figure.savefig(HERE / "claim_3_1.png", dpi=160)


if __name__ == "__main__":
    main(sys.argv[1])
