"""The statistics that decoding acts on are those of torch's softmax, on any number of ranks."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from eellm.model.statistics import summarise
from eellm.model.vocabulary import Vocabulary
from tests import workers
from tests.decoding.alone import vocabulary

TOKENS = 6


def some_logits(size: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(size)
    return torch.randn(TOKENS, size, generator=generator) * torch.tensor([0.1, 1.0, 3.0, 10.0, 30.0, 100.0]).unsqueeze(1)


def summary(rank: int, size: int, padded: int, temperature: float) -> list[torch.Tensor]:
    own = Vocabulary.of(size, padded, dist.group.WORLD)
    logits = some_logits(size)[:, own.start : own.start + own.rows]
    best, log_normaliser, statistics = summarise(logits, own, temperature)
    return [x.numpy() for x in (best, log_normaliser, *vars(statistics).values())]


def expected(size: int, temperature: float) -> list[torch.Tensor]:
    logits = some_logits(size).double()
    tempered = torch.distributions.Categorical(logits=logits / temperature)
    top = tempered.probs.topk(min(2, size), dim=1).values
    second = top[:, 1] if size > 1 else torch.zeros(TOKENS).double()
    normaliser = (logits / temperature).logsumexp(1)
    return [logits.amax(1), logits.logsumexp(1), logits.argmax(1), top[:, 0], second, tempered.entropy(), normaliser]


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
@pytest.mark.parametrize(("size", "padded"), [(50, 64), (31, 64), (33, 64), (3, 4)])
def test_two_ranks_know_what_one_would(size: int, padded: int, temperature: float) -> None:
    """31 of 64: the second rank holds padding only; 33 and 3: one row."""
    for result in workers.run(2, summary, size, padded, temperature):
        for own, wanted in zip(result, expected(size, temperature), strict=True):
            torch.testing.assert_close(torch.from_numpy(own).double(), wanted.double(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("size", [1, 2, 50])
def test_one_rank(size: int, temperature: float) -> None:
    best, log_normaliser, statistics = summarise(some_logits(size), vocabulary(size), temperature)
    for own, wanted in zip((best, log_normaliser, *vars(statistics).values()), expected(size, temperature), strict=True):
        torch.testing.assert_close(own.double(), wanted.double(), rtol=1e-4, atol=1e-5)


def tied(rank: int) -> int:
    own = Vocabulary.of(8, 8, dist.group.WORLD)
    logits = torch.tensor([[0.0, 2.0, 1.0, 2.0, 2.0, 0.0, 2.0, 1.0]])[:, own.start : own.start + own.rows]
    return int(summarise(logits, own, 1.0)[2].prediction)


def test_of_equal_logits_the_first_wins() -> None:
    assert workers.run(2, tied) == [1, 1]
