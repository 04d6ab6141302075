"""A run over two stages is killed, told to end and killed again; the same command ends it like an uninterrupted one.

The long version, with as many kills as one likes: python -m tests.faults.kill.
"""

from __future__ import annotations

import os
import random
import signal
from pathlib import Path

import pytest

from eellm.rundir import RunDirectory
from tests import workers
from tests.faults.kill import LAYOUT, PATIENCE, kill_once
from tests.faults.runs import STEPS, differences, finish, start
from tests.train.fitting import train


class Earliest(random.Random):
    """Kills at the first moment of a phase: a checkpoint of this size is soon written."""

    def uniform(self, a: float, b: float) -> float:
        return a


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kills")


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_told_to_end_and_killed_again(folder: Path) -> None:
    runs, chance = folder / "runs", Earliest(1)
    for phase, victim in (("training", "parent"), ("saving", "rank 1")):
        kill = kill_once(start(runs, *LAYOUT), 0, phase, victim, chance)
        assert kill is not None, "the run ended before it could be killed"
        assert phase in (kill.phase, "training"), "training goes on beside a checkpoint"
        assert kill.seconds < PATIENCE

    life = start(runs, *LAYOUT)
    assert life.wait_until(lambda: life.step() > 0)
    os.kill(life.process.pid, signal.SIGUSR1)
    life.seconds_to_end()
    assert life.process.returncode == 128 + signal.SIGUSR1
    (run,) = [run for run in life.runs() if run.status()["state"] == "preempted"]
    assert run.status()["error"] == "interrupted (SIGUSR1)"
    last = life.step()
    assert run.steps()[-1].name == f"step_{last:07d}", "of the step that was under way"

    done = finish(runs, *LAYOUT)
    workers.run(2, train, [*STEPS, *LAYOUT], str(folder / "whole"))
    wanted = RunDirectory(folder / "whole")
    assert differences(done, wanted) == []
