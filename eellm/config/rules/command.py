"""Rules on what the command line asks for: runs it names, and values that nothing would read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from eellm.config.request import (
    Request,
    checkpoint_overrides,
    typed_value,
    unread_overrides,
    unread_with_the_choice,
)
from eellm.config.schema import DecodingConfig, ParallelConfig, TaskConfig
from eellm.errors import Problem

Problems = Iterator[Problem]


def runs_are_named_where_they_are_read(task: TaskConfig, checkpoint: str | None, resume: str | None) -> Problems:
    if task.name == "quickstart" and checkpoint is not None:
        yield Problem("checkpoint", checkpoint, "task=quickstart starts from random weights", "leave it out, or task=train")
    if task.name == "benchmark" and checkpoint is not None:
        yield Problem("checkpoint", checkpoint, "task=benchmark measures a model with random weights", "leave it out")
    if task.name != "train" and resume is not None:
        yield Problem("resume", resume, f"task={task.name} cannot be resumed", "leave it out, or task=train")


def overrides_are_read(task: TaskConfig, request: Request) -> Problems:
    yield from unread_overrides(task.name, request)


def overrides_belong_to_the_choices(groups: dict[str, Any], request: Request) -> Problems:
    yield from unread_with_the_choice(groups, request)


def overrides_act_on_decoding(task: TaskConfig, decoding: DecodingConfig, parallel: ParallelConfig, request: Request) -> Problems:
    for override in request.parsed:
        if override.key in ("decoding.top_k", "decoding.top_p") and decoding.temperature == 0:
            reason = "decoding.temperature=0 always takes the most probable token"
            yield Problem(override.key, typed_value(override), reason, "set decoding.temperature, or leave it out")
        if override.group == "exit_policy" and task.name == "generate" and decoding.mode == "full":
            reason = "decoding.mode=full never exits early"
            exiting = "catch_up" if parallel.pp == 1 else "pipeline"
            yield Problem(override.key, typed_value(override), reason, f"decoding={exiting}, or leave it out")


def overrides_leave_the_checkpoint_alone(
    task: TaskConfig, checkpoint: str | None, resume: str | None, request: Request
) -> Problems:
    if checkpoint is not None and resume in (None, "auto"):  # a resumed run says itself what it keeps
        yield from checkpoint_overrides(task.name, request)


RULES: list[Callable[..., Problems]] = [
    runs_are_named_where_they_are_read,
    overrides_are_read,
    overrides_belong_to_the_choices,
    overrides_act_on_decoding,
    overrides_leave_the_checkpoint_alone,
]
