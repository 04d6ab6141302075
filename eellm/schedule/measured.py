"""Timelines of real runs: what an executor's recorder has seen, in the form of simulated ones, and what it says of costs."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from eellm.schedule.costs import LAYERS, Costs, StageCosts
from eellm.schedule.program import COMMUNICATION, FORWARDS, Action, Program
from eellm.schedule.simulate import Box, Timeline


@dataclass(frozen=True)
class Recorded:
    """An action and when it began and ended, in seconds of a clock that all ranks share."""

    action: Action
    begin: float
    end: float


def measured_timeline(program: Program, ranks: Sequence[Sequence[Recorded]]) -> Timeline:
    """Computation only, from the first action of any rank on; what it waits for shows as a gap."""
    computed = [[event for event in events if event.action.kind not in COMMUNICATION] for events in ranks]
    zero = min(event.begin for events in computed for event in events)
    boxes = [[_box(program, rank, event, zero) for event in events] for rank, events in enumerate(computed)]
    return Timeline(program.computation, tuple(map(tuple, boxes)))


def _box(program: Program, rank: int, event: Recorded, zero: float) -> Box:
    length = event.end - event.begin
    start, stage = event.begin - zero, program.stage(rank, event.action.chunk)
    return Box(rank, stage, event.action, start, start + length, 0.0, 0.0, ((LAYERS, length),))


def measured_costs(timeline: Timeline) -> Costs:
    """Medians of each stage's forward and backward passes, heads included; messages cost nothing."""
    lengths: dict[tuple[int, bool], list[float]] = {}
    for boxes in timeline.ranks:
        for box in boxes:
            lengths.setdefault((box.stage, box.action.kind in FORWARDS), []).append(box.length)
    medians = {key: statistics.median(values) for key, values in lengths.items()}
    stages = range(timeline.program.num_stages)
    return Costs([StageCosts(medians.get((stage, True), 0.0), medians.get((stage, False), 0.0)) for stage in stages])
