"""What the softmax over a head's logits looks like per token, over all tensor-parallel ranks.

Ranks exchange six numbers per token, in one collective; logits are never gathered.
Shape legend: n tokens, h channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from eellm.model.vocabulary import Vocabulary

_LOWEST = -1e30
"""Stands in for the logits of rows that a rank does not have; finite, so that differences stay numbers."""


@dataclass(frozen=True)
class HeadStatistics:
    """Per token [n]: the predicted id, its probability, the runner-up's, the entropy in nats, and log-sum-exp of the logits."""

    prediction: torch.Tensor
    probability: torch.Tensor
    second_probability: torch.Tensor
    entropy: torch.Tensor
    log_normaliser: torch.Tensor


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
    dist.all_gather(list(gathered.chunk(group.size())), local, group=group)
    tops, seconds, ids, totals, tempered, weighted = gathered.view(group.size(), *local.shape).unbind(1)
    best, winner = tops.max(0)
    second = torch.cat((tops, seconds)).topk(2, dim=0).values[1]
    below = tops - best
    factors = (below / temperature).exp()
    weighted = factors * (weighted + tempered * below / temperature)
    index = ids.gather(0, winner.unsqueeze(0)).squeeze(0).long()
    return best, second, index, (below.exp() * totals).sum(0), (factors * tempered).sum(0), weighted.sum(0)


@dataclass(frozen=True)
class LabelScores:
    """Per token [n]: cross-entropy of the label at temperature 1, the predicted id, its probability at the head's temperature."""

    loss: torch.Tensor
    prediction: torch.Tensor
    confidence: torch.Tensor


@torch.no_grad()
def label_scores(
    features: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, vocabulary: Vocabulary, temperature: float = 1.0
) -> LabelScores:
    """Scores of [n, h] features against [n] labels from one product with the matrix; the caller bounds n.

    The same on all tensor-parallel ranks.
    """
    loss, statistics = label_statistics(features, weight, labels, vocabulary, temperature)
    return LabelScores(loss, statistics.prediction, statistics.probability)


@torch.no_grad()
def label_statistics(
    features: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, vocabulary: Vocabulary, temperature: float = 1.0
) -> tuple[torch.Tensor, HeadStatistics]:
    """(cross-entropy of the labels [n] at temperature 1, all statistics at the head's), as `label_scores`."""
    logits = vocabulary.logits(features, weight)
    best, log_normaliser, statistics = summarise(logits, vocabulary, temperature)
    index, here = vocabulary.local(labels)
    # differences from the largest logit, so that a confident token's small loss keeps its digits
    below = torch.zeros_like(best)
    if logits.shape[1]:
        below = (logits.gather(1, index.unsqueeze(1)).squeeze(1) - best) * here
    return (log_normaliser - best) - vocabulary.reduce(below), statistics
