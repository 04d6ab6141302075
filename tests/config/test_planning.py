"""Programs from files are checked with the config, by their first violated invariant."""

from __future__ import annotations

from pathlib import Path

import pytest

from eellm.config.compose import compose
from eellm.errors import ConfigError


@pytest.mark.parametrize(
    ("program", "extra", "path", "words"),
    [
        ("F0,B0,F1\nF0,B0,F1,B1\n", [], "schedule.path", "rank 0: F1 has no B1"),
        ("F0,B0,F1,B1\nF0,F1,B0,B1\n", [], "schedule.path", "deadlock"),
        ("F0,X0\n", [], "schedule.path", "`X0` is no action"),
        ("F0,B0\n", [], "schedule.path", "is for 1 ranks"),
        (
            "F0,B0\nF0,B0\n",
            ["data.global_batch_size=8", "data.micro_batch_size=4"],
            "data.global_batch_size",
            "has 1 microbatches",
        ),
        ("N0,F1,B1\nN0,F1,B1\n", ["task=train"], "schedule.path", "has actions N: microbatches are run whole in training"),
    ],
)
def test_a_bad_program_is_refused(program: str, extra: list[str], path: str, words: str, tmp_path: Path) -> None:
    file = tmp_path / "program.csv"
    file.write_text(program)
    task = [] if any(override.startswith("task=") for override in extra) else ["task=plan"]
    with pytest.raises(ConfigError) as refused:
        compose([*task, "schedule=csv", f"schedule.path={file}", "parallel=pp2", *extra])
    assert any(problem.path == path and words in problem.reason for problem in refused.value.problems)


def test_task_plan_reads_no_weights_and_counts_devices_once() -> None:
    with pytest.raises(ConfigError) as refused:
        compose(["task=plan", "checkpoint=reference", "plan.gpus=8", "parallel.dp=3", "plan.schedules=[]"])
    assert {"checkpoint", "plan.gpus", "plan.schedules"} <= {problem.path for problem in refused.value.problems}
