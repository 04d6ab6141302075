"""What a task is given."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from eellm.config.schema import Config
from eellm.rundir import RunDirectory


@dataclass(frozen=True)
class TaskContext:
    """A validated config whose `parallel.dp` is a number, and the run directory (made; written by the main rank)."""

    config: Config
    run_dir: Path

    @property
    def run(self) -> RunDirectory:
        return RunDirectory(self.run_dir)
