"""When exits run in a step that tunes them: one exit and microbatch at a time, forward and backward, beside the schedule."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Protocol

import torch

from eellm.data.batch import Microbatch
from eellm.mcore.cpu import cpu_stand_ins
from eellm.model.context import Context
from eellm.model.objective import Objective
from eellm.model.stage import HeadVisitor, Readout


class TuningObjective(Objective):
    """Losses of one microbatch; the gradients of an exit's are in its buffers when the hidden states go on."""

    def at_exit(self, hidden: torch.Tensor, readout: Readout, context: Context) -> torch.Tensor:
        with torch.enable_grad():
            loss = self._loss(hidden, readout, context)
            loss.backward(torch.full_like(loss, self.scale()))
        return hidden


class TunedExits(Protocol):
    """The exits of a rank in one step."""

    def visitor(self, index: int, microbatch: Microbatch) -> HeadVisitor:
        """Of a microbatch's pass through a chunk, called when it is its turn."""
        ...

    def finish(self) -> None:
        """Called when all passes are done: whatever still waits runs now."""
        ...


class PassedExits:
    """Exits run as soon as their hidden states have passed. Where the stage `sends` these on they wait until it has, and it
    turns to its next microbatch: otherwise the stages behind it would wait for them."""

    def __init__(self, objective_of: Callable[[Microbatch], TuningObjective], sends: bool):
        self._objective_of, self._sends = objective_of, sends
        self._waiting: list[Callable[[], object]] = []

    def visitor(self, index: int, microbatch: Microbatch) -> HeadVisitor:
        self.finish()
        objective = self._objective_of(microbatch)
        return _AfterSending(objective, self._waiting) if self._sends else objective

    def finish(self) -> None:
        with cpu_stand_ins(), torch.no_grad():
            while self._waiting:
                self._waiting.pop(0)()


class _AfterSending:
    def __init__(self, objective: HeadVisitor, waiting: list[Callable[[], object]]):
        self._objective, self._waiting = objective, waiting

    def at_exit(self, hidden: torch.Tensor, readout: Readout, context: Context) -> torch.Tensor:
        # as a tensor of its own: the schedule empties what it has sent
        self._waiting.append(partial(self._objective.at_exit, hidden.detach(), readout, context))
        return hidden

    def at_final(self, hidden: torch.Tensor, readout: Readout, context: Context) -> torch.Tensor:
        return self._objective.at_final(hidden, readout, context)
