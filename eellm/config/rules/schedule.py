"""Rules on the pipeline schedule: what the layout, the batch and the engine allow."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

from eellm.config.request import Request, trains_all_layers
from eellm.config.schema import Config, DataConfig, DebugConfig, ParallelConfig, ScheduleConfig, TaskConfig
from eellm.errors import Problem
from eellm.plan.iteration import with_ratio
from eellm.schedule.bubble_filling import most_fillers
from eellm.schedule.program import ScheduleError

Problems = Iterator[Problem]

MEGATRONS = ("auto", "one_f_one_b", "interleaved")
"""What megatron-core's own functions run."""


def schedule_suits_the_stages(parallel: ParallelConfig, schedule: ScheduleConfig) -> Problems:
    pp, vp = parallel.pp, parallel.vp
    if vp > 1 and pp == 1:
        yield Problem("parallel.vp", vp, "model chunks need pipeline ranks (parallel.pp=1)", "parallel.pp=2, or parallel.vp=1")
    if schedule.name == "interleaved" and vp == 1:
        yield Problem("schedule.name", schedule.name, "nothing to interleave (parallel.vp=1)", "parallel.vp=2, or schedule=auto")
    if schedule.name in ("one_f_one_b", "gpipe", "bubble_filling") and vp > 1:
        reason = f"runs one model chunk a rank, parallel.vp={vp}"
        yield Problem("schedule.name", schedule.name, reason, "schedule=interleaved or auto, or parallel.vp=1")


def engine_runs_the_schedule(schedule: ScheduleConfig) -> Problems:
    if schedule.engine == "megatron" and schedule.name not in MEGATRONS:
        reason = f"megatron-core has no schedule {schedule.name}"
        yield Problem("schedule.engine", schedule.engine, reason, "schedule.engine=auto")


def bubbles_hold_a_microbatch(groups: dict[str, Any], schedule: ScheduleConfig, parallel: ParallelConfig) -> Problems:
    ratio = _ratio_of_filling(groups, schedule)
    if ratio is not None and most_fillers(parallel.pp, ratio) == 0:
        reason = f"no microbatch fits into the bubbles of {parallel.pp} stages with schedule.backward_forward_ratio={ratio:.3g}"
        yield Problem("schedule.name", schedule.name, reason, "more stages (parallel.pp=4), or schedule=auto")


def fillers_leave_whole_microbatches(
    groups: dict[str, Any], schedule: ScheduleConfig, parallel: ParallelConfig, data: DataConfig, request: Request
) -> Problems:
    """Bubble filling fills bubbles with fewer microbatches than there are."""
    ratio, dp = _ratio_of_filling(groups, schedule), request.data_parallel(parallel)
    if ratio is None or dp is None:
        return
    unit, most = data.micro_batch_size * dp, most_fillers(parallel.pp, ratio)
    fillers = sum(most if count is None else min(count, most) for count in (schedule.part_one, schedule.part_two))
    sizes = {"data.global_batch_size": data.global_batch_size}
    if data.ramp_up is not None:
        sizes["data.ramp_up.start"] = data.ramp_up.start
    for path, size in sizes.items():
        if fillers and size // unit <= fillers:
            reason = f"makes {size // unit} microbatches, of which {fillers} would fill bubbles and none would be whole"
            fix = f"{path}={(fillers + 1) * unit} or more, or smaller schedule.part_one and part_two"
            yield Problem(path, size, reason, fix)


def _ratio_of_filling(groups: dict[str, Any], schedule: ScheduleConfig) -> float | None:
    """Backward over forward time where bubbles are filled; None elsewhere, and where other keys must be right first."""
    task, benchmark = groups.get("task"), groups.get("benchmark")
    if schedule.name != "bubble_filling" or task is None or benchmark is None or not trains_all_layers(task, benchmark):
        return None
    return schedule.backward_forward_ratio or _profiles_ratio(groups)


def _profiles_ratio(groups: dict[str, Any]) -> float | None:
    """Where all of the config is right, and the profile has its passes; both are said elsewhere."""
    config = Config(**groups) if set(groups) == set(Config.model_fields) else None
    vocab_size = None if config is None else config.model.vocab_size or config.tokenizer.vocab_size
    if config is None or vocab_size is None:
        return None
    with suppress(ScheduleError):
        return with_ratio(config, vocab_size).backward_forward_ratio
    return None


def timeline_is_the_executors(task: TaskConfig, schedule: ScheduleConfig, debug: DebugConfig) -> Problems:
    if debug.timeline and (task.name != "train" or (schedule.engine != "executor" and schedule.name in MEGATRONS)):
        reason = "megatron-core's schedules do not say when they do what; the executor, which task=train can use, does"
        yield Problem("debug.timeline", True, reason, "task=train schedule.engine=executor")


RULES: list[Callable[..., Problems]] = [
    schedule_suits_the_stages,
    engine_runs_the_schedule,
    bubbles_hold_a_microbatch,
    fillers_leave_whole_microbatches,
    timeline_is_the_executors,
]
