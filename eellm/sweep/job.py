"""One job of a sweep: run, continued, or skipped because it is done."""

from __future__ import annotations

import fcntl
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from omegaconf import DictConfig

from eellm.config.commandline import as_typed
from eellm.config.compose import plain, validated
from eellm.config.fingerprint import run_fingerprint
from eellm.config.schema import Config
from eellm.errors import ConfigError, JobFailed, Problem, RankFailure, UserError, shown_as, writing
from eellm.launch import launch
from eellm.outer import outer_rank
from eellm.preemption import Preempted
from eellm.resume import open_job
from eellm.rundir import RunDirectory
from eellm.sweep import ledger
from eellm.sweep.ledger import Entry

Value = float | tuple[float, ...] | None

_GRID = "hydra._internal.core_plugins.basic_sweeper.BasicSweeper"
"""The sweeper that asks for no values."""


def sweep_job(composed: DictConfig, hydra_config: DictConfig) -> Value:
    """Run a job, unless it is done, in `<sweep folder>/<fingerprint>`; the objective's value or values.

    A failure is shown and noted in the ledger. It is raised, as JobFailed, only where the sweeper wants a value: Hydra's
    own would leave out the batches behind a job that raises.
    """
    overrides = [as_typed(override) for override in hydra_config.overrides.task]
    entry = Entry(hydra_config.job.num, overrides)
    _note(entry)
    asked = hydra_config.sweeper._target_ != _GRID
    try:
        config = _config_of(composed, overrides, hydra_config)
        folder = Path(hydra_config.runtime.output_dir) / run_fingerprint(config)
        entry = replace(entry, folder=str(folder))
        metrics, state = run_unless_done(config, RunDirectory(folder), overrides)
        value = objective_of(config, metrics, asked)
    except (Preempted, KeyboardInterrupt) as error:
        _note(replace(entry, state="preempted", error=f"interrupted ({str(error) or 'SIGINT'})"))
        raise
    except Exception as error:
        sys.stderr.write(f"{shown_as(error)}\n")
        _note(replace(entry, state="failed", error=in_brief(error)))
        if asked:
            raise JobFailed(in_brief(error)) from error
        return None
    _note(replace(entry, state=state))
    return value


def run_unless_done(config: Config, run: RunDirectory, overrides: list[str]) -> tuple[dict[str, float], ledger.State]:
    """The run's final metrics, and whether it was done before.

    What an earlier attempt has left is continued where it has a whole checkpoint, else it makes room. Raises what
    `launch` raises.
    """
    with sole_writer(run):
        metrics = run.final_scalars() if run.status().get("state") == "done" else None
        if metrics is not None:
            _say(f"{run.path}: done before, skipped")
            return metrics, "skipped"
        return launch(open_job(config, run, overrides), run), "done"


@contextmanager
def sole_writer(run: RunDirectory) -> Iterator[None]:
    """Hold the run's lock, after waiting for another job of the same values to end. The system lets go of a dead process's.

    Raises WriteError, also where the file system has no locks.
    """
    with writing(run.path):
        run.path.mkdir(parents=True, exist_ok=True)
    with writing(run.lock):
        file = run.lock.open("a+", encoding="utf-8")
    with file:
        with writing(run.lock):
            _wait_for(file, run)
            file.truncate(0)
            file.write(f"process {os.getpid()} on {os.uname().nodename}")
            file.flush()
        yield


def _wait_for(file, run: RunDirectory) -> None:  # type: ignore[no-untyped-def]
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        _say(f"{run.path}: {file.read() or 'another process'} runs these values now; waiting for its result")
        fcntl.flock(file, fcntl.LOCK_EX)


def objective_of(config: Config, metrics: dict[str, float], asked: bool) -> Value:
    """Value of `objective`, a tuple where it is a list; None where the run has no such metric.

    Raises UserError for that where the value was asked for.
    """
    names = [config.objective] if isinstance(config.objective, str) else config.objective
    missing = [name for name in names if name not in metrics]
    if missing:
        if asked:
            found = ", ".join(sorted(metrics)) or "none"
            raise UserError(f"objective={','.join(missing)}: task={config.task.name} has no such metric. It has: {found}")
        return None
    values = tuple(float(metrics[name]) for name in names)
    return values[0] if isinstance(config.objective, str) else values


def in_brief(error: BaseException) -> str:
    """An error on one line: a traceback's last line, other messages whole."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if isinstance(error, RankFailure) and len(lines) > 1:
        return f"{lines[0]} {lines[-1]}"
    text = " ".join(lines)
    return text if isinstance(error, UserError | RankFailure) else f"{type(error).__name__}: {text}"


def _config_of(composed: DictConfig, overrides: list[str], hydra_config: DictConfig) -> Config:
    """The validated config. Raises ConfigError, also for what cannot be in a sweep."""
    problems = []
    if outer_rank() is not None:
        fix = "start one run per launch, or a sweep without torchrun"
        problems.append(Problem("hydra.mode", "MULTIRUN", "a sweep cannot run under an outer launcher", fix))
    if composed.get("resume") not in (None, "auto"):
        reason = "every job of a sweep has a folder of its own, and goes on by itself where it was interrupted"
        problems.append(Problem("resume", composed.resume, reason, "leave it out; checkpoint= begins with a run's weights"))
    direction = hydra_config.sweeper.get("direction")
    directions = len(direction) if direction is not None and not isinstance(direction, str) else 1
    objectives = composed.get("objective")
    count = 1 if isinstance(objectives, str) else len(objectives or ())
    if direction is not None and directions != count:
        reason = f"the sweeper has {directions} directions, for {count} metrics"
        problems.append(Problem("objective", objectives, reason, "as many metrics as hydra.sweeper.direction has entries"))
    if problems:
        raise ConfigError(problems)
    return validated(plain(composed), overrides)


def _note(entry: Entry) -> None:
    if ledger.CURRENT is not None:
        ledger.CURRENT.note(entry)


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()
