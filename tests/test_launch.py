"""Ranks: started, joined, failing. The task is a stand-in that needs no model."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from eellm.config.compose import compose, to_yaml
from eellm.config.fingerprint import weights_fingerprint
from eellm.config.schema import Config
from eellm.errors import ConfigError, DataError, RankFailure
from eellm.launch import check_devices, launch
from eellm.outer import OuterRank, first_host, outer_rank
from eellm.preemption import SIGNALS, Preempted
from eellm.rundir import RunDirectory
from tests.command_line import free_port
from tests.conftest import ROOT

TASKS = "tests.launch_tasks"


def a_run(where: Path, *overrides: str) -> tuple[Config, RunDirectory]:
    config = compose(["task=train", "data.micro_batch_size=1", *overrides])
    return config, RunDirectory.create(where / "run", to_yaml(config), list(overrides), weights_fingerprint(config))


def prepared(run: RunDirectory) -> list[str]:
    return sorted(path.name.rpartition("_")[0] for path in run.path.glob("prepared_by_*"))


def test_one_rank_runs_in_this_process(tmp_path: Path) -> None:
    config, run = a_run(tmp_path)
    assert launch(config, run, TASKS) == {"val/loss/final": 0.0}
    assert [path.name for path in run.path.glob("prepared_by_*")] == [f"prepared_by_parent_{os.getpid()}"]
    assert json.loads(run.final_metrics.read_text()) == {"val/loss/final": 0.0}
    assert run.status()["state"] == "done"
    assert (run.path / "rank_0").read_text().split()[0] == "1"  # parallel.dp: null has become a number


@pytest.mark.dist
def test_ranks_are_started_and_share_the_cores(tmp_path: Path) -> None:
    os.environ.pop("OMP_NUM_THREADS", None)
    config, run = a_run(tmp_path, "parallel=dp2")
    assert launch(config, run, TASKS) == {"val/loss/final": 1.0}
    assert prepared(run) == ["prepared_by_parent"]
    threads = max(1, len(os.sched_getaffinity(0)) // 2)
    assert {(run.path / f"rank_{rank}").read_text() for rank in (0, 1)} == {f"2 {threads}"}
    assert "OMP_NUM_THREADS" not in os.environ
    assert run.status()["state"] == "done"


@pytest.mark.dist
@pytest.mark.parametrize(
    ("how", "raised", "words"),
    [
        ("user", DataError, "^the corpus is gone$"),
        ("bug", RankFailure, "rank 1 failed:(.|\n)*KeyError: 'a bug'"),
        ("kill", RankFailure, "rank 1 ended without a report .killed by SIGKILL"),
    ],
)
def test_the_failure_of_a_rank_is_the_runs(
    how: str, raised: type, words: str, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    config, run = a_run(tmp_path, "parallel=pp2", f"logger.wandb.project={how}")
    with pytest.raises(raised, match=words) as caught:
        launch(config, run, TASKS)
    status = run.status()
    assert status["state"] == "failed"
    assert str(status["error"]).startswith(str(caught.value))
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.dist
@pytest.mark.parametrize("how", ["kill", "wait"])
def test_processes_of_the_caller_are_left_alone(how: str, tmp_path: Path) -> None:
    """Who calls from a notebook or a server has children of its own: neither a failure nor a signal reaches them."""
    own = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(3600,), daemon=True)
    own.start()
    config, run = a_run(tmp_path, "parallel=pp2", f"logger.wandb.project={how}")
    if how == "wait":
        signalled(run, signal.SIGTERM)
    try:
        with pytest.raises((RankFailure, Preempted)):
            launch(config, run, TASKS)
        assert own.is_alive()
    finally:
        own.kill()
        own.join()


def signalled(run: RunDirectory, *numbers: int) -> None:
    """Send this process signals, one after the other, once a rank waits."""

    def send() -> None:
        while not (run.path / "waiting").exists():
            time.sleep(0.05)
        for number in numbers:
            os.kill(os.getpid(), number)
            time.sleep(0.5)

    threading.Thread(target=send, daemon=True).start()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT])
def test_a_signal_is_a_preemption(number: signal.Signals, tmp_path: Path) -> None:
    config, run = a_run(tmp_path, "logger.wandb.project=wait")
    before = [signal.getsignal(each) for each in SIGNALS]
    signalled(run, number)
    with pytest.raises(Preempted) as caught:
        launch(config, run, TASKS)
    assert caught.value.exit_status == 128 + number
    assert run.status()["state"] == "preempted"
    assert run.status()["error"] == f"interrupted ({number.name})"
    assert [signal.getsignal(each) for each in SIGNALS] == before


@pytest.mark.dist
def test_a_second_signal_ends_spawned_ranks_at_once(tmp_path: Path) -> None:
    """The ranks of this task note the first one and would go on for a minute."""
    config, run = a_run(tmp_path, "logger.wandb.project=wait_patiently", "parallel=pp2")
    signalled(run, signal.SIGUSR1, signal.SIGTERM)
    began = time.monotonic()
    with pytest.raises(Preempted):
        launch(config, run, TASKS)
    assert time.monotonic() - began < 40
    assert (run.path / "noted").exists()
    assert run.status()["error"] == "interrupted (SIGTERM)"


def outer_processes(where: Path, environments: list[dict[str, str]], *overrides: str) -> list[subprocess.CompletedProcess[str]]:
    """Run start.py once per environment, side by side."""
    command = [sys.executable, "-m", "tests.launch_tasks.start", str(where), *overrides]
    shared = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_PORT": str(free_port())}
    started = [
        subprocess.Popen(command, cwd=ROOT, env={**shared, **own}, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for own in environments
    ]
    done = []
    for process in started:
        out, err = process.communicate(timeout=100)
        done.append(subprocess.CompletedProcess(command, process.returncode, out, err))
    return done


def srun(rank: int) -> dict[str, str]:
    """As srun tells its tasks, on a node of this name."""
    place = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)}
    return {**place, "SLURM_STEP_NODELIST": "localhost", "SLURM_JOB_ID": "7"}


@pytest.mark.dist
def test_ranks_of_an_outer_launcher_share_one_directory(tmp_path: Path) -> None:
    where = tmp_path / "runs" / "a"
    results = outer_processes(where, [srun(0), srun(1)])
    assert [result.returncode for result in results] == [0, 0], results
    assert [path.name for path in where.parent.iterdir()] == ["a"]
    assert RunDirectory(where).status()["state"] == "done"
    assert json.loads(RunDirectory(where).final_metrics.read_text()) == {"val/loss/final": 1.0}
    assert prepared(RunDirectory(where)) == ["prepared_by_0"]
    assert (where / "rank_1").read_text().split()[0] == "2"  # parallel.dp is what is left of the ranks


@pytest.mark.dist
def test_an_outer_rank_0_that_cannot_start_lets_the_others_go(tmp_path: Path) -> None:
    first, second = outer_processes(tmp_path / "a", [srun(0), srun(1)], "parallel.dp=3", "tp=1")
    assert (first.returncode, second.returncode) == (1, 1)
    assert "parallel.dp=3" in first.stderr
    assert "did you mean parallel.tp" in first.stderr
    assert first.stderr.count("Traceback") + second.stderr.count("Traceback") == 0
    assert not (tmp_path / "a").exists()


@pytest.mark.dist
def test_a_users_error_on_an_outer_rank_is_a_message(tmp_path: Path) -> None:
    results = outer_processes(tmp_path / "a", [srun(0), srun(1)], "logger.wandb.project=alone")
    assert results[0].returncode == 1
    assert results[0].stderr.strip().endswith("no such checkpoint")
    assert RunDirectory(tmp_path / "a").status()["error"] == "no such checkpoint"


def test_the_place_under_torchrun_and_srun(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    assert outer_rank() is None
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")  # one task: the ranks are ours to start
    assert outer_rank() is None
    for name, value in {**srun(1), "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NODELIST": "gpu[03-05]"}.items():
        monkeypatch.setenv(name, value)
    assert outer_rank() == OuterRank(rank=1, local_rank=1, world_size=4)
    assert os.environ["MASTER_ADDR"] == "gpu03"


@pytest.mark.parametrize(("nodes", "first"), [("a", "a"), ("a1,a2", "a1"), ("gpu[03-05,9],x", "gpu03"), ("n-1[7]", "n-17")])
def test_first_host(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


def test_more_ranks_than_devices_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    config = compose(["task=train", "parallel=pp2"])
    with pytest.raises(ConfigError, match="2 ranks on this machine, but 1 CUDA devices"):
        check_devices(config, 2)
    check_devices(compose(["task=train", "parallel=pp2", "device=cpu"]), 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    check_devices(config, 2)
    with pytest.raises(ConfigError, match="no CUDA device"):
        check_devices(compose(["device=cuda"]), 1)
