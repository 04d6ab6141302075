"""exit_placement.csv and .png from the runs of study=exit_placement, with those of study=final_head_guard as their control;
arguments: the folders of both."""

from __future__ import annotations

import sys
from pathlib import Path

from eellm.analysis import exit_table, load_runs, spread, within_noise
from eellm.metrics.names import FINAL
from eellm.report.study_plot import mean_curves, save_panels

HERE = Path(__file__).parent
SETTING, CONTROL = "exits.layers", "[]"
NAMES = {"[0.25]": "1", "[0.5]": "2", "[0.75]": "3", "[0.25,0.5]": "1, 2", "[0.25,0.5,0.75]": "1, 2, 3"}


def main(folders: list[str]) -> None:
    runs = load_runs(folders).drop_duplicates([SETTING, "seed"])  # some settings are in both studies
    heads = exit_table(runs)
    losses = spread(heads, [SETTING, "head", "layer"], "loss")
    final = within_noise(heads[heads["head"] == FINAL], SETTING, "loss", CONTROL).assign(head=FINAL)
    table = losses.merge(final.drop(columns="n"), on=[SETTING, "head"], how="left")
    table.round(4).to_csv(HERE / "exit_placement.csv", index=False)
    places = final[SETTING].map({setting: place for place, setting in enumerate(NAMES)})
    bars = final.assign(mean=final["difference"], std=final["high"] - final["difference"], place=places)

    def loss_panel(axes, ink) -> None:
        mean_curves(axes, ink, losses, "layer", SETTING, NAMES)
        axes.set_xlabel("layers in front of the head")
        axes.set_ylabel("held-out loss (nats)")

    def final_panel(axes, ink) -> None:
        axes.axhline(0.0, color=ink.text)
        mean_curves(axes, ink, bars, "place", SETTING, NAMES)
        axes.set_xticks(range(len(NAMES)), list(NAMES.values()))
        axes.set_xlabel("exits after layers")
        axes.set_ylabel("final head minus control (95 %)")

    save_panels(HERE / "exit_placement.png", loss_panel, final_panel)


if __name__ == "__main__":
    main(sys.argv[1:])
