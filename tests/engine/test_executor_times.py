"""The simulator against the executor, on real ranks whose stages sleep for the modelled times: cores are too few to compute."""

from __future__ import annotations

import pytest

from eellm.schedule.bubble_filling import bubble_filling, fill
from eellm.schedule.costs import Costs, HeadCosts, StageCosts
from eellm.schedule.measured import measured_timeline
from eellm.schedule.program import with_communication
from eellm.schedule.programs import interleaved, one_f_one_b
from eellm.schedule.simulate import simulate
from tests import workers
from tests.engine.sleeping import slept

FORWARD, BACKWARD, HEAD = 0.12, 0.24, 0.08
"""Seconds, large against what a loaded machine needs to wake a process: beside the rest of the suite, up to 0.1 s in a step."""
REPEATS = 2


def costs_of(stages: int, exits: tuple[int, ...]) -> Costs:
    """A final head, and deferred exits that are half as long as a stage."""
    heads = [[HeadCosts(f"exit_{stage}", HEAD, HEAD)] if stage in exits else [] for stage in range(stages)]
    heads[-1].append(HeadCosts("final", HEAD, HEAD, is_exit=False))
    return Costs([StageCosts(FORWARD, BACKWARD, heads=tuple(own)) for own in heads])


FILLINGS = {4: fill(4, 8, (0, 1), BACKWARD / FORWARD), 3: fill(3, 6, (0, 1), BACKWARD / FORWARD)}

CASES = {
    "pp4, 1F1B": (one_f_one_b(4, 8), costs_of(4, (1, 2))),
    "pp4, interleaved": (interleaved(4, 4, 2), costs_of(8, (1, 4))),
    "pp4, bubble filling": (bubble_filling(FILLINGS[4]), costs_of(4, (0, 1))),
    "pp3, 1F1B": (one_f_one_b(3, 6), costs_of(3, (1,))),
    "pp3, bubble filling": (bubble_filling(FILLINGS[3]), costs_of(3, (0, 1))),
}


@pytest.mark.dist
@pytest.mark.parametrize("name", CASES)
def test_a_step_takes_what_the_simulator_says(name: str) -> None:
    """The shortest of some steps: what disturbs one can only make it longer."""
    program, costs = CASES[name]
    filling = FILLINGS[program.pp] if program.name == "bubble_filling" else None
    ranks = workers.run(program.pp, slept, with_communication(program), filling, costs, REPEATS)
    steps = [measured_timeline(program, [own[step] for own in ranks]) for step in range(REPEATS)]
    expected = simulate(program, costs)
    shortest = min(steps, key=lambda timeline: timeline.time)
    print(f"{name}: simulated {expected.time:.3f} s, slept {', '.join(f'{timeline.time:.3f}' for timeline in steps)}")
    assert expected.time <= shortest.time <= 1.05 * expected.time
    assert shortest.bubble == pytest.approx(expected.bubble, abs=0.05)
