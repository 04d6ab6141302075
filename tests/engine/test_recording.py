"""Parts of recorded passes: where layers and heads sleep for a known time, they are told that time."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from eellm.engine.recording import Stopwatch, TimedHeads
from eellm.model.objective import DeferredExit, EagerExit
from eellm.schedule.measured import Recorded
from eellm.schedule.program import Action, Kind
from tests.engine.sleeping import Sleep

LAYER, EXIT, FINAL = (0.02, 0.05), (0.03, 0.06), (0.04, 0.07)


class SleepingHeads:
    """The exit is attached as in training, by either Function."""

    def __init__(self, deferred: bool):
        self.deferred = deferred

    def at_exit(self, hidden: torch.Tensor, *_: object) -> torch.Tensor:
        def loss(states: torch.Tensor) -> torch.Tensor:
            return Sleep.apply(states, *EXIT).sum()

        if self.deferred:
            return DeferredExit.apply(hidden, loss, lambda: 1.0)
        return EagerExit.apply(hidden, loss(hidden), lambda: 1.0)

    def at_final(self, hidden: torch.Tensor, *_: object) -> torch.Tensor:
        return Sleep.apply(hidden, *FINAL).sum()


@pytest.mark.parametrize("deferred", [True, False])
def test_heads_are_told_from_layers(deferred: bool) -> None:
    events: list[Recorded] = []
    watch = Stopwatch(torch.device("cpu"), events.append)
    heads, readout = TimedHeads(SleepingHeads(deferred), watch), SimpleNamespace(name="exit_02")
    start = torch.zeros(3, requires_grad=True)
    with watch.timed(Action(Kind.FORWARD, 0)):
        hidden = heads.at_exit(Sleep.apply(start, *LAYER), readout, None)
        loss = heads.at_final(Sleep.apply(hidden, *LAYER), SimpleNamespace(name="final"), None)
    with watch.timed(Action(Kind.BACKWARD, 0)):
        loss.backward()
    late = EXIT[0] if deferred else 0.0
    there = [("layers", LAYER[0]), ("exit_02", EXIT[0] - late), ("layers", LAYER[0]), ("final", FINAL[0]), ("layers", 0.0)]
    back = [("final", FINAL[1]), ("layers", LAYER[1]), ("exit_02", EXIT[1] + late), ("layers", LAYER[1])]
    for event, expected in zip(events, (there, back), strict=True):
        parts = [part for part in event.parts if part[0] != "layers" or part[1] > 0.005 or expected[-1] == ("layers", 0.0)]
        assert [name for name, _ in parts] == [name for name, _ in expected]
        assert all(length >= slept for (_, length), (_, slept) in zip(parts, expected, strict=True))
        assert sum(length for _, length in event.parts) == pytest.approx(event.end - event.begin)
