"""A recorded run in the form of a simulated one: a simulation that is taken for a record comes back."""

from __future__ import annotations

import pytest

from eellm.schedule.bubble_filling import bubble_filling, fill
from eellm.schedule.costs import Costs, StageCosts
from eellm.schedule.measured import Recorded, measured_costs, measured_timeline
from eellm.schedule.program import Action, Kind, Program, with_communication
from eellm.schedule.programs import interleaved, one_f_one_b
from eellm.schedule.simulate import Timeline, simulate

PROGRAMS = {
    "1f1b": one_f_one_b(4, 8),
    "interleaved": interleaved(2, 4, 2),
    "filled": bubble_filling(fill(4, 10, {0, 1, 2})),
}


def recorded(timeline: Timeline, clock: float) -> list[list[Recorded]]:
    """As an executor would have seen it by a clock that stands at `clock`, messages among its actions."""
    message = Recorded(Action(Kind.SEND_FORWARD, 0), clock - 5.0, clock - 4.0)
    return [[message, *(Recorded(box.action, clock + box.start, clock + box.end) for box in boxes)] for boxes in timeline.ranks]


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_simulation_comes_back(name: str) -> None:
    program: Program = PROGRAMS[name]
    stages = [StageCosts(1.0 + 0.1 * stage, 2.0 + 0.3 * stage) for stage in range(program.num_stages)]
    simulated = simulate(program, Costs(stages))
    measured = measured_timeline(with_communication(program), recorded(simulated, clock=1000.0))
    assert measured.time == pytest.approx(simulated.time)
    assert measured.bubble == pytest.approx(simulated.bubble)
    for boxes, wanted in zip(measured.ranks, simulated.ranks, strict=True):
        assert [(box.stage, box.action) for box in boxes] == [(box.stage, box.action) for box in wanted]
        assert [box.start for box in boxes] == pytest.approx([box.start for box in wanted])
    costs = measured_costs(measured)
    assert [stage.forward for stage in costs.stages] == pytest.approx([stage.forward for stage in stages])
    assert [stage.backward for stage in costs.stages] == pytest.approx([stage.backward for stage in stages])
    assert simulate(measured.program, costs).time == pytest.approx(simulated.time)
