"""The harness's tasks: found by name, loaded with their data, or named as what cannot be."""

from __future__ import annotations

import difflib
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from lm_eval.api.group import Group
from lm_eval.api.model import LM
from lm_eval.api.task import Task
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager

from eellm.config.schema import EvaluationConfig
from eellm.errors import ConfigError, Problem

HUB = "huggingface.co"
LONGEST_REASON = 200
SEED = 1234
"""The harness's own."""


@dataclass(frozen=True)
class Catalogue:
    """Tasks and groups that a run asked for, loaded."""

    manager: TaskManager
    tasks: list[Task | Group]

    @property
    def members(self) -> dict[str, list[str]]:
        """Names of the single tasks of every group."""
        groups = self.manager.load(self.tasks).get("groups", {})
        return {name: [task.task_name for task in group.get_all_tasks()] for name, group in groups.items()}

    def evaluate(self, model: LM, config: EvaluationConfig) -> dict[str, Any]:
        """The harness's results for a model, with the same questions and examples every time.

        `lm_eval.simple_evaluate` would do, with these seeds, but asks pip and the system about the machine at every call.
        """
        random.seed(0)
        np.random.seed(SEED)
        loaded = self.manager.load(self.tasks)
        for task in loaded["tasks"].values():
            own = task.get_config("num_fewshot")
            if own is None or (own != 0 and config.num_fewshot is not None):  # a task that says 0 means it
                task.set_config("num_fewshot", config.num_fewshot or 0)
            task.set_fewshot_seed(SEED)
        results = evaluate(lm=model, task_dict=loaded, limit=config.limit, bootstrap_iters=config.bootstrap, log_samples=False)
        assert results is not None, "every rank is the harness's first"
        return dict(results)


def load_catalogue(config: EvaluationConfig) -> Catalogue:
    """Find and load tasks with their data. Raises ConfigError that names every one that cannot be.

    The harness's own 14,000 tasks are looked through (which takes seconds) only where a name is not found in `include_path`.
    """
    manager = TaskManager(include_path=_folder(config), include_defaults=False)
    if any(name not in manager.task_index for name in config.tasks):
        manager = TaskManager(include_path=_folder(config))
    problems: list[Problem] = []
    tasks: list[Task | Group] = []
    for name in config.tasks:
        if name not in manager.task_index:
            problems.append(_unknown(name, manager))
            continue
        try:
            with _no_progress():
                loaded = manager.load([name])
        except Exception as error:  # of the harness, `datasets`, the hub, or code that belongs to the task
            problems.append(_not_loaded(name, error))
            continue
        group = loaded.get("groups", {}).get(name)
        tasks += [group] if group is not None else loaded["tasks"].values()
    problems = problems or list(_unsuitable(manager, tasks))
    if problems:
        raise ConfigError(problems)
    return Catalogue(manager, tasks)


def _folder(config: EvaluationConfig) -> str | None:
    return None if config.include_path is None else str(Path(config.include_path).expanduser())


def _unknown(name: str, manager: TaskManager) -> Problem:
    near = difflib.get_close_matches(name, manager.all_tasks, 3)
    listed = "`lm-eval ls tasks` lists the harness's, evaluation.include_path adds yours"
    reason = "neither lm-evaluation-harness nor evaluation.include_path has such a task, group or tag"
    return Problem("evaluation.tasks", name, reason, f"did you mean {' or '.join(near)}?" if near else listed)


def _not_loaded(name: str, error: Exception) -> Problem:
    words = " ".join(f"{type(error).__name__}: {error}".split())
    reason = words if len(words) <= LONGEST_REASON else words[:LONGEST_REASON] + "..."
    package = next((one.name for one in _chain(error) if isinstance(one, ModuleNotFoundError)), None)
    if package is not None:
        fix = f"pip install {package}"
    elif any(_is_of_the_network(one) for one in _chain(error)):
        fix = f"a machine that reaches {HUB} or has the data in its cache (HF_HOME), or a task over local files"
    else:
        fix = "the task's YAML and its data set say what it needs"
    return Problem("evaluation.tasks", name, f"cannot be loaded: {reason}", fix)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _is_of_the_network(error: BaseException) -> bool:
    """`datasets` calls a data set that it cannot reach one that is not there."""
    name = type(error).__name__
    return name in ("OfflineModeIsEnabled", "DatasetNotFoundError") or isinstance(error, ConnectionError) or "Connect" in name


def _unsuitable(manager: TaskManager, tasks: Sequence[Task | Group]) -> Iterator[Problem]:
    """Tasks that the harness would refuse once it has begun."""
    try:
        loaded = manager.load(list(tasks))["tasks"]
    except ValueError as error:  # in two groups, or in a group and by itself
        yield Problem("evaluation.tasks", "twice", str(error), "leave one of the two out")
        return
    for name, task in loaded.items():
        if getattr(task, "UNSAFE_CODE", False):
            yield Problem("evaluation.tasks", name, "runs code that the model writes", "leave it out: there is no sandbox here")
        if getattr(task, "MULTIMODAL", False):
            yield Problem("evaluation.tasks", name, "shows pictures or sounds", "leave it out: models here read text")


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
