"""Which engine trains, and which program it runs: by the schedule's name, the layout and the number of microbatches."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial

from eellm.config.paths import expanded
from eellm.config.rules.schedule import MEGATRONS
from eellm.config.schema import ScheduleConfig
from eellm.engine.chunks import Chunks
from eellm.engine.executor import ProgramEngine, Schedule
from eellm.engine.megatron import MegatronEngine
from eellm.engine.protocol import TrainingEngine
from eellm.layout import ParallelLayout
from eellm.model.objective import ObjectiveOptions
from eellm.model.spec import StageSpec
from eellm.schedule.bubble_filling import bubble_filling, fill
from eellm.schedule.csv_file import read_csv
from eellm.schedule.invariants import checked
from eellm.schedule.program import Program, with_communication
from eellm.schedule.programs import gpipe, interleaved, one_f_one_b
from eellm.schedule.weights import Filled


def training_engine(config: ScheduleConfig, chunks: Chunks, options: ObjectiveOptions) -> TrainingEngine:
    """megatron-core's schedules where they do, unless the executor is asked for."""
    if config.engine == "executor" or config.name not in MEGATRONS:
        return ProgramEngine(chunks, options, schedule_of(config, chunks.groups.layout, chunks.plan))
    return MegatronEngine(chunks, options)


def schedule_of(config: ScheduleConfig, layout: ParallelLayout, plan: list[StageSpec]) -> Callable[[int], Schedule]:
    """From the microbatches of a step its schedule, made once for each number (it grows under batch-size ramp-up). The ratio of
    backward to forward time is settled (`eellm.plan.iteration.with_ratio`).

    The schedule raises ScheduleError where there is none for this number, which a validated config excludes.
    """
    exit_stages = frozenset(stage.index for stage in plan if stage.exits)

    @cache
    def made(num_microbatches: int) -> Schedule:
        if config.name == "bubble_filling":
            assert config.backward_forward_ratio is not None, "settled"
            counts = config.part_one, config.part_two
            filling = fill(layout.pp, num_microbatches, exit_stages, config.backward_forward_ratio, *counts)
            return Schedule(with_communication(checked(bubble_filling(filling), exit_stages)), partial(Filled, filling))
        program = checked(_program(config, layout, num_microbatches), exit_stages)
        return Schedule(program if program.has_communication else with_communication(program))

    return made


def pipeline_schedule(layout: ParallelLayout) -> Callable[[int], Schedule]:
    """1F1B, interleaved where ranks hold several chunks: what megatron-core's own functions run."""
    return cache(lambda num_microbatches: Schedule(with_communication(_pipeline(layout, num_microbatches))))


def _pipeline(layout: ParallelLayout, num_microbatches: int) -> Program:
    if layout.vp > 1:
        return interleaved(layout.pp, num_microbatches, layout.vp)
    return one_f_one_b(layout.pp, num_microbatches)


def _program(config: ScheduleConfig, layout: ParallelLayout, num_microbatches: int) -> Program:
    if config.name == "csv":
        assert config.path is not None, "validated"
        return read_csv(expanded(config.path))
    return gpipe(layout.pp, num_microbatches) if config.name == "gpipe" else _pipeline(layout, num_microbatches)
