"""When a program's actions happen, by what they cost: time, bubbles, critical path and memory.

A rank computes its actions in order, each as soon as its input has arrived; sends take no time of the sender and travel while
it computes on, in order, one message at a time between two ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

from eellm.schedule.costs import Costs, Pass, backward_pass, forward_only_pass, forward_pass, tuning_pass, weight_pass
from eellm.schedule.program import FORWARDS, Action, Kind, Program, ScheduleError, work_number

TOLERANCE = 1e-9
"""Times closer than this share of the whole are the same."""


class Box(NamedTuple):
    """An action in time. `memory`: bytes of the rank's activations while it runs, its own passing ones included; `kept_bytes`:
    those that are left when it ends."""

    rank: int
    stage: int
    action: Action
    start: float
    end: float
    memory: float
    kept_bytes: float
    parts: tuple[tuple[str, float], ...]

    @property
    def length(self) -> float:
        return self.end - self.start


@dataclass(frozen=True)
class Timeline:
    """`ranks[r]` are the boxes of rank r in order."""

    program: Program
    ranks: tuple[tuple[Box, ...], ...]

    @cached_property
    def time(self) -> float:
        """From the first action to the end of the last."""
        return max((boxes[-1].end for boxes in self.ranks if boxes), default=0.0)

    @cached_property
    def busy(self) -> list[float]:
        """By rank: the time in which it computes."""
        return [sum(box.end - box.start for box in boxes) for boxes in self.ranks]

    @property
    def bubble(self) -> float:
        """Share of all ranks' time in which they wait."""
        return 1 - sum(self.busy) / (len(self.ranks) * self.time) if self.time else 0.0

    @property
    def peak_bytes(self) -> list[float]:
        """By rank: the most bytes of activations at a time."""
        return [max((box.memory for box in boxes), default=0.0) for boxes in self.ranks]

    def critical_path(self) -> list[Box]:
        """Boxes of which each could not have started before the one before it, from the start to the end of the whole."""
        before = {box[:3]: previous for boxes in self.ranks for previous, box in pairwise(boxes)}
        made = {_made(box): box for boxes in self.ranks for box in boxes}
        path = [max((boxes[-1] for boxes in self.ranks if boxes), key=lambda box: box.end)]
        while True:
            box = path[-1]
            previous = before.get(box[:3])
            waits = previous is None or previous.end < box.start - TOLERANCE * self.time
            needed = self.program.needed(box.stage, box.action)
            source = (made[needed] if needed is not None else None) if waits else previous
            if source is None:
                return path[::-1]
            path.append(source)


def _made(box: Box) -> tuple[int, int, int]:
    """What a box makes, as `Program.needed` names it; of gradients of weights nobody waits for anything."""
    kind = box.action.kind
    return box.stage, box.action.microbatch, 1 if kind in FORWARDS else 0 if kind is Kind.WEIGHT else -1


def simulate(program: Program, costs: Costs) -> Timeline:
    """Raises ScheduleError where the program comes to a standstill."""
    if len(costs.stages) != program.num_stages:
        raise ScheduleError(f"{len(costs.stages)} stages have costs, the program has {program.num_stages}")
    return _Simulation(program.computation, costs).run()


class _Simulation:
    def __init__(self, program: Program, costs: Costs):
        self.program, self.costs = program, costs
        self.work = _work(program, costs)
        self.travel = [_travel(program, costs, stage, step) for stage in range(program.num_stages) for step in (-1, 1)]
        self.arrivals: list[float] = [-1.0] * (2 * program.num_stages * program.num_microbatches)
        self.waiting: dict[int, int] = {}
        self.free, self.held = [0.0] * program.pp, [0.0] * program.pp
        self.channel_free = [0.0] * program.pp**2
        self.boxes: list[list[Box]] = [[] for _ in range(program.pp)]

    def run(self) -> Timeline:
        ready = list(range(self.program.pp))
        while ready:
            self._advance(ready.pop(), ready)
        stuck = [
            f"rank {rank} at {steps[len(boxes)].action}"
            for rank, (steps, boxes) in enumerate(zip(self.program.steps, self.boxes, strict=True))
            if len(boxes) < len(steps)
        ]
        if stuck:
            raise ScheduleError(f"the program comes to a standstill: {', '.join(stuck)}")
        return Timeline(self.program, tuple(map(tuple, self.boxes)))

    def _advance(self, rank: int, ready: list[int]) -> None:
        """Run a rank until it lacks an input."""
        steps, boxes, arrivals, channel_free = self.program.steps[rank], self.boxes[rank], self.arrivals, self.channel_free
        end, held = self.free[rank], self.held[rank]
        for index in range(len(boxes), len(steps)):
            action, stage, work, waits_for, makes = steps[index]
            start = end
            if waits_for >= 0:
                arrival = arrivals[waits_for]
                if arrival < 0:
                    self.waiting[waits_for] = rank
                    break
                start = max(start, arrival)
            done, length = self.work[work]
            end = start + length
            held += done.held_bytes
            memory = held + done.passing_bytes
            held -= done.freed_bytes
            boxes.append(Box(rank, stage, action, start, end, memory, held, done.parts))
            if makes >= 0:
                channel, transfer, latency = self.travel[2 * stage + makes % 2]
                sent = channel_free[channel] = max(end - done.after_sending, channel_free[channel]) + transfer
                arrivals[makes] = sent + latency
                if makes in self.waiting:
                    ready.append(self.waiting.pop(makes))
        self.free[rank], self.held[rank] = end, held


def _travel(program: Program, costs: Costs, stage: int, step: int) -> tuple[int, float, float]:
    """(channel, how long it is taken, latency) of what a stage makes for the one before (-1) or after it (1)."""
    rank, other = stage % program.pp, (stage + step) % program.pp
    if rank == other or not 0 <= stage + step < program.num_stages:
        return rank * (program.pp + 1), 0.0, 0.0
    return rank * program.pp + other, costs.stages[min(stage, stage + step)].output_bytes / costs.bandwidth, costs.latency


def _work(program: Program, costs: Costs) -> list[tuple[Pass, float]]:
    """What every kind of work is, and its length; numbered as by `work_number`."""
    trains = any(Kind.BACKWARD in kinds for kinds in program.passes.values())
    found: dict[int, Pass] = {}
    for index, stage in enumerate(costs.stages):
        for split in (False, True):
            for kind, work in (
                (Kind.FORWARD, forward_pass(stage, costs.deferred)),
                (Kind.FORWARD_ONLY, tuning_pass(stage) if costs.tunes else forward_only_pass(stage, with_heads=not trains)),
                (Kind.BACKWARD, backward_pass(stage, costs.deferred, split)),
                (Kind.WEIGHT, weight_pass(stage, costs.deferred)),
            ):
                found[work_number(index, kind, split)] = work
    return [(work, work.length) for _, work in sorted(found.items())]
