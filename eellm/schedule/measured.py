"""Timelines of real runs: what an executor's recorder has seen, in the form of simulated ones, and what it says of costs."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from eellm.metrics.names import FINAL
from eellm.schedule.costs import EMBEDDING, LAYERS, WEIGHTS, Costs, HeadCosts, StageCosts
from eellm.schedule.program import COMMUNICATION, FORWARDS, Action, Program
from eellm.schedule.simulate import Box, Timeline

NOTHING = 0.01
"""Share of a pass that is no box of its own: a deferred exit goes by in the forward pass, and a pass ends after its layers."""


@dataclass(frozen=True)
class Recorded:
    """An action and when it began and ended, in seconds of a clock that all ranks share. `parts`: what it did in this order,
    each with its seconds: layers, heads by their names, the embedding."""

    action: Action
    begin: float
    end: float
    parts: tuple[tuple[str, float], ...] = ()


def measured_timeline(program: Program, ranks: Sequence[Sequence[Recorded]]) -> Timeline:
    """Computation only, from the first action of any rank on; what it waits for shows as a gap."""
    computed = [[event for event in events if event.action.kind not in COMMUNICATION] for events in ranks]
    zero = min(event.begin for events in computed for event in events)
    boxes = [[_box(program, rank, event, zero) for event in events] for rank, events in enumerate(computed)]
    return Timeline(program.computation, tuple(map(tuple, boxes)))


def _box(program: Program, rank: int, event: Recorded, zero: float) -> Box:
    length = event.end - event.begin
    start, stage = event.begin - zero, program.stage(rank, event.action.chunk)
    return Box(rank, stage, event.action, start, start + length, 0.0, 0.0, _parts(event))


def _parts(event: Recorded) -> tuple[tuple[str, float], ...]:
    """Those of the event, the embedding counted among the layers; what takes next to nothing goes with what is beside it."""
    parts: list[tuple[str, float]] = []
    carried, whole = 0.0, event.end - event.begin
    for name, length in event.parts or ((LAYERS, whole),):
        name = name if _is_head(name) else LAYERS
        if length <= NOTHING * whole and not parts:
            carried += length
        elif parts and (length <= NOTHING * whole or parts[-1][0] == name):
            parts[-1] = parts[-1][0], parts[-1][1] + length
        else:
            parts.append((name, length + carried))
            carried = 0.0
    return tuple(parts)


def _is_head(part: str) -> bool:
    return part not in (LAYERS, EMBEDDING, WEIGHTS)


def measured_costs(timeline: Timeline) -> Costs:
    """Medians of each stage's passes, of layers and heads apart; messages cost nothing.

    Heads count in the pass in which they were computed, so that nothing is left to be deferred.
    """
    lengths: dict[tuple[int, bool, str], list[float]] = {}
    for boxes in timeline.ranks:
        for box in boxes:
            for name in {part for part, _ in box.parts}:
                total = sum(length for part, length in box.parts if part == name)
                lengths.setdefault((box.stage, box.action.kind in FORWARDS, name), []).append(total)
    medians = {key: statistics.median(values) for key, values in lengths.items()}
    return Costs([_stage_costs(medians, stage) for stage in range(timeline.program.num_stages)], deferred=False)


def _stage_costs(medians: dict[tuple[int, bool, str], float], stage: int) -> StageCosts:
    def both(part: str) -> tuple[float, float]:
        return medians.get((stage, True, part), 0.0), medians.get((stage, False, part), 0.0)

    names = dict.fromkeys(part for number, _, part in medians if number == stage and _is_head(part))
    heads = tuple(HeadCosts(name, *both(name), is_exit=name != FINAL) for name in sorted(names))
    return StageCosts(*both(LAYERS), heads=heads)
