"""Rules on programs from files and on what task=plan is asked."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from eellm.config.planning import PlanConfig
from eellm.config.request import Request
from eellm.config.schema import DataConfig, ParallelConfig, ScheduleConfig, TaskConfig
from eellm.errors import Problem
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


RULES: list[Callable[..., Problems]] = [
    program_keeps_the_invariants,
    plan_has_something_to_plan,
    devices_are_counted_once,
]
