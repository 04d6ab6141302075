"""Training through Lightning: every layout logs the same numbers, and a resumed run equals an uninterrupted one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from eellm.report.gantt_page import draw_recorded
from eellm.schedule.program import with_communication
from eellm.schedule.programs import one_f_one_b
from tests import workers
from tests.train.fitting import train

LAYOUTS = {
    "dp2": (2, ["parallel=dp2"]),
    "tp2": (2, ["parallel=tp2"]),
    "pp2": (2, ["parallel=pp2"]),
    "pp2_vp2": (2, ["parallel=pp2_vp2"]),
    "tp2_pp2": (4, ["parallel=tp2_pp2"]),
    "pp2_dp2_distributed": (4, ["parallel=pp2", "parallel.dp=2", "optimizer=adam_distributed"]),
    "pp2_executor": (2, ["parallel=pp2", "schedule.engine=executor", "debug.timeline=true"]),
    "pp2_gpipe": (2, ["parallel=pp2", "schedule=gpipe"]),
    "pp2_vp2_executor": (2, ["parallel=pp2_vp2", "schedule.engine=executor"]),
}
TIMED = ("train/step_time", "train/tokens_per_second", "train/tflops", "train/memory_gb")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fit")


@pytest.fixture(scope="module")
def single(folder: Path) -> list[dict]:
    """metrics.jsonl of an uninterrupted run on one rank."""
    workers.run(1, train, [], str(folder / "single"))
    return rows(folder / "single")


def rows(run: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "time" and not key.startswith(TIMED)} for line in lines]


def same(actual: list[dict], expected: list[dict], tolerance: float) -> None:
    assert [row["step"] for row in actual] == [row["step"] for row in expected]
    for row, wanted in zip(actual, expected, strict=True):
        assert row == pytest.approx(wanted, rel=tolerance)


def test_a_run_logs_every_head_and_learns(single: list[dict]) -> None:
    steps = [row for row in single if "train/loss/final" in row]
    validations = [row for row in single if "val/loss/final" in row]
    heads = ("exit_01", "exit_02", "exit_03", "final")
    assert [row["step"] for row in steps] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in validations] == [3, 6]
    for head in heads:
        assert steps[-1][f"train/loss/{head}"] < steps[0][f"train/loss/{head}"]
        assert validations[-1][f"val/loss/{head}"] < validations[0][f"val/loss/{head}"]
    for row in steps:
        weighted = row["train/loss/final"] + 0.5 * sum(row[f"train/loss/{head}"] for head in heads[:3])
        assert row["train/loss/total"] == pytest.approx(weighted)


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_logs_the_same(name: str, single: list[dict], folder: Path) -> None:
    world, overrides = LAYOUTS[name]
    results = workers.run(world, train, overrides, str(folder / name))
    # gradients agree to 1e-5 (tests/engine); Adam's first steps divide by their size and magnify what is left
    same(rows(folder / name), single, 2e-4)
    for result in results[1:]:
        untimed = {key: value for key, value in result["latest"].items() if not key.startswith(TIMED)}
        assert untimed == {key: results[0]["latest"][key] for key in untimed}, "ranks disagree on a logged number"


def test_the_last_step_is_recorded_and_drawn(folder: Path) -> None:
    """On every rank its actions in the program's order, one after the other."""
    workers.run(2, train, LAYOUTS["pp2_executor"][1], str(folder / "recorded"))
    record = folder / "recorded" / "timeline.json"
    found = json.loads(record.read_text())
    program = with_communication(one_f_one_b(2, 4))
    assert found["microbatches"] == 4
    for events, actions in zip(found["ranks"], program.ranks, strict=True):
        assert [cell for cell, *_ in events] == [str(action) for action in actions]
        times = [time for _, begin, end, _ in events for time in (begin, end)]
        assert times == sorted(times)
        for _, begin, end, parts in events:
            assert sum(length for _, length in parts) == pytest.approx(end - begin)
    page, picture = draw_recorded(record, "one_f_one_b")
    assert page.read_text().count('role="img"') == 2, "the step as it was, and simulated"
    assert picture.stat().st_size > 10_000


def test_a_program_from_a_file(single: list[dict], folder: Path) -> None:
    program = folder / "program.csv"
    program.write_text("F0,F1,F2,B0,F3,B1,B2,B3\nF0,F1,B0,B1,F2,B2,F3,B3\n")
    workers.run(2, train, ["parallel=pp2", "schedule=csv", f"schedule.path={program}"], str(folder / "csv"))
    same(rows(folder / "csv"), single, 2e-4)


def test_bubble_filling_trains_and_validates(folder: Path) -> None:
    """Four stages, six whole microbatches and one in each bubble: other means than one rank's, of the same model and data."""
    overrides = ["parallel=pp4", "schedule=bubble_filling", "schedule.part_one=1", "schedule.part_two=1"]
    overrides += ["data.micro_batch_size=1", "model.num_layers=4"]
    results = workers.run(4, train, overrides, str(folder / "filled"))
    workers.run(1, train, ["data.micro_batch_size=1"], str(folder / "unfilled"))
    filled, plain = rows(folder / "filled"), rows(folder / "unfilled")
    assert all(result["seen"] == results[0]["seen"] == list(range(48)) for result in results), "all ranks read all samples"
    for row, wanted in zip(filled, plain, strict=True):
        for name in wanted:
            if "loss" in name:
                assert row[name] == pytest.approx(wanted[name], rel=0.03), name
    assert any(
        row[name] != pytest.approx(wanted[name], rel=1e-6) for row, wanted in zip(filled, plain, strict=True) for name in row
    )


@pytest.fixture(scope="module")
def checkpoint(single: list[dict], folder: Path) -> str:
    """The uninterrupted run's, after 4 of 6 steps."""
    return str(folder / "single" / "checkpoints" / "step_0000004")


def test_resumed_equals_uninterrupted(single: list[dict], checkpoint: str, folder: Path) -> None:
    """4 steps, then 2 more from the checkpoint: same sample numbers in order, same losses."""
    whole = workers.run(1, train, [], str(folder / "whole"))[0]
    assert whole["checkpoints"] == ["step_0000004", "step_0000006"]
    resumed = workers.run(1, train, [], str(folder / "resumed"), checkpoint)[0]
    assert resumed["seen"] == whole["seen"][32:] == list(range(32, 48))
    same(rows(folder / "resumed"), [row for row in single if row["step"] > 4], 1e-6)


WEIGHTS = {
    "warmup": [[0.0, 0.1, 0.2, 0.3, 0.4, 0.5]] * 3,
    "cooldown": [[1.0, 0.82, 0.64, 0.46, 0.28, 0.1]] * 3,
    "rotating": [[0.5, 0.5, 0, 0, 0, 0], [0, 0, 0.5, 0.5, 0, 0], [0, 0, 0, 0, 0.5, 0.5]],
    "token_confidence": [[0.5] * 6] * 3,
}
"""Weights of the three exits in six steps, by hand; the constant ones are those of all other tests."""


@pytest.mark.parametrize("kind", WEIGHTS)
def test_loss_weights_go_on_after_a_resume(kind: str, folder: Path) -> None:
    """4 steps, then 2 more: weights, losses and gradient norms of an uninterrupted run."""
    steps = {"warmup": ["loss_weights.steps=5"], "cooldown": ["loss_weights.steps=5"], "rotating": ["loss_weights.steps=2"]}
    overrides = [f"loss_weights={kind}", *steps.get(kind, []), "trainer.val_every=0"]
    whole, resumed = folder / f"whole_{kind}", folder / f"resumed_{kind}"
    workers.run(1, train, overrides, str(whole))
    workers.run(1, train, overrides, str(resumed), str(whole / "checkpoints" / "step_0000004"))
    for exit_, weights in zip(("exit_01", "exit_02", "exit_03"), WEIGHTS[kind], strict=True):
        assert [row[f"train/weight/{exit_}"] for row in rows(whole)] == pytest.approx(weights)
    same(rows(resumed), rows(whole)[4:], 1e-6)


@pytest.mark.parametrize("name", ["tp2", "pp2_vp2", "pp2_dp2_distributed"])
def test_resumed_on_another_layout(name: str, single: list[dict], checkpoint: str, folder: Path) -> None:
    world, overrides = LAYOUTS[name]
    target = folder / f"resumed_{name}"
    results = workers.run(world, train, overrides, str(target), checkpoint)
    assert sorted({number for result in results for number in result["seen"]}) == list(range(32, 48))
    same(rows(target), [row for row in single if row["step"] > 4], 2e-4)


def test_resumed_on_other_data_parallel_and_microbatch_sizes(single: list[dict], checkpoint: str, folder: Path) -> None:
    """Microbatch m of data-parallel rank r holds the batch's rows from (2 m + r) x 1 on: together the same, in order."""
    target = folder / "resumed_dp2"
    results = workers.run(2, train, ["parallel=dp2", "data.micro_batch_size=1"], str(target), checkpoint)
    order = [number for pair in zip(*(result["seen"] for result in results), strict=True) for number in pair]
    assert order == list(range(32, 48))
    same(rows(target), [row for row in single if row["step"] > 4], 2e-4)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_half_precision_follows_full(dtype: str, single: list[dict], folder: Path) -> None:
    """Over a pipeline, with fp16's loss scale on the exits too: unscaled, their share of the gradient would vanish."""
    overrides = ["parallel=pp2", f"precision={dtype}", "precision.initial_loss_scale=64"][: 3 if dtype == "fp16" else 2]
    workers.run(2, train, overrides, str(folder / dtype))
    for row, wanted in zip(rows(folder / dtype), single, strict=True):
        for name, value in wanted.items():
            assert row[name] == pytest.approx(value, rel=0.03), name
        assert row.get("train/loss_scale", 64) == 64, "a sum over tokens leaves fp16 little room: a larger scale may overflow"


def test_a_step_that_overflows_is_skipped_and_logged(folder: Path) -> None:
    """fp16 with a loss scale far too large, on one batch: weights stay as they are, the scale comes down, heads are logged."""
    overrides = ["parallel=pp2", "precision=fp16", "precision.initial_loss_scale=1e9", "trainer.val_every=0", "debug=overfit"]
    workers.run(2, train, overrides, str(folder / "overflow"))
    logged = rows(folder / "overflow")
    scales = [row["train/loss_scale"] for row in logged]
    assert scales == sorted(scales, reverse=True)
    assert scales[-1] < scales[0]
    for head in ("exit_01", "exit_02", "exit_03", "final"):
        assert len({row[f"train/loss/{head}"] for row in logged}) == 1
    assert {row["train/grad_norm"] for row in logged} == {"NaN"}
