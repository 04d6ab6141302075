"""What the losses and gradients of each microbatch count for, so that a program's gradient is the mean that is wanted.

A program that runs every microbatch whole needs no weights. Under bubble filling a loss meets some stages for more
microbatches than others; EE-LLM weighs all alike and is biased. Here, for every loss and every stage before it, the weights
of all microbatches that contribute sum to one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from eellm.schedule.bubble_filling import Filling


class Weights(Protocol):
    """Factors on losses that are sums over tokens, in a step whose gradient is divided by the tokens of all its microbatches."""

    def exit(self, stage: int, microbatch: int) -> float:
        """On the loss of a stage's exits."""
        ...

    def final(self) -> float:
        """On the final head's loss."""
        ...

    def received(self, stage: int, microbatch: int) -> float:
        """On the gradient that a stage receives from the one after it."""
        ...

    def exit_tokens(self, stage: int) -> float:
        """Tokens of the microbatches for which a stage's exits compute their losses."""
        ...


@dataclass(frozen=True)
class Plain:
    """Every microbatch is run whole. `tokens` are those of all microbatches, over all data-parallel ranks."""

    tokens: float

    def exit(self, stage: int, microbatch: int) -> float:
        return 1.0

    def final(self) -> float:
        return 1.0

    def received(self, stage: int, microbatch: int) -> float:
        return 1.0

    def exit_tokens(self, stage: int) -> float:
        return self.tokens


@dataclass(frozen=True)
class Filled:
    """Of a filling whose microbatch m has `tokens[m]` tokens that count, over all data-parallel ranks.

    With N ordinary tokens, n of part 1 that meet an exit and c of part 2 that a stage back-propagates: an exit's loss is
    injected with 1 / (N + n), outside part 1 also with N / (N + c) of its stage; the gradient handed to a stage is scaled by
    (N + c of the later stage) / (N + c of this one).
    """

    filling: Filling
    tokens: Sequence[float]

    def exit(self, stage: int, microbatch: int) -> float:
        share = sum(self.tokens) / (self._ordinary + self._part_one(stage))
        if microbatch in self.filling.part_one:
            return share
        return share * self._ordinary / self._whole(stage)

    def final(self) -> float:
        return sum(self.tokens) / self._whole(self.filling.pp - 1)

    def received(self, stage: int, microbatch: int) -> float:
        if microbatch in self.filling.part_one:
            return 1.0
        return self._whole(stage + 1) / self._whole(stage)

    def exit_tokens(self, stage: int) -> float:
        return self._whole(stage) + self._part_one(stage)

    @property
    def _ordinary(self) -> float:
        return sum(self.tokens[: self.filling.ordinary])

    def _part_one(self, stage: int) -> float:
        """n: tokens of part 1 that a stage runs; they meet all its exits."""
        first = self.filling.part_one.start
        return sum(self.tokens[first + index] for index, reach in enumerate(self.filling.reach) if stage < reach)

    def _whole(self, stage: int) -> float:
        """N + c: tokens of ordinary microbatches and of those of part 2 that a stage back-propagates; 1 where there are none."""
        ordinary, begins = self.filling.ordinary, self.filling.begins
        late = sum(self.tokens[ordinary + index] for index, first in enumerate(begins) if stage >= first)
        return self._ordinary + late or 1.0
