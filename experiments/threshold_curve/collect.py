"""threshold_curve.csv and .png from the runs of the README's commands; arguments: their folders."""

from __future__ import annotations

import sys
from pathlib import Path

from eellm.analysis import load_runs, speed_quality, spread
from eellm.report.study_plot import mean_curves, save_panels

HERE = Path(__file__).parent
POINT = ["decoding", "threshold", "agreement", "mean_layers"]
MODES = ("catch_up", "kv_recompute", "self_speculative", "pipeline")


def main(folders: list[str]) -> None:
    rows = speed_quality(load_runs(folders))
    table = spread(rows[rows["decoding"] != "full"], POINT, "speedup")
    names = {mode: mode for mode in MODES if mode in set(table["decoding"])}
    table.round(4).to_csv(HERE / "threshold_curve.csv", index=False)

    def panel(x, label):
        def draw(axes, ink) -> None:
            axes.axhline(1.0, color=ink.muted, linestyle=":")
            mean_curves(axes, ink, table, x, "decoding", names)
            axes.set_xlabel(label)
            axes.set_ylabel("speed, times full depth")

        return draw

    save_panels(HERE / "threshold_curve.png", panel("agreement", "same token as full depth"), panel("threshold", "threshold"))


if __name__ == "__main__":
    main(sys.argv[1:])
