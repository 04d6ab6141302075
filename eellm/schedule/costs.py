"""What a stage costs: the input of the simulator. Times are in any unit, memory in bytes, both of one microbatch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

LAYERS = "layers"
EMBEDDING = "embedding"
WEIGHTS = "weight gradients"


@dataclass(frozen=True)
class HeadCosts:
    """An exit or the final head. `logits_bytes` exist in its forward pass; `kept_bytes` from its forward to its backward pass,
    which for a deferred exit are one."""

    name: str
    forward: float
    backward: float
    logits_bytes: float = 0.0
    kept_bytes: float = 0.0
    is_exit: bool = True


@dataclass(frozen=True)
class StageCosts:
    """`forward` and `backward` are the layers' (and the embedding's); `weight` is the share of `backward` that makes gradients
    of weights. `kept_bytes` are the layers' activations from forward to backward, `working_bytes` exist in the backward pass,
    `output_bytes` are what the next stage is sent."""

    forward: float
    backward: float
    weight: float = 0.0
    heads: tuple[HeadCosts, ...] = ()
    kept_bytes: float = 0.0
    working_bytes: float = 0.0
    output_bytes: float = 0.0

    @property
    def load(self) -> float:
        """Time of a microbatch, forward and backward, heads included."""
        return self.forward + self.backward + sum(head.forward + head.backward for head in self.heads)


@dataclass(frozen=True)
class Costs:
    """All stages in order. `deferred`: exits run inside the backward pass. A message takes `latency` plus its bytes over
    `bandwidth`, and messages from one rank to another follow each other. `tunes`: nothing but exits learns, forward and backward
    in a pass that goes forward only, once its hidden states have been sent on."""

    stages: Sequence[StageCosts]
    deferred: bool = True
    latency: float = 0.0
    bandwidth: float = math.inf
    tunes: bool = False

    def without_exits(self) -> Costs:
        bare = [replace(stage, heads=tuple(head for head in stage.heads if not head.is_exit)) for stage in self.stages]
        return replace(self, stages=bare)


@dataclass(frozen=True)
class Pass:
    """One kind of action on one stage: its parts, each with a length, and its memory. `held_bytes` are added when it starts,
    `freed_bytes` go when it ends, `passing_bytes` exist only in between. Of its length, `after_sending` comes when what it makes
    is under way."""

    parts: tuple[tuple[str, float], ...]
    held_bytes: float = 0.0
    freed_bytes: float = 0.0
    passing_bytes: float = 0.0
    after_sending: float = 0.0

    @property
    def length(self) -> float:
        return sum(length for _, length in self.parts)


def forward_pass(stage: StageCosts, deferred: bool) -> Pass:
    heads = _eager(stage, deferred)
    parts = [(LAYERS, stage.forward), *((head.name, head.forward) for head in heads)]
    return Pass(tuple(parts), held_bytes=_held(stage, deferred), passing_bytes=_logits(heads))


def forward_only_pass(stage: StageCosts, with_heads: bool) -> Pass:
    heads = stage.heads if with_heads else ()
    return Pass(((LAYERS, stage.forward), *((head.name, head.forward) for head in heads)), passing_bytes=_logits(heads))


def tuning_pass(stage: StageCosts) -> Pass:
    heads = [(head.name, head.forward + head.backward) for head in stage.heads]
    passing = max((head.logits_bytes + head.kept_bytes for head in stage.heads), default=0.0)
    return Pass(((LAYERS, stage.forward), *heads), passing_bytes=passing, after_sending=sum(length for _, length in heads))


def backward_pass(stage: StageCosts, deferred: bool, split: bool) -> Pass:
    """Heads first, the last one of the stage at the front. `split`: gradients of weights come later, and so does the end of
    the activations."""
    parts = []
    for head in reversed(stage.heads):
        parts.append((head.name, head.backward + (head.forward if deferred and head.is_exit else 0.0)))
    parts.append((LAYERS, stage.backward - (stage.weight if split else 0.0)))
    late = [head.logits_bytes + head.kept_bytes for head in stage.heads if deferred and head.is_exit]
    freed = 0.0 if split else _held(stage, deferred)
    return Pass(tuple(parts), freed_bytes=freed, passing_bytes=max([stage.working_bytes, *late]))


def weight_pass(stage: StageCosts, deferred: bool) -> Pass:
    return Pass(((WEIGHTS, stage.weight),), freed_bytes=_held(stage, deferred))


def _eager(stage: StageCosts, deferred: bool) -> tuple[HeadCosts, ...]:
    return tuple(head for head in stage.heads if not (deferred and head.is_exit))


def _held(stage: StageCosts, deferred: bool) -> float:
    return stage.kept_bytes + sum(head.kept_bytes for head in _eager(stage, deferred))


def _logits(heads: Sequence[HeadCosts]) -> float:
    return max((head.logits_bytes for head in heads), default=0.0)
