"""A training step of a case under a schedule: time, bubble, balance, memory, and what its exits cost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from eellm.config.schema import Config, ScheduleConfig
from eellm.model.spec import tied_stages
from eellm.plan import parameters
from eellm.plan.case import Case
from eellm.plan.times import step_times
from eellm.schedule.bubble_filling import Filling, bubble_filling, fill
from eellm.schedule.costs import Costs
from eellm.schedule.program import Program, ScheduleError
from eellm.schedule.programs import forward_only, gpipe, interleaved, one_f_one_b, zero_bubble_h1
from eellm.schedule.simulate import Timeline, simulate

RUNS = ("one_f_one_b", "interleaved", "gpipe", "bubble_filling", "forward_only")
"""Schedules that the engines run; others can be simulated only."""


@dataclass(frozen=True)
class RankMemory:
    """Bytes of one device of a pipeline rank at its peak."""

    weights: float
    gradients: float
    optimizer: float
    activations: float

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.activations


@dataclass(frozen=True)
class Iteration:
    """`case` is the one that the schedule runs: interleaving cuts the model into more stages. Times are seconds."""

    schedule: str
    case: Case
    costs: Costs
    timeline: Timeline
    step: float
    """What follows the pipeline: gradients of replicas, and the optimizer."""
    bare: float
    """Time of the same step without exits."""
    ranks: tuple[RankMemory, ...]
    usable_bytes: float

    @property
    def time(self) -> float:
        return self.timeline.time + self.step

    @property
    def exits_cost(self) -> float:
        """Share of the time without exits that exits add."""
        return self.time / self.bare - 1

    @property
    def balance(self) -> float:
        """Mean load of a rank over the highest: 1 where all are equally loaded."""
        pp = self.timeline.program.pp
        loads = [sum(stage.load for stage in self.costs.stages[rank::pp]) for rank in range(pp)]
        return sum(loads) / len(loads) / max(loads)

    @property
    def tokens_per_second(self) -> float:
        return self.case.tokens / self.time

    @property
    def peak_bytes(self) -> float:
        return max(rank.total for rank in self.ranks)

    @property
    def fits(self) -> bool:
        return self.peak_bytes <= self.usable_bytes


def iterate(case: Case, schedule: str, program: Program | None = None) -> Iteration:
    """`program` is that of a file. Raises ScheduleError where the schedule does not exist for the case."""
    case = _cut_for(case, schedule)
    costs = case.costs
    program = program or program_of(case, schedule)
    timeline = simulate(program, costs)
    bare = replace(case, spec=replace(case.spec, exits=()), split=[stage.num_layers for stage in case.stages])
    without = simulate(program_of(bare, "one_f_one_b") if _needs_exits(program) else program, costs.without_exits())
    ranks = tuple(_rank_memory(case, rank, peak) for rank, peak in enumerate(timeline.peak_bytes))
    return Iteration(schedule, case, costs, timeline, _step(case), without.time + _step(bare), ranks, case.device.usable_bytes)


def _needs_exits(program: Program) -> bool:
    """Bubbles are filled with losses of exits: without any, the same batch runs as plain 1F1B."""
    return program.name == "bubble_filling"


def program_of(case: Case, schedule: str) -> Program:
    """The schedule for the case's ranks and microbatches."""
    pp, vp, microbatches = case.layout.pp, case.layout.vp, case.num_microbatches
    made: dict[str, Callable[[], Program]] = {
        "gpipe": lambda: gpipe(pp, microbatches),
        "one_f_one_b": lambda: one_f_one_b(pp, microbatches),
        "interleaved": lambda: interleaved(pp, microbatches, vp),
        "forward_only": lambda: forward_only(pp, microbatches, vp),
        "zero_bubble_h1": lambda: zero_bubble_h1(pp, microbatches),
        "bubble_filling": lambda: bubble_filling(filling_of(case)),
    }
    return made[schedule]()


def filling_of(case: Case) -> Filling:
    """By the ratio of backward to forward time that is given, or that the device profile has."""
    ratio, counts = case.schedule.backward_forward_ratio, (case.schedule.part_one, case.schedule.part_two)
    if ratio is None:
        ratio = backward_forward_ratio(case.costs)
    return fill(case.layout.pp, case.num_microbatches, case.exit_stages, ratio, *counts)


def chosen_schedule(config: Config) -> str:
    """The one that a run of the config uses."""
    if config.plan.task == "tune":
        return "forward_only"
    if config.schedule.name != "auto":
        return config.schedule.name
    return "interleaved" if config.parallel.vp > 1 else "one_f_one_b"


def with_ratio(config: Config, vocab_size: int) -> ScheduleConfig:
    """The schedule of a run; where it fills bubbles by a ratio that is left open, with the device profile's. Raises
    ScheduleError where its passes are others."""
    schedule = config.schedule
    if schedule.name != "bubble_filling" or schedule.backward_forward_ratio is not None:
        return schedule
    ratio = backward_forward_ratio(Case.of(config, vocab_size).costs)
    return schedule.model_copy(update={"backward_forward_ratio": ratio})


def backward_forward_ratio(costs: Costs) -> float:
    """Of layers and exits over all stages; the final head is on the last, whose own bubbles nothing fills."""
    exits = [head for stage in costs.stages for head in stage.heads if head.is_exit]
    late = sum(head.forward for head in exits) if costs.deferred else 0.0
    forward = sum(stage.forward for stage in costs.stages) + sum(head.forward for head in exits) - late
    return (sum(stage.backward for stage in costs.stages) + sum(head.backward for head in exits) + late) / forward


def _cut_for(case: Case, schedule: str) -> Case:
    """Interleaving needs chunks, two unless told; the others take one a rank. A split that was given for other stages is left
    to equal ones."""
    if schedule in ("csv", "forward_only"):
        return case
    chunks = max(2, case.layout.vp) if schedule == "interleaved" else 1
    if schedule == "interleaved" and case.layout.pp == 1:
        raise ScheduleError("needs pipeline ranks (parallel.pp > 1)")
    if chunks == case.layout.vp:
        return case
    return replace(case, layout=replace(case.layout, vp=chunks), split="balance" if case.split == "balance" else None)


def _rank_memory(case: Case, rank: int, activations: float) -> RankMemory:
    static = case.static(rank)
    return RankMemory(static.weights, static.gradients, static.optimizer, activations)


def _step(case: Case) -> float:
    """Of the slowest rank."""
    pp, seconds = case.layout.pp, []
    for rank in range(pp):
        hidden = sum(stage.backward for stage in case.costs.stages[rank::pp]) if case.overlap else 0.0
        times = step_times(case.device, case.layout, case.static(rank), hidden, case.distributed)
        seconds.append(times.gradients + times.optimizer)
    return max(seconds) + _tied(case)


def _tied(case: Case) -> float:
    """Gradients of the output matrix's copies, summed over the ranks that hold one."""
    if case.tunes:
        return 0.0
    holders = {case.layout.pp_rank_of(stage) for stage in tied_stages(case.spec, case.stages)}
    size = 4 * parameters.matrix(case.spec, case.layout.tp)
    return case.device.all_reduce(size, len(holders), case.layout.world_size)


@dataclass(frozen=True)
class StageRow:
    """One virtual stage: what it holds and how long a microbatch takes there; bytes and seconds of one device."""

    index: int
    layers: list[int]
    exits: list[str]
    parameters: int
    activations: float
    """Of one microbatch in flight."""
    logits: float
    forward: float
    backward: float


def stage_rows(iteration: Iteration) -> list[StageRow]:
    case, rows = iteration.case, []
    for part, costs in zip(case.stages, iteration.costs.stages, strict=True):
        heads = [exit_.name for exit_ in part.exits] + (["final"] if part.has_final_head else [])
        late = sum(head.forward for head in costs.heads if head.is_exit and case.deferred)
        early = sum(head.forward for head in costs.heads) - late
        rows.append(
            StageRow(
                index=part.index,
                layers=part.layers,
                exits=heads,
                parameters=parameters.stage(case.spec, part, case.layout.tp),
                activations=costs.kept_bytes,
                logits=max((head.logits_bytes for head in costs.heads), default=0.0),
                forward=costs.forward + early,
                backward=costs.backward + late + sum(head.backward for head in costs.heads),
            )
        )
    return rows
