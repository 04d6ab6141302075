"""Rules on evaluating with lm-evaluation-harness. Its tasks are looked up and loaded after these, before ranks start."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

from eellm.config.request import Request, typed_value
from eellm.config.schema import EvaluationConfig, TaskConfig
from eellm.errors import Problem

Problems = Iterator[Problem]

_SAID_BY_TASKS = ("decoding.temperature", "decoding.top_k", "decoding.top_p")


def the_harness_is_there(task: TaskConfig, evaluation: EvaluationConfig) -> Problems:
    if asks_the_harness(task, evaluation) and find_spec("lm_eval") is None:
        fix = "pip install 'eellm[eval]'"
        yield Problem("evaluation.name", "lm_eval", "lm-evaluation-harness (the package lm-eval) is not installed", fix)


def tasks_are_named(task: TaskConfig, evaluation: EvaluationConfig) -> Problems:
    if not asks_the_harness(task, evaluation):
        return
    if not evaluation.tasks:
        yield Problem("evaluation.tasks", [], "there is nothing to answer", "evaluation.tasks=[lambada_openai]")
    for name in sorted({name for name in evaluation.tasks if evaluation.tasks.count(name) > 1}):
        yield Problem("evaluation.tasks", name, "is named more than once", "name it once")


def own_tasks_are_there(task: TaskConfig, evaluation: EvaluationConfig) -> Problems:
    path = evaluation.include_path
    if not asks_the_harness(task, evaluation) or path is None:
        return
    if not Path(path).expanduser().is_dir():
        yield Problem("evaluation.include_path", path, "there is no such folder", "a folder with tasks as YAML files")
    elif not any(Path(path).expanduser().rglob("*.yaml")):
        yield Problem(
            "evaluation.include_path", path, "the folder has no task: no file ends in .yaml", "the folder of your tasks"
        )


def other_tasks_have_no_harness(task: TaskConfig, evaluation: EvaluationConfig) -> Problems:
    if task.name == "quickstart" and evaluation.name == "lm_eval":
        fix = "leave it out, or task=evaluate with the quickstart's run as checkpoint"
        yield Problem("evaluation.name", "lm_eval", "task=quickstart evaluates on held-out text", fix)


def overrides_act_on_the_harness(task: TaskConfig, evaluation: EvaluationConfig, request: Request) -> Problems:
    if task.name != "evaluate":
        return
    for override in request.parsed:
        if evaluation.name == "lm_eval" and override.key in _SAID_BY_TASKS:
            yield Problem(override.key, typed_value(override), "each task's generation_kwargs say how to sample", "leave it out")
        if evaluation.name == "exits" and override.key == "decoding.max_batch":
            yield Problem(override.key, typed_value(override), "modes are timed one prompt at a time", "leave it out")


def asks_the_harness(task: TaskConfig, evaluation: EvaluationConfig) -> bool:
    return task.name == "evaluate" and evaluation.name == "lm_eval"


RULES: list[Callable[..., Problems]] = [
    the_harness_is_there,
    tasks_are_named,
    own_tasks_are_there,
    other_tasks_have_no_harness,
    overrides_act_on_the_harness,
]
