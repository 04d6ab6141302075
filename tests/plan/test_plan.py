"""Plans of the published layouts: all of them, on many devices, and what is said where one does not fit."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from eellm.config.compose import compose
from eellm.config.schema import Config
from eellm.metrics.names import describe
from eellm.plan import search
from eellm.plan.case import Case
from eellm.plan.iteration import iterate
from eellm.plan.outcome import plan
from eellm.schedule.program import ScheduleError
from eellm.schedule.programs import one_f_one_b
from eellm.tasks import plan as task
from eellm.tasks.context import TaskContext


def config_of(experiment: str, *overrides: str) -> Config:
    return compose(["task=plan", f"experiment={experiment}", *overrides])


def case_of(config: Config, devices: int) -> Case:
    return Case.of(config, 32000).on(devices)


@pytest.mark.parametrize("experiment", ["eellm_1_3b", "eellm_7b", "eellm_13b", "eellm_30b"])
@pytest.mark.parametrize("devices", [16, 64])
def test_published_layouts_fit_where_they_ran(experiment: str, devices: int) -> None:
    """On A100s of 80 GB, 16 or more of them; exits at the published places cost next to nothing and never more than their own
    passes through the pipeline."""
    case = case_of(config_of(experiment, "device_profile=a100_80gb"), devices)
    found = iterate(case, "one_f_one_b")
    assert found.fits
    heads = [head for stage in found.costs.stages for head in stage.heads if head.is_exit]
    assert 0 < found.time - found.bare < 1.5 * sum(head.forward + head.backward for head in heads) + 0.02 * found.bare
    bubble = (case.layout.pp - 1) / (case.num_microbatches + case.layout.pp - 1)
    assert bubble <= found.timeline.bubble < bubble + 0.06


def test_the_estimate_of_the_search_is_near_the_simulation() -> None:
    case = case_of(config_of("eellm_7b"), 64)
    whole, estimated = iterate(case, "one_f_one_b"), search.estimate(case)
    assert estimated.time == pytest.approx(whole.time, rel=5e-3)
    assert estimated.peak_bytes == pytest.approx(whole.peak_bytes, rel=1e-6)


def test_what_does_not_fit_is_said_with_the_nearest_that_does() -> None:
    outcome = plan(config_of("eellm_30b", "device_profile=a100_40gb", "plan.gpus=16"), 32000)
    assert not outcome.chosen.fits
    assert outcome.words().startswith("It does not fit: rank 0 needs ")
    assert outcome.nearest is not None
    assert outcome.nearest.fits
    assert outcome.nearest.changes(outcome.case)
    assert outcome.nearest.case.layout.world_size >= 16


def test_counts_of_devices_that_cannot_be_used_name_their_neighbours() -> None:
    with pytest.raises(ScheduleError, match=r"20 devices are no multiple of tp x pp .* can use: 16 or 32"):
        plan(config_of("eellm_30b", "plan.gpus=20"), 32000)


def test_the_ranking_is_sorted_and_fits() -> None:
    case = case_of(config_of("eellm_1_3b"), 8)
    found = search.ranked(case)
    assert len(found) > 10
    assert all(candidate.fits and candidate.case.layout.world_size == 8 for candidate in found)
    assert [candidate.time for candidate in found] == sorted(candidate.time for candidate in found)


def test_recomputation_trades_time_for_memory() -> None:
    case = case_of(config_of("eellm_7b"), 64)
    none, full = (
        iterate(replace(case, shape=replace(case.shape, recompute=recompute)), "one_f_one_b") for recompute in ("none", "full")
    )
    assert full.peak_bytes < none.peak_bytes
    assert 1.2 < full.timeline.time / none.timeline.time < 1.4


def test_the_task_writes_tables_charts_and_the_program(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.csv").write_text("F0,F1,B0,B1\nF0,B0,F1,B1\n")
    overrides = ["schedule=csv", f"schedule.path={tmp_path / 'mine.csv'}", "parallel=pp2", "parallel.dp=1"]
    overrides += ["data.micro_batch_size=4", "data.global_batch_size=8", "plan.schedules=[one_f_one_b,bubble_filling]"]
    metrics = task.run(TaskContext(compose(["task=plan", *overrides]), tmp_path))
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines()[:8])) <= 100
    written = json.loads((tmp_path / "plan.json").read_text())
    assert all(describe(name) for name in metrics)
    assert set(written["schedules"]) == {"csv", "one_f_one_b", "bubble_filling"}
    assert written["schedules"]["csv"]["seconds"] == written["schedules"]["one_f_one_b"]["seconds"] == metrics["plan/csv/seconds"]
    assert one_f_one_b(2, 2).ranks[0][0] in task.own_program(compose(["task=plan", *overrides])).ranks[0]
    assert (tmp_path / "program.csv").read_text().startswith("F0,F1,B0,B1")
    assert "data-tip=" in (tmp_path / "plan.html").read_text()
    assert (tmp_path / "gantt.png").stat().st_size > 10_000
