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


def test_heads_are_boxes_and_what_takes_no_time_is_none() -> None:
    """The embedding counts as layers; a deferred exit's forward pass and the end of a pass disappear, the times do not."""
    program = one_f_one_b(1, 1)
    forward = (("embedding", 1.0), ("layers", 4.0), ("exit_02", 0.01), ("layers", 3.0), ("final", 2.0), ("layers", 0.02))
    backward = (("layers", 0.03), ("final", 1.0), ("layers", 6.0), ("exit_02", 5.0), ("layers", 7.0), ("embedding", 1.0))
    passes = ((Kind.FORWARD, forward, 0.0), (Kind.BACKWARD, backward, 20.0))
    events = [Recorded(Action(kind, 0), begin, begin + sum(x for _, x in parts), parts) for kind, parts, begin in passes]
    timeline = measured_timeline(program, [events])
    there, back = (dict(enumerate(box.parts)) for box in timeline.ranks[0])
    assert there == {0: ("layers", pytest.approx(8.01)), 1: ("final", pytest.approx(2.02))}
    assert back == {
        0: ("final", pytest.approx(1.03)), 1: ("layers", 6.0), 2: ("exit_02", 5.0), 3: ("layers", pytest.approx(8.0))
    }  # fmt: skip
    (stage,) = measured_costs(timeline).stages
    assert (stage.forward, stage.backward) == (pytest.approx(8.01), pytest.approx(14.0))
    assert {head.name: (head.is_exit, head.backward) for head in stage.heads} == {
        "exit_02": (True, 5.0), "final": (False, pytest.approx(1.03))
    }  # fmt: skip
