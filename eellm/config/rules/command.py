"""Rules on what the command line asks for: runs it names, and values that nothing would read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from eellm.config.commandline import Override
from eellm.config.request import (
    BEGINS_WITH_A_MODEL,
    Request,
    checkpoint_overrides,
    measures_decoding,
    typed_value,
    unread_overrides,
    unread_with_the_choice,
)
from eellm.config.schema import BenchmarkConfig, DecodingConfig, EvaluationConfig, ParallelConfig, TaskConfig
from eellm.errors import Problem

Problems = Iterator[Problem]

_READ_ON_ONE_STAGE = ("benchmark.batches", "decoding.draft_length", "decoding.max_pending")


def runs_are_named_where_they_are_read(
    task: TaskConfig, benchmark: BenchmarkConfig, checkpoint: str | None, resume: str | None
) -> Problems:
    if task.name == "quickstart" and checkpoint is not None:
        yield Problem("checkpoint", checkpoint, "task=quickstart starts from random weights", "leave it out, or task=train")
    if task.name == "benchmark" and benchmark.name != "decoding" and checkpoint is not None:
        reason = f"task=benchmark benchmark={benchmark.name} measures a model with random weights"
        yield Problem("checkpoint", checkpoint, reason, "leave it out, or benchmark=decoding")
    if task.name == "plan" and checkpoint is not None:
        yield Problem("checkpoint", checkpoint, "task=plan reads no weights, only shapes", "leave it out")
    if task.name not in BEGINS_WITH_A_MODEL and resume is not None:
        yield Problem("resume", resume, f"task={task.name} cannot be resumed", "leave it out, or task=train")


def overrides_are_read(task: TaskConfig, request: Request) -> Problems:
    yield from unread_overrides(task.name, request)


def overrides_belong_to_the_choices(groups: dict[str, Any], request: Request) -> Problems:
    yield from unread_with_the_choice(groups, request)


def overrides_act_on_decoding(task: TaskConfig, decoding: DecodingConfig, parallel: ParallelConfig, request: Request) -> Problems:
    for override in request.parsed:
        if override.key in ("decoding.top_k", "decoding.top_p") and decoding.temperature == 0 and task.name != "serve":
            reason = "decoding.temperature=0 always takes the most probable token"
            yield Problem(override.key, typed_value(override), reason, "set decoding.temperature, or leave it out")
        if override.group == "exit_policy" and task.name == "generate" and decoding.mode == "full":
            reason = "decoding.mode=full never exits early"
            exiting = "catch_up" if parallel.pp == 1 else "pipeline"
            yield Problem(override.key, typed_value(override), reason, f"decoding={exiting}, or leave it out")


def overrides_act_on_the_comparison(
    task: TaskConfig, decoding: DecodingConfig, evaluation: EvaluationConfig, request: Request
) -> Problems:
    """task=evaluate decodes in order to compare modes, and only where there are some."""
    if task.name != "evaluate":
        return
    compared = evaluation.compared_modes(decoding.mode)
    for override in request.parsed:
        chooses_mode = override.key in ("decoding", "decoding.mode")
        if chooses_mode and evaluation.decodings is not None:
            yield Problem(override.key, typed_value(override), "evaluation.decodings names the modes", "leave one of the two out")
        elif not chooses_mode and not compared and _reads_decoding(override):
            reason = "no mode of decoding is compared with full depth"
            yield Problem(override.key, typed_value(override), reason, "evaluation.decodings=[catch_up], or leave it out")


def _reads_decoding(override: Override) -> bool:
    return override.group in ("decoding", "exit_policy") or override.key == "evaluation.speed_thresholds"


def overrides_act_on_the_stages(
    task: TaskConfig, benchmark: BenchmarkConfig, parallel: ParallelConfig, request: Request
) -> Problems:
    """Over several stages benchmark=decoding times full depth and the pipeline, for a single user."""
    for override in request.parsed if measures_decoding(task, benchmark) and parallel.pp > 1 else ():
        others = override.key == "benchmark.decodings" and set(benchmark.decodings) | {"full"} != {"full", "pipeline"}
        if others or override.key in _READ_ON_ONE_STAGE:
            reason = f"over several stages only full depth and the pipeline are timed (parallel.pp={parallel.pp})"
            yield Problem(override.key, typed_value(override), reason, "leave it out, or parallel.pp=1")


def overrides_act_on_random_weights(
    task: TaskConfig, benchmark: BenchmarkConfig, checkpoint: str | None, request: Request
) -> Problems:
    for override in request.parsed if measures_decoding(task, benchmark) and checkpoint is None else ():
        if override.key == "exit_policy.threshold":
            reason = "random weights are never sure: without a checkpoint, early exit is timed at a fixed layer"
            yield Problem(override.key, typed_value(override), reason, "checkpoint=<run directory>, or benchmark.thresholds")


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
    overrides_act_on_the_comparison,
    overrides_act_on_the_stages,
    overrides_act_on_random_weights,
    overrides_leave_the_checkpoint_alone,
]
