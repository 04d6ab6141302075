"""Sweeps in this process: run.py itself, with a stand-in for the tasks that computes in no time."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import run
from eellm.config.schema import Config
from eellm.launch import recorded
from eellm.rundir import RunDirectory
from eellm.sweep import job, ledger

Task = Callable[[Config, RunDirectory], dict[str, float]]
SMALL = ("-m", "task=train", "name=s")


class Sweeps:
    """`sweeps(*arguments)` runs a command line in `folder` and gives its exit status; `seen` are the configs that tasks got."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path, task: Task):
        self.monkeypatch, self.folder, self.task = monkeypatch, folder, task
        self.seen: list[Config] = []
        monkeypatch.chdir(folder)
        monkeypatch.setattr(job, "launch", self._launch)

    def __call__(self, *arguments: str) -> int:
        self.seen.clear()
        self.monkeypatch.setattr(ledger, "CURRENT", None)
        self.monkeypatch.setattr(sys, "argv", ["run.py", *arguments])
        with pytest.raises(SystemExit) as ended:
            run.main()
        return int(ended.value.code or 0)

    def _launch(self, config: Config, opened: RunDirectory) -> dict[str, float]:
        self.seen.append(config)
        with recorded(opened):
            metrics = self.task(config, opened)
            opened.write_metrics(metrics)
        return metrics

    def runs(self, study: str = "s") -> dict[str, RunDirectory]:
        """By fingerprint."""
        return {path.parent.name: RunDirectory(path.parent) for path in (self.folder / "multirun" / study).glob("*/status.json")}

    def states(self, study: str = "s") -> list[str]:
        return sorted(str(opened.status()["state"]) for opened in self.runs(study).values())


def last_lines(text: str) -> str:
    """What a sweep says at its end."""
    return text[text.rindex("\n", 0, text.rindex(" in multirun/")) + 1 :]


def parabola(config: Config, _: RunDirectory) -> dict[str, float]:
    """A loss that is best at lr = 0.3, and a speed that grows with it."""
    return parabola_at(config.optimizer.lr)


def parabola_at(lr: float) -> dict[str, float]:
    return {"val/loss/final": (lr - 0.3) ** 2, "speed": lr}
