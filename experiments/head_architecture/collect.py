"""head_architecture.csv, comparisons.csv and head_architecture.png from the runs of `python run.py study=head_architecture`;
arguments: their folders."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pandas as pd

from eellm.analysis import exit_table, load_runs, run_table, spread, within_noise
from eellm.metrics.names import FINAL
from eellm.report.study_plot import mean_curves, save_panels

HERE = Path(__file__).parent
KINDS = ("embedding", "norm", "mlp", "block")
"""From the lightest head to the heaviest."""
OWN = "trained with the model"
UNTUNED = "untuned"


def collected(folders: list[str]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Losses by kind and layer; and the differences, seed by seed, between kinds and from what a head was before tuning."""
    runs = load_runs(folders).query("status == 'done'")
    # `exits.head` also names the heads that the model brought along, which are the same in all runs
    tuned = json.loads(str(runs.attrs["shared"]["tuning.layers"]))
    runs["kind"] = runs["exits.head"].str.strip("[]").str.split(",").str[0]
    heads = exit_table(runs)
    exits = heads[heads["layer"].isin(tuned)]
    own = heads[~heads["layer"].isin(tuned) & (heads["head"] != FINAL)].drop_duplicates(["layer", "seed"]).assign(kind=OWN)
    untuned = run_table(runs, "exits_untuned")
    untuned = untuned[untuned["layer"].isin(tuned)]
    shown = pd.concat([exits, own])
    table = spread(shown, ["kind", "layer"], "loss")
    for name, part, value in (("agreement", shown, "agreement"), (UNTUNED, untuned, "loss")):
        means = spread(part, ["kind", "layer"], value)[["kind", "layer", "mean"]].rename(columns={"mean": name})
        table = table.merge(means, on=["kind", "layer"], how="left")
    return table.sort_values(["kind", "layer"], key=_order, ignore_index=True), compared(exits, untuned)


def compared(exits: pd.DataFrame, untuned: pd.DataFrame) -> pd.DataFrame:
    parts = []
    for layer, rows in exits.groupby("layer"):
        kinds = [kind for kind in KINDS if kind in set(rows["kind"])]
        for place, against in enumerate(kinds[:-1]):
            pairs = rows[rows["kind"].isin(kinds[place:])]
            parts.append(within_noise(pairs, "kind", "loss", against).assign(layer=layer, against=against))
        for kind in kinds:
            before = untuned[(untuned["layer"] == layer) & (untuned["kind"] == kind)].assign(when=UNTUNED)
            pairs = pd.concat([rows[rows["kind"] == kind].assign(when="tuned"), before])
            parts.append(within_noise(pairs, "when", "loss", UNTUNED).assign(layer=layer, against=UNTUNED, kind=kind))
    columns = ["kind", "against", "layer", "difference", "low", "high", "n", "within_noise"]
    table = pd.concat(parts, ignore_index=True)[columns]
    return table.sort_values(["against", "kind", "layer"], key=_order, ignore_index=True)


def _order(column: pd.Series) -> pd.Series:
    return column if column.name == "layer" else column.map([*KINDS, OWN, UNTUNED].index)


def draw(table: pd.DataFrame, path: Path) -> None:
    tuned = table[table["kind"] != OWN]
    names = {kind: {"mlp": "MLP"}.get(kind, kind) for kind in tuned["kind"].unique()}

    def loss_panel(axes, ink) -> None:
        mean_curves(axes, ink, tuned, "layer", "kind", names)
        axes.set_xlabel("layers in front of the exit")
        axes.set_ylabel("held-out loss (nats), ± deviation")

    def agreement_panel(axes, ink) -> None:
        mean_curves(axes, ink, tuned.assign(mean=tuned["agreement"], std=0.0), "layer", "kind", names)
        axes.set_xlabel("layers in front of the exit")
        axes.set_ylabel("same token as the final head")

    save_panels(path, loss_panel, agreement_panel, legend="head")


def main(folders: list[str], output: Path = HERE) -> None:
    table, comparisons = collected(folders)
    table.round(4).to_csv(output / "head_architecture.csv", index=False)
    comparisons.round(4).to_csv(output / "comparisons.csv", index=False)
    draw(table, output / "head_architecture.png")


if __name__ == "__main__":
    main(sys.argv[1:])
