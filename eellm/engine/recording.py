"""What happens within the actions of a step, and when: heads and the embedding are told from the layers.

In the forward pass a head's stretch lies around its visitor. In the backward pass hooks on the hidden states mark it: autograd
runs all that is behind a head, a deferred exit's own forward and backward too, between the gradient of what the head hands on
and that of what it was given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from eellm.device_clock import seconds_on
from eellm.metrics.names import FINAL
from eellm.model.context import Context
from eellm.model.stage import HeadVisitor, Readout, Stage
from eellm.schedule.costs import EMBEDDING, LAYERS
from eellm.schedule.measured import Recorded
from eellm.schedule.program import Action

Recorder = Callable[[Recorded], None]
"""Told of every action when it is done, messages too; times are those of `time.perf_counter`."""


class Stopwatch:
    """Times one action after the other, and stretches within the one that is under way."""

    def __init__(self, device: torch.device, recorder: Recorder):
        self._device, self._recorder = device, recorder
        self._begin = 0.0
        self._open: dict[str, float] = {}
        self._stretches: list[tuple[str, float, float]] = []

    @contextmanager
    def timed(self, action: Action) -> Iterator[None]:
        self._begin = self._now()
        self._open.clear()
        self._stretches.clear()
        yield
        end = self._now()
        for name in [*self._open]:
            self.end(name, end)
        self._recorder(Recorded(action, self._begin, end, self._parts(end)))

    def begin(self, name: str) -> None:
        self._open[name] = self._now()

    def end(self, name: str, now: float | None = None) -> None:
        """A stretch that was not begun began with the action."""
        self._stretches.append((name, self._open.pop(name, self._begin), self._now() if now is None else now))

    def _now(self) -> float:
        return seconds_on(self._device)

    def _parts(self, end: float) -> tuple[tuple[str, float], ...]:
        """All of the action, in order; what lies between the stretches are layers."""
        parts, reached = [], self._begin
        for name, begin, until in self._stretches:
            parts += [(LAYERS, begin - reached), (name, until - begin)]
            reached = until
        return tuple((name, length) for name, length in [*parts, (LAYERS, end - reached)] if length > 0)


class TimedHeads(HeadVisitor):
    """A visitor whose heads are stretches of a stopwatch, in the forward pass and in the backward pass."""

    def __init__(self, visitor: HeadVisitor, watch: Stopwatch):
        self._visitor, self._watch = visitor, watch

    def at_exit(self, hidden: torch.Tensor, readout: Readout, context: Context) -> torch.Tensor:
        name = readout.name
        self._watch.begin(name)
        passing = self._visitor.at_exit(hidden, readout, context)
        self._watch.end(name)
        passing.register_hook(lambda _: self._watch.begin(name))
        hidden.register_hook(lambda _: self._watch.end(name))
        return passing

    def at_final(self, hidden: torch.Tensor, readout: Readout, context: Context) -> torch.Tensor:
        self._watch.begin(FINAL)
        loss = self._visitor.at_final(hidden, readout, context)
        self._watch.end(FINAL)
        hidden.register_hook(lambda _: self._watch.end(FINAL))
        return loss


@contextmanager
def timed_embedding(stage: Stage, watch: Stopwatch) -> Iterator[None]:
    """Makes the embedding, where the stage has it, a stretch of the forward pass inside and of its backward pass."""

    def embedded(*called: torch.Tensor) -> None:
        watch.end(EMBEDDING)
        if called[-1].requires_grad:
            called[-1].register_hook(lambda _: watch.begin(EMBEDDING))

    if stage.embedding is None:
        yield
        return
    handle = stage.embedding.register_forward_hook(embedded)
    try:
        yield
    finally:
        handle.remove()
