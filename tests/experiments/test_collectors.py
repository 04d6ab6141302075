"""Every study's collector: what runs measured is in its CSV, at another shape than the committed one, without failed runs."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pandas as pd
import pytest

from tests.experiments.made_up_runs import (
    DEVIATION_STEP,
    INTERVAL_STEP,
    MEAN_STEP,
    OWN_LOSS,
    SEEDS,
    benchmark,
    decodings,
    losses,
    losses_of_placed_exits,
    mean,
    tuned_heads,
    value,
    write_plans,
    write_study,
)

EXPERIMENTS = Path(__file__).resolve().parents[2] / "experiments"
COLLECTORS = sorted(path.parent.name for path in EXPERIMENTS.glob("*/collect.py"))
Expected = list[tuple[str, dict[str, Any], dict[str, Any]]]
"""CSV, which of its rows, and what stands in it; None is an empty cell."""


def compared(steps: int) -> dict[str, Any]:
    """A setting against one that is some steps before it."""
    middle, half = MEAN_STEP * steps, INTERVAL_STEP * abs(steps)
    return {"difference": middle, "low": middle - half, "high": middle + half}


def spread_of(index: int) -> dict[str, Any]:
    return {"mean": mean(index), "std": DEVIATION_STEP * index, "n": len(SEEDS)}


NOT_COMPARED: dict[str, Any] = dict.fromkeys(("difference", "low", "high"))
PLACES = [{"exits.layers": layers} for layers in ([], [0.5], [0.25, 0.75])]


def claim_3_1(folder: Path) -> Expected:
    write_plans(folder)
    common = {"load": 1.5, "added_share_few": 0.4, "added_share_many": 0.4}
    first = {"added_ms_few": 400.0, "added_ms_many": 2000.0, "added_ms_a_microbatch": 100.0}
    second = {name: 2 * each for name, each in (first | common).items()} | {"load": 1.5}
    return [("claim_3_1", {"after": 0}, first | common), ("claim_3_1", {"after": 1}, second)]


def exit_placement(folder: Path) -> Expected:
    write_study(folder, PLACES, losses_of_placed_exits, model__num_layers=12)
    return [
        ("exit_placement", {"exits": "none", "head": "final", "layer": 12}, spread_of(0) | NOT_COMPARED),
        ("exit_placement", {"exits": "6", "head": "exit_06", "layer": 6}, spread_of(2) | NOT_COMPARED),
        ("exit_placement", {"exits": "3, 9", "head": "final", "layer": 12}, spread_of(2) | compared(2)),
        ("exit_placement", {"exits": "3, 9", "head": "exit_09", "layer": 9}, spread_of(3) | NOT_COMPARED),
    ]


def final_head_guard(folder: Path) -> Expected:
    write_study(folder, PLACES, losses_of_placed_exits, model__num_layers=12)
    return [
        ("final_head_guard", {"exits": "none", "step": 10}, spread_of(0) | NOT_COMPARED),
        ("final_head_guard", {"exits": "6", "step": 10}, spread_of(1) | compared(1)),
        ("final_head_guard", {"exits": "3, 9", "step": 20}, spread_of(2) | compared(2)),
    ]


def head_architecture(folder: Path) -> Expected:
    heads = [{"exits.head": [kind, "norm", kind]} for kind in ("norm", "block")]
    write_study(folder, heads, tuned_heads, tuning__layers=[5, 11])
    return [
        ("head_architecture", {"kind": "norm", "layer": 5}, spread_of(0) | {"untuned": mean(3), "agreement": 0.5}),
        ("head_architecture", {"kind": "block", "layer": 11}, spread_of(1) | {"untuned": mean(4)}),
        ("head_architecture", {"kind": "trained with the model", "layer": 7}, {"mean": OWN_LOSS, "untuned": None}),
        ("comparisons", {"kind": "block", "against": "norm", "layer": 5}, compared(1)),
        ("comparisons", {"kind": "block", "against": "untuned", "layer": 11}, compared(-3)),
    ]


def init_copy_vs_random(folder: Path) -> Expected:
    inits = [{"exits.init": init} for init in ("copy", "random")]
    write_study(folder, inits, losses("exit_06", "exit_18", "exit_24", "final"), exits__head=["mlp", "norm"])
    name = "init_copy_vs_random"
    return [
        (name, {"kind": "mlp", "exits.init": "copy", "head": "exit_18", "step": 10}, spread_of(1)),
        (name, {"kind": "mlp", "exits.init": "random", "head": "exit_24", "step": 20}, spread_of(3)),
    ]


def loss_weights(folder: Path) -> Expected:
    kinds = [("constant", 0.5), ("constant", 0.25), ("warmup", 0.5), ("cooldown", 0.5)]
    settings = [{"loss_weights.kind": kind, "loss_weights.values": weight} for kind, weight in kinds]
    write_study(folder, settings, losses("exit_06", "exit_12", "final"))
    rows = [{"loss_weights.kind": kind, "loss_weights.values": weight} for kind, weight in kinds]
    return [
        ("loss_weights", {"head": "exit_06", **rows[0]}, spread_of(0) | NOT_COMPARED),
        ("loss_weights", {"head": "exit_12", **rows[1]}, spread_of(2) | compared(1)),
        ("loss_weights", {"head": "final", **rows[3]}, spread_of(5) | compared(3)),
    ]


def threshold_curve(folder: Path) -> Expected:
    write_study(folder, [{"decoding.name": mode} for mode in ("kv_recompute", "catch_up")], decodings)
    interval: dict[str, Any] = {"low": mean(1) - INTERVAL_STEP, "high": mean(1) + INTERVAL_STEP}
    difference = {name.replace("low", "difference_low").replace("high", "difference_high"): x for name, x in compared(1).items()}
    return [
        ("threshold_curve", {"decoding": "catch_up", "threshold": 0.35}, spread_of(1) | interval | difference),
        ("threshold_curve", {"decoding": "kv_recompute", "threshold": 0.7}, spread_of(0) | {"difference": None}),
    ]


def tuning_budget(folder: Path) -> Expected:
    settings = [{"optimizer.lr": rate, "tuning.layers": [6, 18]} for rate in (1e-4, 2e-4, 4e-4, 8e-4)]
    write_study(folder, settings, losses("exit_06", "exit_18"), data__global_batch_size=16, data__sequence_length=8)
    point = {"exit": "exit_18", "tokens": 20 * 16 * 8}
    return [
        ("tuning_budget", {"optimizer.lr": 4e-4, **point}, spread_of(3) | NOT_COMPARED),
        ("tuning_budget", {"optimizer.lr": 1e-4, **point}, spread_of(1) | compared(-2)),
        ("tuning_budget", {"optimizer.lr": 8e-4, **point}, spread_of(4) | compared(1)),
    ]


def pipeline_latency(folder: Path) -> Expected:
    figures = benchmark(stages__full=3, stages__pipeline=4, stages__speedup=0)
    write_study(folder, [{"exits.layers": [share]} for share in (0.125, 0.5)], figures, parallel__pp=4)
    speeds = {"full_tokens_per_second": mean(4), "tokens_per_second": mean(5)}
    return [
        ("pipeline_latency", {"depth": 0.125}, spread_of(0) | {"bound": 4.0}),
        ("pipeline_latency", {"depth": 0.5}, spread_of(1) | {"bound": 2.0} | speeds),
    ]


def recompute_crossover(folder: Path) -> Expected:
    settings = [{"decoding.max_pending": wait} for wait in (3, 24)]
    figures = benchmark(kv_recompute__speedup=0, catch_up__speedup=2)
    write_study(folder, settings, figures, precision__dtype="fp16")
    row = {"precision.dtype": "fp16", "decoding.max_pending": 24}
    return [
        ("recompute_crossover", {**row, "mode": "kv_recompute"}, spread_of(1)),
        ("recompute_crossover", {**row, "mode": "catch_up"}, spread_of(3) | compared(2)),
    ]


def training_overhead(folder: Path) -> Expected:
    settings = [{"exits.layers": layers, "exits.deferred": late} for late in (False, True) for layers in ([6], [6, 12])]
    figures = {"time__without_exits": 0, "time__added": 1, "time__exits_alone": 2, "executor__ratio": 3}
    memory = {"memory__without_exits": 0, "memory__with_exits": 2, "memory__added": 4}
    layout = {"parallel__pp": 4, "parallel__vp": 1, "schedule__name": "gpipe", "exits__boundary": "end"}
    write_study(folder, settings, benchmark(**figures, **memory), **layout)
    shares = pd.Series([value(2, seed) / value(1, seed) for seed in SEEDS])
    row = {"layout": "4 stages, GPipe", "exits": 2, "deferred": False, "boundary": "end"}
    expected = {"seconds_added": mean(2), "megabytes_added": mean(5), "share": shares.mean(), "share_std": shares.std()}
    by_setting = [pd.Series([value(index + 1, seed) / value(index, seed) for seed in SEEDS]) for index in range(4)]
    two = pd.concat([by_setting[1], by_setting[3]])
    later = pd.concat([by_setting[2] - by_setting[0], by_setting[3] - by_setting[1]])
    return [
        ("training_overhead", row, expected),
        ("conclusions", {"what": "2 exits, share of a step"}, {"value": two.mean(), "std": two.std(), "n": 6}),
        ("conclusions", {"what": "deferred minus eager, share of a step, all"}, {"value": later.mean(), "n": 6}),
    ]


CASES: dict[str, Callable[[Path], Expected]] = {
    case.__name__: case
    for case in (
        *(claim_3_1, exit_placement, final_head_guard, head_architecture, init_copy_vs_random, loss_weights, pipeline_latency),
        *(recompute_crossover, threshold_curve, training_overhead, tuning_budget),
    )
}


def collector(study: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"collect_{study}", EXPERIMENTS / study / "collect.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def the_row(table: pd.DataFrame, where: dict[str, Any]) -> pd.Series:
    rows = table
    for column, each in where.items():
        rows = rows[rows[column].astype(str) == str(each)]
    assert len(rows) == 1, (where, table.to_string())
    return rows.iloc[0]


@pytest.mark.parametrize("study", COLLECTORS)
def test_what_runs_have_measured_is_in_the_csv(study: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    expected = CASES[study](tmp_path / "runs")
    (tmp_path / "out").mkdir()
    collector(study).main([str(tmp_path / "runs")], tmp_path / "out")
    for name, where, numbers in expected:
        row = the_row(pd.read_csv(tmp_path / "out" / f"{name}.csv"), where)
        got = {column: None if pd.isna(row[column]) else float(row[column]) for column in numbers}
        assert got == pytest.approx(numbers, abs=6e-4), (name, where)
    assert (tmp_path / "out" / f"{study}.png").stat().st_size > 1000


@pytest.mark.parametrize("study", COLLECTORS)
def test_rows_do_not_depend_on_the_order_of_runs(study: str, tmp_path: Path) -> None:
    """A study that is run again has its runs in other folders."""
    pytest.importorskip("matplotlib")
    CASES[study](tmp_path / "runs")
    (tmp_path / "again").mkdir()
    for index, run in enumerate(sorted((tmp_path / "runs").glob("run_*"), reverse=True)):
        run.rename(tmp_path / "again" / f"{index:02d}")
    (tmp_path / "runs").rename(tmp_path / "failed")
    CASES[study](tmp_path / "runs")
    tables = []
    for folder in ("runs", "again"):
        (tmp_path / f"out_{folder}").mkdir()
        collector(study).main([str(tmp_path / folder)], tmp_path / f"out_{folder}")
        tables.append({path.name: path.read_text() for path in (tmp_path / f"out_{folder}").glob("*.csv")})
    assert tables[0] == tables[1]
