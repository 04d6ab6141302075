"""Run folders of every study, with numbers that are known: of other models and settings than those that were measured, and with
a run that failed, whose numbers are far off.

The n-th setting of a study has the value `value(n, seed)` in place of what would be measured.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tests.analysis.run_folders import write_run

SEEDS = (1, 2, 3)
WRONG = 50.0
OWN_LOSS = 3.5
"""Of an exit that a model brings along, in all runs."""
MEAN_STEP, DEVIATION_STEP = 0.2, 0.1
INTERVAL_STEP = 4.3027 * DEVIATION_STEP / 3**0.5
"""Between neighbouring settings: difference of means, standard deviation of the difference over the three seeds, and half of
its 95 % interval by Student's t with two degrees of freedom."""
Settings = dict[str, Any]
Recorded = Callable[[Callable[[int], float], Settings], dict[str, Any]]
"""(value of the n-th thing that a run measures, the run's settings) -> the arguments of `write_run`."""


def value(index: int, seed: int) -> float:
    return 2.0 + 0.1 * index * seed


def mean(index: int) -> float:
    return 2.0 + MEAN_STEP * index


def write_study(folder: Path, settings: Sequence[Settings], recorded: Recorded, **shared: Any) -> None:
    """Each setting with three seeds; `failed` has the last one's settings and first seed, and comes first."""
    common = {key.replace("__", "."): each for key, each in shared.items()}
    for index, setting in enumerate(settings):
        for seed in SEEDS:
            all_settings = {**common, **setting, "seed": seed}
            write_run(folder / f"run_{index}_{seed}", all_settings, **recorded(measured(index, seed), all_settings))
    last = {**common, **settings[-1], "seed": 1}
    failed = write_run(folder / "failed", last, **recorded(lambda _: WRONG, last))
    status = json.loads((failed / "status.json").read_text())
    (failed / "status.json").write_text(json.dumps({**status, "state": "failed", "error": "lost its node"}))


def measured(index: int, seed: int) -> Callable[[int], float]:
    """A run's n-th value is that of the n-th setting behind its own."""
    return lambda further: value(index + further, seed)


def losses(*heads: str, steps: Sequence[int] = (10, 20)) -> Recorded:
    """Validation at each step; a head's value is further by its place, and does not change with steps."""

    def recorded(at: Callable[[int], float], settings: Settings) -> dict[str, Any]:
        row = {f"val/loss/{head}": at(place) for place, head in enumerate(heads)}
        return {"history": [{"step": step, "time": 1e9 + step, **row} for step in steps]}

    return recorded


def losses_of_placed_exits(at: Callable[[int], float], settings: Settings) -> dict[str, Any]:
    """The final head's value is the setting's own, whatever exits there are."""
    layers = [round(share * 12) for share in settings["exits.layers"]]
    row = {"val/loss/final": at(0)} | {f"val/loss/exit_{layer:02d}": at(1) for layer in layers}
    rows = [{"step": step, "time": 1e9 + step, **row} for step in (10, 20)]
    # a run may have been evaluated besides, on other text, and others not
    evaluated = [{"head": "final", "layer": 12, "loss": WRONG}] if settings["seed"] == 1 else []
    return {"history": rows, "tables": {"exits": evaluated} if evaluated else {}}


def benchmark(**figures: int) -> Recorded:
    """benchmark.csv: name of a figure (`__` for the slash) -> how much further its value is."""

    def recorded(at: Callable[[int], float], settings: Settings) -> dict[str, Any]:
        rows = [
            {"name": name.replace("__", "/"), "value": at(further), "median": at(further)} for name, further in figures.items()
        ]
        rows = [{**row, "low": row["value"] - 0.1, "high": row["value"] + 0.1} for row in rows]
        return {"tables": {"benchmark": rows}}

    return recorded


def tuned_heads(at: Callable[[int], float], settings: Settings) -> dict[str, Any]:
    """Exits after layers 5 and 11 are tuned, the one after layer 7 is the model's own."""

    def rows(further: int) -> list[dict[str, Any]]:
        named = {"exit_05": 5, "exit_07": 7, "exit_11": 11, "final": 12}
        found = {head: OWN_LOSS if head == "exit_07" else at(further) for head in named}
        return [{"head": head, "layer": layer, "loss": found[head], "agreement": 0.5} for head, layer in named.items()]

    return {"tables": {"exits": rows(0), "exits_untuned": rows(3)}}


def decodings(at: Callable[[int], float], settings: Settings) -> dict[str, Any]:
    mode = settings["decoding.name"]
    point = {"agreement": 0.9, "mean_layers": 7.0}
    rows = [{"decoding": mode, "threshold": threshold, "speedup": at(0), **point} for threshold in (0.35, 0.7)]
    return {"tables": {"speed_quality": [{"decoding": "full", "threshold": None, "speedup": 1.0, **point}, *rows]}}


def write_plans(folder: Path) -> None:
    """Nothing is drawn, so there is one run a setting: 3 stages, 4 and 20 microbatches, which take 1 s and 5 s without exits."""

    def plan(stage: int) -> dict[str, Any]:
        stages = [
            {"index": index, "exits": ["final"] if index == 2 else [], "forward": 1.0, "backward": 2.0} for index in range(3)
        ]
        stages[stage]["exits"].insert(0, "exit_06")
        stages[0]["backward"] = 3.5
        return {"stages": stages}

    for stage, layers in enumerate(([0.2], [0.5])):
        for microbatches, bare in ((4, 1.0), (20, 5.0)):
            added = 0.1 * microbatches * (1 + stage)
            metrics = {"plan/one_f_one_b/seconds": bare + added, "plan/one_f_one_b/exits_cost": added / bare}
            settings = {"exits.layers": layers, "exits.head": "norm", "data.global_batch_size": microbatches}
            run = write_run(folder / f"run_{stage}_{microbatches}", settings, metrics)
            (run / "plan.json").write_text(json.dumps(plan(stage)))
    failed = write_run(folder / "failed", settings, dict.fromkeys(metrics, WRONG))
    (failed / "plan.json").write_text(json.dumps(plan(0)))
    (failed / "status.json").write_text(json.dumps({"state": "failed", "error": "", "started": 1e9, "updated": 1e9}))
