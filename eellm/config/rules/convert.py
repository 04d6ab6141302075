"""Rules on what is converted into what. What is wrong with the source itself is found where it is read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.util import find_spec

from eellm.config.conversion import is_run
from eellm.config.paths import expanded
from eellm.config.request import Request, typed_value
from eellm.config.schema import ConvertConfig, DataConfig, ModelConfig, TaskConfig
from eellm.convert.families import family_of
from eellm.convert.resolved import resolved_model
from eellm.errors import Problem

Problems = Iterator[Problem]


def a_conversion_has_both_ends(task: TaskConfig, convert: ConvertConfig) -> Problems:
    if task.name != "convert":
        return
    if convert.source is None:
        yield Problem("convert.source", None, "task=convert reads a model", "convert.source=<folder, .gguf file or hub name>")
    if convert.target is None:
        yield Problem("convert.target", None, "task=convert writes a folder", "convert.target=<folder>")
        return
    target = expanded(convert.target)
    if target.is_file() or (target.is_dir() and any(target.iterdir())):
        what = "it is a file" if target.is_file() else "the folder is not empty"
        yield Problem("convert.target", convert.target, what, "name a folder that does not exist")


def packages_of_the_format_are_there(task: TaskConfig, convert: ConvertConfig) -> Problems:
    if task.name == "convert" and find_spec("safetensors") is None:
        reason = "needs safetensors, which is not installed"
        yield Problem("convert.format", convert.format, reason, "pip install 'eellm[hf]'")


def conversions_run_in_one_process(task: TaskConfig, request: Request) -> Problems:
    if task.name == "convert" and request.world_size is not None and request.world_size > 1:
        reason = f"it runs in one process, and {request.world_size} are started"
        yield Problem("task.name", task.name, reason, "start it with python run.py")


def a_family_can_say_the_model(task: TaskConfig, convert: ConvertConfig, model: ModelConfig, data: DataConfig) -> Problems:
    if task.name != "convert" or convert.format != "huggingface" or convert.source is None:
        return
    family, lost = family_of(resolved_model(model, 1, data.sequence_length))
    for what in lost:
        fix = f"no family of transformers is built like this model; {family.architecture} comes nearest"
        yield Problem(f"model.{what.field}", what.value, what.reason, fix)


def what_a_run_has_travels_as_it_is(task: TaskConfig, convert: ConvertConfig, request: Request) -> Problems:
    """All of it to other libraries; to another run all but the exits."""
    if task.name != "convert" or convert.source is None or not is_run(convert.source):
        return
    for override in request.parsed:
        if override.group == "model" or (override.group == "exits" and convert.format == "huggingface"):
            yield Problem(override.key, typed_value(override), f"`{override.group}` comes from the run", "leave it out")


RULES: list[Callable[..., Problems]] = [
    a_conversion_has_both_ends,
    packages_of_the_format_are_there,
    conversions_run_in_one_process,
    a_family_can_say_the_model,
    what_a_run_has_travels_as_it_is,
]
