"""Sweeps as commands of their own: killed in the middle and repeated; two jobs at a time by joblib."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from eellm.rundir import RunDirectory
from tests.faults.runs import ROOT, STEPS, Life, records
from tests.metrics.wandb_file import read_offline_run
from tests.train.fitting import BASE

RUN = [sys.executable, str(ROOT / "run.py"), "-m"]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_killed_sweep_goes_on_where_it_was(tmp_path: Path) -> None:
    """Two jobs, killed (SIGKILL) in the second: the first is skipped, the second takes the steps that it lacks, and each stays
    one run of wandb's, in the study's group."""
    folder = tmp_path / "sweep"
    folder.mkdir()
    where = [f"hydra.sweep.dir={folder}", f"data.cache_dir={tmp_path / 'cache'}", "logger=wandb_offline", "+study.name=killed"]
    command = [*RUN, *BASE, *STEPS, "trainer.max_steps=6", *where, "seed=1,2"]
    life = Life(command, folder)
    assert life.wait_until(lambda: len(life.runs()) == 2 and any(run.steps() for run in of_state(folder, "running")))
    os.killpg(life.process.pid, signal.SIGKILL)
    life.seconds_to_end()
    (first,), (second,) = of_state(folder, "done"), of_state(folder, "running")
    began, done, ids = second.status()["started"], first.status(), [wandb_id(run) for run in (first, second)]
    again = Life(command, folder)
    again.seconds_to_end(timeout=400.0)
    assert again.process.returncode == 0, again.log_text()[-3000:]
    assert "2 jobs in " in again.log_text()
    assert again.log_text().rstrip().endswith("1 done, 1 skipped (done before)")
    assert first.status() == done
    assert second.status()["started"] != began
    steps = [row["step"] for row in records(second.path) if "train/loss/final" in row]
    assert steps == sorted(set(steps))
    assert steps[-1] == 6
    assert [wandb_id(run) for run in (first, second)] == ids
    assert len(set(ids)) == 2
    assert [read_offline_run(run.path).run.run_group for run in (first, second)] == ["killed"] * 2
    assert [read_offline_run(run.path).exit_code for run in (first, second)] == [0, 0]


@pytest.mark.slow
def test_joblib_runs_two_jobs_at_a_time_and_equal_ones_once(tmp_path: Path) -> None:
    """Names are no part of a result: two of the three jobs are the same, and one has a config that is refused."""
    launcher = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "hydra.sweep.dir=sweep"]
    command = [*RUN, *launcher, "task=plan", "plan.schedules=[gpipe]", "name=a,b", "exits.layers=[2],[9]"]
    result = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=280, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert result.returncode == 1, result.stderr
    assert "4 jobs in sweep: 1 done, 1 skipped (done before), 2 failed" in result.stdout
    assert len(list((tmp_path / "sweep").glob("*/status.json"))) == 1


def of_state(folder: Path, state: str) -> list[RunDirectory]:
    runs = [RunDirectory(path.parent) for path in folder.glob("*/status.json")]
    return [run for run in runs if run.status().get("state") == state]


def wandb_id(run: RunDirectory) -> str:
    return (run.path / "wandb" / "run_id.txt").read_text().strip()
