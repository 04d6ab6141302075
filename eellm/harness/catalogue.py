"""The harness's tasks: found by name, loaded with their data, or named as what cannot be."""

from __future__ import annotations

import difflib
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from lm_eval.api.group import Group
from lm_eval.api.task import Task
from lm_eval.tasks import TaskManager

from eellm.config.schema import EvaluationConfig
from eellm.errors import ConfigError, Problem

HUB = "huggingface.co"
LONGEST_REASON = 200


@dataclass(frozen=True)
class Catalogue:
    """Tasks that a run asked for: what `lm_eval.simple_evaluate` takes as `tasks`, and its task manager."""

    manager: TaskManager
    tasks: list[Task | Group]

    @property
    def names(self) -> list[str]:
        """Of all single tasks."""
        return list(self.manager.load(self.tasks)["tasks"])

    @property
    def members(self) -> dict[str, list[str]]:
        """Names of the single tasks of every group."""
        return {name: [task.task_name for task in group.get_all_tasks()] for name, group in self._groups().items()}

    def _groups(self) -> dict[str, Group]:
        return self.manager.load(self.tasks).get("groups", {})


def load_catalogue(config: EvaluationConfig) -> Catalogue:
    """Find and load tasks with their data. Raises ConfigError that names every one that cannot be.

    The harness's own 14,000 tasks are looked through (about ten seconds) only where a name is not found in `include_path`.
    """
    manager = _manager(config, with_own=False)
    if config.include_path is None or any(not _is_known(manager, name) for name in config.tasks):
        manager = _manager(config, with_own=True)
    problems = [_unknown(name, manager) for name in config.tasks if not _is_known(manager, name)]
    tasks: list[Task | Group] = []
    for name in config.tasks:
        if not _is_known(manager, name):
            continue
        try:
            with _no_progress():
                loaded = manager._load_spec(name)
            tasks += loaded if isinstance(loaded, list) else [loaded]
        except Exception as error:  # of the harness, `datasets`, the hub, or code that belongs to the task
            problems.append(_not_loaded(name, error))
    if not problems:
        problems = [*_unsuitable(manager, tasks)]
    if problems:
        raise ConfigError(problems)
    return Catalogue(manager, tasks)


def _manager(config: EvaluationConfig, with_own: bool) -> TaskManager:
    return TaskManager(include_path=config.include_path, include_defaults=with_own)


def _is_known(manager: TaskManager, name: str) -> bool:
    return name in manager.task_index


def _unknown(name: str, manager: TaskManager) -> Problem:
    near = difflib.get_close_matches(name, manager.all_tasks, 3)
    guess = (
        f"did you mean {' or '.join(near)}?"
        if near
        else "`lm-eval ls tasks` lists the harness's, evaluation.include_path adds yours"
    )
    return Problem("evaluation.tasks", name, "neither a task, group nor tag of the harness nor of evaluation.include_path", guess)


def _not_loaded(name: str, error: Exception) -> Problem:
    words = " ".join(f"{type(error).__name__}: {error}".split())
    reason = words if len(words) <= LONGEST_REASON else words[:LONGEST_REASON] + "..."
    if _is_missing_package(error):
        fix = f"pip install {_missing(error)}"
    elif _is_of_the_network(error):
        fix = f"a machine that reaches {HUB}, or has the data in its cache (HF_HOME), or a task over local files (dataset_path: json)"
    else:
        fix = "the task's YAML and its data set say what it needs"
    return Problem("evaluation.tasks", name, f"cannot be loaded: {reason}", fix)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _is_missing_package(error: Exception) -> bool:
    return any(isinstance(one, ModuleNotFoundError) for one in _chain(error))


def _missing(error: Exception) -> str:
    return next(str(one.name) for one in _chain(error) if isinstance(one, ModuleNotFoundError))


def _is_of_the_network(error: Exception) -> bool:
    """Also what `datasets` makes of it: a data set that it cannot reach it calls one that is not there."""
    names = {type(one).__name__ for one in _chain(error)}
    offline = {"OfflineModeIsEnabled", "LocalEntryNotFoundError", "DatasetNotFoundError", "ConnectTimeout"}
    return bool(names & offline) or any(
        isinstance(one, ConnectionError | socket.gaierror) or "Connect" in type(one).__name__ for one in _chain(error)
    )


def _unsuitable(manager: TaskManager, tasks: Sequence[Task | Group]) -> Iterator[Problem]:
    """Tasks that the harness would refuse when it has begun."""
    try:
        loaded: dict[str, Any] = dict(manager.load(list(tasks)))["tasks"]
    except ValueError as error:
        yield Problem("evaluation.tasks", [task_name(task) for task in tasks], str(error), "name it once")
        return
    for name, task in loaded.items():
        if getattr(task, "UNSAFE_CODE", False):
            yield Problem(
                "evaluation.tasks", name, "runs code that the model writes", "leave it out: eellm has no sandbox for it"
            )
        if getattr(task, "MULTIMODAL", False):
            yield Problem("evaluation.tasks", name, "shows pictures or sounds", "leave it out: the models here read text")


def task_name(task: Task | Group) -> str:
    return task.name if isinstance(task, Group) else task.task_name


@contextmanager
def _no_progress() -> Iterator[None]:
    """Without the bars of `datasets`."""
    import datasets

    shown = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()
