"""What a head says about a token: its logits on this rank, and their statistics over all tensor-parallel ranks.

The logits are computed once per evaluation and serve the decision to exit, the choice of a token and its
log-probability. Ranks exchange six numbers per token, in one collective; logits are never gathered.
Shape legend: n tokens, h channels, r tensor-parallel ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from eellm.model.stage import Readout
from eellm.model.vocabulary import HeadStatistics, Vocabulary

_LOWEST = -1e30
"""Stands in for the logits of rows that a rank does not have; finite, so that differences stay numbers."""


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


def read(readout: Readout, features: torch.Tensor) -> Reading:
    """Multiply features [n, h] with the head's output matrix and summarise; equal on all tensor-parallel ranks."""
    logits = readout.vocabulary.logits(features, readout.weight)
    best, log_normaliser, statistics = summarise(logits, readout.vocabulary, readout.head.temperature)
    return Reading(readout.name, readout.head.layer, readout.vocabulary, logits, statistics, best, log_normaliser)


def summarise(
    logits: torch.Tensor, vocabulary: Vocabulary, temperature: float
) -> tuple[torch.Tensor, torch.Tensor, HeadStatistics]:
    """(largest logit [n], log-sum-exp [n], statistics of softmax(logits / temperature)) of [n, rows]."""
    if logits.shape[1] < 2:
        logits = torch.nn.functional.pad(logits, (0, 2 - logits.shape[1]), value=_LOWEST)
    best, second = logits.topk(2, dim=1).values.unbind(1)
    index = logits.argmax(1) + vocabulary.start  # the first of equal logits, which topk does not promise
    shifted = logits - best.unsqueeze(1)
    exponentials = shifted.exp()
    total = tempered = exponentials.sum(1)
    if temperature != 1.0:
        shifted = shifted / temperature
        exponentials = shifted.exp()
        tempered = exponentials.sum(1)
    weighted = (exponentials * shifted).sum(1)
    if vocabulary.group.size() > 1:
        # ids are exact in fp32 up to 2**24
        local = torch.stack((best, second, index.to(best.dtype), total, tempered, weighted))
        best, second, index, total, tempered, weighted = _combine(local, vocabulary.group, temperature)
    log_total, log_tempered = total.log(), tempered.log()
    statistics = HeadStatistics(
        prediction=index,
        probability=1 / tempered,
        second_probability=((second - best) / temperature).exp() / tempered,
        entropy=log_tempered - weighted / tempered,
        log_normaliser=best / temperature + log_tempered,
    )
    return best, best + log_total, statistics


def _combine(local: torch.Tensor, group: dist.ProcessGroup, temperature: float) -> tuple[torch.Tensor, ...]:
    """The six numbers [6, n] of all ranks as those of the whole vocabulary; ties go to the smaller id."""
    gathered = local.new_empty((group.size() * local.shape[0], local.shape[1]))
    dist.all_gather_into_tensor(gathered, local, group=group)
    tops, seconds, ids, totals, tempered, weighted = gathered.view(group.size(), *local.shape).unbind(1)
    best, winner = tops.max(0)
    second = torch.cat((tops, seconds)).topk(2, dim=0).values[1]
    below = tops - best
    factors = (below / temperature).exp()
    weighted = factors * (weighted + tempered * below / temperature)
    index = ids.gather(0, winner.unsqueeze(0)).squeeze(0).long()
    return best, second, index, (below.exp() * totals).sum(0), (factors * tempered).sum(0), weighted.sum(0)
