"""What a head says about a token: its logits on this rank, and their statistics over all tensor-parallel ranks.

The logits are computed once per evaluation and serve the decision to exit, the choice of a token and its
log-probability.
Shape legend: n tokens, h channels.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch

from eellm.model.stage import Readout
from eellm.model.statistics import HeadStatistics, summarise
from eellm.model.vocabulary import Vocabulary


@dataclass(frozen=True)
class Reading:
    """`logits` fp32 [n, this rank's rows], untempered. `statistics` [n] are at the head's temperature, as in training.

    `best` [n] is the largest logit and `log_normaliser` [n] log-sum-exp of the logits, both untempered, over all ranks.
    """

    head: str
    layer: int
    vocabulary: Vocabulary
    logits: torch.Tensor
    statistics: HeadStatistics
    best: torch.Tensor
    log_normaliser: torch.Tensor

    def at(self, index: int) -> Reading:
        """One token's part."""
        one = slice(index, index + 1)
        statistics = select(self.statistics, one)
        parts = (self.logits[one], statistics, self.best[one], self.log_normaliser[one])
        return Reading(self.head, self.layer, self.vocabulary, *parts)


def select(statistics: HeadStatistics, which: slice | torch.Tensor) -> HeadStatistics:
    """Statistics [n] of some tokens."""
    return HeadStatistics(*(getattr(statistics, field.name)[which] for field in fields(statistics)))


def read(readout: Readout, features: torch.Tensor) -> Reading:
    """Multiply features [n, h] with the head's output matrix and summarise; equal on all tensor-parallel ranks."""
    logits = readout.vocabulary.logits(features, readout.weight)
    best, log_normaliser, statistics = summarise(logits, readout.vocabulary, readout.head.temperature)
    return Reading(readout.name, readout.head.layer, readout.vocabulary, logits, statistics, best, log_normaliser)
