"""Decoding as work to be timed: prompts pass beforehand, then every sequence makes all of its tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from eellm.benchmark.paired_timing import CriticalPath
from eellm.decoding.continuation import Continuation, Request
from eellm.decoding.decoder import Decoder


class Prepared(Protocol):
    """Work with a part that comes first and is not timed."""

    def begin(self) -> None: ...

    def __call__(self) -> object: ...


Clock = Callable[[Prepared], float]
"""Seconds of a piece of work, its beginning left out."""


def prepared_clock(path: CriticalPath) -> Clock:
    def seconds(work: Prepared) -> float:
        work.begin()
        return path.seconds(work)

    return seconds


@dataclass(frozen=True)
class Pass:
    """What came out of the work once: whole continuations [batch, new tokens], and bytes of weights read by their steps."""

    prompts: list[list[int]]
    texts: list[list[int]]
    weight_bytes: int

    @property
    def tokens(self) -> int:
        """Tokens that were timed: a sequence's first one comes with its prompt."""
        return sum(len(text) - 1 for text in self.texts)


class Generating:
    """Work: `batch` sequences side by side, greedily, the next prompts each time; works with equal prompts stay in step.

    `passes` has an entry for every time it was done. No token ends a sequence early.
    """

    def __init__(self, decoder: Decoder, prompts: Sequence[list[int]], new_tokens: int, batch: int = 1):
        self.decoder, self.prompts = decoder, prompts
        self.passes: list[Pass] = []
        self._request, self._batch = Request(new_tokens), batch
        self._chosen: list[list[int]] = []
        self._sequences: list[Continuation] = []
        self._bytes_before = 0

    def begin(self) -> None:
        first = len(self.passes) * self._batch
        self._chosen = [self.prompts[(first + number) % len(self.prompts)] for number in range(self._batch)]
        self._sequences = [self.decoder.start(self._chosen[0], self._request)]
        self._sequences += [self.decoder.submit(prompt, self._request) for prompt in self._chosen[1:]]
        self.decoder.step()
        self._bytes_before = self.decoder.steps.weight_bytes

    def __call__(self) -> None:
        while self.decoder.step():
            pass
        texts = [[token.id for token in sequence.tokens] for sequence in self._sequences]
        self.passes.append(Pass(self._chosen, texts, self.decoder.steps.weight_bytes - self._bytes_before))


class WholeGeneration(Generating):
    """The same, prompts timed as well."""

    def begin(self) -> None:
        """All is timed."""

    def __call__(self) -> None:
        super().begin()
        super().__call__()
