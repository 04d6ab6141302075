"""Two torchrun agents on this machine, as on two nodes: a rank is told to end, a rank fails, and what becomes of the run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from eellm.rundir import RunDirectory
from tests import workers
from tests.command_line import free_port
from tests.faults.runs import ROOT, STEPS, differences, records
from tests.train.fitting import BASE, train


class Nodes:
    """The same command under one agent per node."""

    def __init__(self, *command: str):
        port = free_port()
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", "--monitor-interval=0.2"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        self.agents = [
            subprocess.Popen(
                [*torchrun, f"--node-rank={node}", "--master-addr=localhost", f"--master-port={port}", *command],
                cwd=ROOT,
                env=environment,
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
            for node in (0, 1)
        ]

    def rank(self, node: int) -> psutil.Process:
        return psutil.Process(self.agents[node].pid).children()[0]

    def end(self) -> tuple[list[int], list[str]]:
        """Exit statuses and what the nodes printed."""
        texts = [agent.communicate(timeout=200)[0] for agent in self.agents]
        return [agent.returncode for agent in self.agents], texts


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("torchrun")


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_nodes_of_which_one_is_told_to_end(folder: Path) -> None:
    """Then once more to the end: like one machine that was never interrupted."""
    run = RunDirectory(folder / "runs" / "one")
    shared = [*BASE, *STEPS, "parallel=pp2", f"data.cache_dir={folder / 'cache'}", "resume=auto", f"hydra.run.dir={run.path}"]
    nodes = Nodes(str(ROOT / "run.py"), *shared)
    deadline = time.monotonic() + 150
    while not records(run.path) and time.monotonic() < deadline:
        time.sleep(0.1)
    nodes.rank(1).send_signal(signal.SIGUSR1)
    statuses, printed = nodes.end()
    assert all(statuses), "a run that was told to end has not succeeded"
    assert run.status()["state"] == "preempted", printed
    assert run.status()["error"] == "interrupted (SIGUSR1)"
    assert run.steps()[-1].name == f"step_{int(records(run.path)[-1]['step']):07d}"

    statuses, printed = Nodes(str(ROOT / "run.py"), *shared).end()
    assert statuses == [0, 0], printed
    assert run.status()["state"] == "done"
    workers.run(2, train, [*STEPS, "parallel=pp2"], str(folder / "whole"))
    assert differences(run, RunDirectory(folder / "whole")) == []


@pytest.mark.dist
@pytest.mark.slow
def test_the_first_failure_is_the_runs(folder: Path) -> None:
    """Rank 1 fails while rank 0 waits for it in a collective."""
    began = time.monotonic()
    nodes = Nodes("-m", "tests.launch_tasks.start", str(folder / "failing"), "parallel=pp2", "logger.wandb.project=bug")
    statuses, printed = nodes.end()
    assert statuses == [1, 1]
    assert time.monotonic() - began < 60 + 30, "the time to start is not the time to end"
    assert "KeyError: 'a bug'" in printed[1]
    error = str(RunDirectory(folder / "failing").status()["error"])
    assert error.startswith("rank 1 failed:")
    assert error.strip().endswith("KeyError: 'a bug'")
