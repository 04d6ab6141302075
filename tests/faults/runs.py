"""Runs of the command line that are interrupted from outside: start one, wait for a moment in its life, hit a process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

from eellm.rundir import RunDirectory
from tests.train.fitting import BASE

ROOT = Path(__file__).resolve().parents[2]
TIMED = ("train/step_time", "train/tokens_per_second", "train/tflops", "train/memory_gb")
STEPS = ["trainer.max_steps=12", "trainer.val_every=4", "trainer.checkpoint_every=1", "trainer.keep_checkpoints=2"]


@dataclass
class Life:
    """One start of a command, alone in its session."""

    command: list[str]
    folder: Path
    """Holds one directory a run; `resume=auto` looks here."""
    began: float = field(default_factory=time.time)

    def __post_init__(self) -> None:
        self.log = self.folder.with_suffix(".log").open("a", encoding="utf-8")
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        self.process = subprocess.Popen(
            self.command, cwd=ROOT, env=environment, start_new_session=True, stdout=self.log, stderr=subprocess.STDOUT
        )

    def members(self) -> list[psutil.Process]:
        """The processes of the session that still run, zombies left out."""
        alive = []
        for process in psutil.process_iter():
            try:
                if os.getsid(process.pid) == self.process.pid and process.status() != psutil.STATUS_ZOMBIE:
                    alive.append(process)
            except (psutil.Error, ProcessLookupError):
                pass
        return alive

    def ranks(self) -> list[psutil.Process]:
        """Spawned ranks in order, as soon as there are any."""
        try:
            children = psutil.Process(self.process.pid).children()
            return [child for child in children if "spawn_main" in " ".join(child.cmdline())]
        except psutil.Error:
            return []

    def runs(self) -> list[RunDirectory]:
        return [RunDirectory(path.parent) for path in sorted(self.folder.glob("*/status.json"))]

    def step(self) -> int:
        """The last step that this life has recorded; 0 = none yet."""
        rows = [row for run in self.runs() for row in records(run.path) if row["time"] > self.began]
        return max((int(row["step"]) for row in rows), default=0)

    def saving(self) -> bool:
        """Whether a checkpoint is being written; what an earlier life left half written is older than this one."""
        partial = [path for run in self.runs() if run.checkpoints.is_dir() for path in run.checkpoints.glob("*partial*")]
        return any(path.stat().st_mtime > self.began for path in partial if path.exists())

    def wait_until(self, reached: Callable[[], bool], timeout: float = 400.0, poll: float = 0.02) -> bool:
        """Whether the moment came while the command was still running."""
        deadline = time.monotonic() + timeout
        while self.process.poll() is None and time.monotonic() < deadline:
            if reached():
                return True
            time.sleep(poll)
        return False

    def seconds_to_end(self, timeout: float = 120.0) -> float:
        """How long it takes until no process of the session is left. Raises TimeoutError naming those that stay."""
        began = time.monotonic()
        while self.process.poll() is None or self.members():
            if time.monotonic() - began > timeout:
                left = [f"{process.pid} {' '.join(process.cmdline())}" for process in self.members()]
                for process in self.members():
                    process.kill()
                raise TimeoutError(f"still running after {timeout} s: {left}\n{self.log_text()[-3000:]}")
            time.sleep(0.05)
        self.log.close()
        return time.monotonic() - began

    def log_text(self) -> str:
        return self.folder.with_suffix(".log").read_text(encoding="utf-8")


def start(folder: Path, *overrides: str, launcher: tuple[str, ...] = ()) -> Life:
    """`python run.py task=train resume=auto` with runs under `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    shared = [f"data.cache_dir={folder.parent / 'cache'}", f"hydra.run.dir={folder}/${{now:%H-%M-%S-%f}}", "resume=auto"]
    command = [sys.executable, *launcher, str(ROOT / "run.py"), *BASE, *STEPS, *shared, *overrides]
    return Life(command, folder)


def finish(folder: Path, *overrides: str, launcher: tuple[str, ...] = ()) -> RunDirectory:
    """Run to the end; returns the one run that is done."""
    life = start(folder, *overrides, launcher=launcher)
    life.seconds_to_end(timeout=600.0)
    assert life.process.returncode == 0, life.log_text()[-3000:]
    (done,) = [run for run in life.runs() if run.status()["state"] == "done"]
    return done


def records(run: Path) -> list[dict]:
    path = run / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


def untimed(row: dict) -> dict:
    return {key: value for key, value in row.items() if key != "time" and not key.startswith(TIMED)}


def final(run: RunDirectory) -> dict:
    """The last value of every metric: of metrics.json, which a command writes, else of the record."""
    if run.final_metrics.exists():
        return untimed(json.loads(run.final_metrics.read_text(encoding="utf-8")))
    return {key: value for row in records(run.path) for key, value in untimed(row).items() if key != "step"}


def differences(run: RunDirectory, wanted: RunDirectory) -> list[str]:
    """Where a run's record, final metrics or last checkpoint are not exactly another's."""
    found = []
    if [untimed(row) for row in records(run.path)] != [untimed(row) for row in records(wanted.path)]:
        found.append("metrics.jsonl")
    if final(run) != final(wanted):
        found.append("metrics.json")
    if run.steps()[-1].name != wanted.steps()[-1].name:
        return [*found, "last step"]
    mine, theirs = tensors(run.steps()[-1]), tensors(wanted.steps()[-1])
    if mine.keys() != theirs.keys():
        return [*found, "names of tensors"]
    return found + [name for name in mine if not torch.equal(mine[name], theirs[name])]


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """All weights and optimizer states of a checkpoint."""
    state: dict = {}
    _load_state_dict(state, storage_reader=FileSystemReader(checkpoint), planner=_EmptyStateDictLoadPlanner(), no_dist=True)
    return {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}
