"""A vocabulary on one rank, for tests that need no process group."""

from __future__ import annotations

import torch

from eellm.decoding.reading import Reading
from eellm.model.statistics import summarise
from eellm.model.vocabulary import Vocabulary


class OneRank:
    """The part of a process group that a vocabulary asks for."""

    def size(self) -> int:
        return 1

    def rank(self) -> int:
        return 0


def vocabulary(size: int) -> Vocabulary:
    return Vocabulary(size, 0, size, OneRank())


def reading(logits: torch.Tensor, temperature: float = 1.0) -> Reading:
    """What a head with these logits [n, vocabulary] says."""
    vocabulary_ = vocabulary(logits.shape[1])
    best, log_normaliser, statistics = summarise(logits, vocabulary_, temperature)
    return Reading("exit_02", 2, vocabulary_, logits, statistics, best, log_normaliser)
