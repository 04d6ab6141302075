"""Schedules that layout, batch or engine do not allow are refused, all at once."""

from __future__ import annotations

import pytest

from eellm.config.compose import compose
from eellm.errors import ConfigError


@pytest.mark.parametrize(
    ("overrides", "path", "words"),
    [
        (["schedule=gpipe", "parallel=pp2_vp2"], "schedule.name", "one model chunk a rank"),
        (["schedule=bubble_filling", "parallel=pp2_vp2"], "schedule.name", "one model chunk a rank"),
        (["schedule=gpipe", "schedule.engine=megatron", "parallel=pp2"], "schedule.engine", "no schedule gpipe"),
        (["schedule=bubble_filling", "parallel=pp2"], "schedule.name", "no microbatch fits"),
        (
            ["schedule=bubble_filling", "parallel=pp4", "data.micro_batch_size=1", "data.global_batch_size=4"],
            "data.global_batch_size",
            "makes 4 microbatches, of which 4 would fill bubbles",
        ),
        (
            ["schedule=bubble_filling", "parallel=pp4", "data.micro_batch_size=1", "data.global_batch_size=16"]
            + ["data.ramp_up={start: 4, increment: 4, samples: 100}"],
            "data.ramp_up.start",
            "makes 4 microbatches",
        ),
        (["debug=timeline", "parallel=pp2"], "debug.timeline", "the executor"),
    ],
)
def test_is_refused(overrides: list[str], path: str, words: str) -> None:
    with pytest.raises(ConfigError) as refused:
        compose(["task=train", *overrides])
    assert any(problem.path == path and words in problem.reason for problem in refused.value.problems), refused.value


@pytest.mark.parametrize(("benchmark", "refused"), [("training", True), ("planner", True), ("decoding", False)])
def test_bubbles_of_the_benchmarks_that_train(benchmark: str, refused: bool) -> None:
    task = ["task=benchmark", f"benchmark={benchmark}", "parallel=pp2"]
    if not refused:
        assert compose(task).schedule.name == "auto"
    with pytest.raises(ConfigError) as error:
        compose([*task, "schedule=bubble_filling"])
    (problem,) = error.value.problems
    assert ("no microbatch fits" in problem.reason) == refused, problem


def test_fewer_fillers_leave_whole_microbatches() -> None:
    batch = ["data.micro_batch_size=1", "data.global_batch_size=4"]
    fill = ["schedule.part_one=1", "schedule.part_two=0"]
    assert compose(["task=train", "schedule=bubble_filling", "parallel=pp4", *batch, *fill]).schedule.part_one == 1
