"""A stage that fails while the pipeline decodes ends the run with its name, soon, and leaves no process behind."""

from __future__ import annotations

import time
from pathlib import Path

import psutil
import pytest

from eellm.config.compose import compose, to_yaml
from eellm.config.fingerprint import weights_fingerprint
from eellm.errors import RankFailure
from eellm.launch import launch
from eellm.rundir import RunDirectory

PATIENCE = 30.0
"""Seconds after the failure within which the run must be over; the others get three to end by themselves."""


def ranks() -> set[int]:
    """Processes that this one has spawned, at any depth; multiprocessing's resource tracker is none of them."""
    children = psutil.Process().children(recursive=True)
    return {child.pid for child in children if "spawn_main" in " ".join(child.cmdline())}


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("raise_on_1", "^rank 1 failed:(.|\n)*KeyError: 'a bug'"),
        ("kill_on_1", "^rank 1 ended without a report .killed by SIGKILL"),
        ("raise_on_0", "^rank 0 failed:(.|\n)*KeyError: 'a bug'"),
    ],
)
def test_a_failing_stage_ends_the_run(how: str, words: str, tmp_path: Path) -> None:
    """Of the reference model over two stages: one waits for the other's messages or answers when that goes away."""
    overrides = ["task=generate", "parallel=pp2", "decoding=pipeline", f"logger.wandb.project={how}"]
    config = compose(overrides)
    run = RunDirectory.create(tmp_path / "run", to_yaml(config), overrides, weights_fingerprint(config))
    before = ranks()
    with pytest.raises(RankFailure, match=words) as caught:
        launch(config, run, "tests.launch_tasks")
    assert time.time() - (run.path / "failing").stat().st_mtime < PATIENCE
    assert ranks() <= before
    status = run.status()
    assert status["state"] == "failed"
    assert status["error"] == str(caught.value)
    assert not (run.path / "generations.jsonl").exists()
