"""Rules on programs from files and on what task=plan is asked."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from eellm.config.planning import DeviceProfileConfig, PlanConfig
from eellm.config.request import Request, typed_value
from eellm.config.schema import Config, DataConfig, ExitsConfig, ParallelConfig, ScheduleConfig, TaskConfig
from eellm.errors import Problem
from eellm.plan.case import Case
from eellm.plan.times import loads_of
from eellm.schedule.csv_file import read_csv
from eellm.schedule.invariants import checked
from eellm.schedule.program import Kind, ScheduleError

Problems = Iterator[Problem]

UNWEIGHED = (Kind.FORWARD_ONLY, Kind.WEIGHT)
"""What the executor does not do in a program of one's own: a backward pass in parts, and microbatches that some stages do not
back-propagate, which would need weights of their own to be unbiased."""


def program_keeps_the_invariants(
    task: TaskConfig, schedule: ScheduleConfig, parallel: ParallelConfig, data: DataConfig, plan: PlanConfig
) -> Problems:
    if schedule.name != "csv":
        return
    if schedule.path is None:
        yield Problem("schedule.path", None, "schedule=csv reads a program", "schedule.path=<file>")
        return
    try:
        program = checked(read_csv(Path(schedule.path).expanduser()))
    except ScheduleError as error:
        yield Problem("schedule.path", schedule.path, str(error), "correct the program")
        return
    if program.pp != parallel.pp or program.num_chunks != parallel.vp:
        reason = f"is for {program.pp} ranks with {program.num_chunks} chunks, parallel has pp={parallel.pp}, vp={parallel.vp}"
        fix = f"parallel.pp={program.pp} parallel.vp={program.num_chunks}"
        yield Problem("schedule.path", schedule.path, reason, fix)
        return
    partial = {action.kind.value for actions in program.ranks for action in actions if action.kind in UNWEIGHED}
    if task.name != "plan" and partial:
        reason = f"has actions {', '.join(sorted(partial))}: microbatches are run whole in training"
        yield Problem("schedule.path", schedule.path, reason, "task=plan, or F and B only")
    dp = parallel.dp or max(1, (plan.gpus or 1) // (parallel.tp * parallel.pp))
    batch = program.num_microbatches * data.micro_batch_size * dp
    if batch != data.global_batch_size:
        microbatches = f"{program.num_microbatches} microbatches of data.micro_batch_size={data.micro_batch_size}"
        reason = f"schedule.path has {microbatches}, on {dp} replicas"
        yield Problem("data.global_batch_size", data.global_batch_size, reason, f"data.global_batch_size={batch}")


def plan_has_something_to_plan(task: TaskConfig, plan: PlanConfig, schedule: ScheduleConfig) -> Problems:
    if task.name == "plan" and not plan.schedules and schedule.name != "csv":
        yield Problem("plan.schedules", [], "there is nothing to set side by side", "plan.schedules=[one_f_one_b]")


def devices_are_counted_once(task: TaskConfig, plan: PlanConfig, parallel: ParallelConfig, request: Request) -> Problems:
    if task.name != "plan":
        return
    if plan.gpus is not None and parallel.dp is not None and parallel.tp * parallel.pp * parallel.dp != plan.gpus:
        reason = f"parallel.tp x pp x dp = {parallel.tp * parallel.pp * parallel.dp}"
        yield Problem("plan.gpus", plan.gpus, reason, "leave parallel.dp null for what is left of them")
    if request.world_size is not None and request.world_size > 1:
        fix = "start it with python run.py"
        yield Problem("task.name", task.name, f"it runs in one process, and {request.world_size} are started", fix)


def the_device_profile_decides_something(
    task: TaskConfig, parallel: ParallelConfig, exits: ExitsConfig, schedule: ScheduleConfig, request: Request
) -> Problems:
    """task=plan always reads it."""
    asked = "balance" in (parallel.layers_per_stage, exits.boundary) or schedule.backward_forward_ratio is None
    for override in request.parsed if task.name != "plan" and not asked else ():
        if override.group == "device_profile":
            reason = f"task={task.name} reads it where something is left to it"
            fix = "parallel.layers_per_stage=balance, exits.boundary=balance, schedule.backward_forward_ratio=null, or task=plan"
            yield Problem(override.key, typed_value(override), reason, fix)


def the_measured_passes_are_the_runs(groups: dict[str, Any], device_profile: DeviceProfileConfig) -> Problems:
    if device_profile.timed is None or set(groups) != set(Config.model_fields):
        return
    config = Config(**groups)
    vocab_size = config.model.vocab_size or config.tokenizer.vocab_size
    if vocab_size is None:
        return
    try:
        case = Case.of(config, vocab_size)
        loads_of(case.spec, case.times)
    except ScheduleError as error:
        fix = "measure anew, task=benchmark benchmark=planner with this model, these exits and this micro-batch"
        yield Problem("device_profile.path", device_profile.path, str(error), fix)


RULES: list[Callable[..., Problems]] = [
    program_keeps_the_invariants,
    plan_has_something_to_plan,
    devices_are_counted_once,
    the_device_profile_decides_something,
    the_measured_passes_are_the_runs,
]
