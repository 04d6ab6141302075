"""A sweep whose job submitit starts, on this machine in place of a cluster."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from eellm.rundir import RunDirectory
from tests.faults.runs import ROOT
from tests.train.fitting import BASE


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_job_of_submitits_is_a_run(tmp_path: Path) -> None:
    small = [*BASE, "trainer.max_steps=2", "trainer.val_every=2", f"data.cache_dir={tmp_path / 'cache'}"]
    launcher = ["hydra/launcher=submitit_local", "hydra.launcher.timeout_min=10", f"hydra.sweep.dir={tmp_path / 'sweep'}"]
    command = [sys.executable, str(ROOT / "run.py"), "-m", *small, *launcher]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=580)
    assert result.returncode == 0, result.stderr
    (status,) = (tmp_path / "sweep").glob("*/status.json")
    run = RunDirectory(status.parent)
    assert "1 job in sweep: 1 done" in result.stdout
    assert run.status()["state"] == "done"
    assert [step.name for step in run.steps()] == ["step_0000002"]
