"""Chunked, vocabulary-parallel cross-entropy and statistics against torch's own on whole logits."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from eellm.model.statistics import summarise
from eellm.model.vocabulary import LossOptions, Vocabulary, linear_cross_entropy
from tests import workers

TOKENS, HIDDEN, VOCAB, PADDED = 23, 16, 37, 64


def inputs(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(TOKENS, HIDDEN, generator=generator).to(dtype)
    weight = torch.randn(PADDED, HIDDEN, generator=generator).to(dtype)
    labels = torch.randint(0, VOCAB, (TOKENS,), generator=generator)
    mask = (torch.rand(TOKENS, generator=generator) > 0.3).float()
    return features, weight, labels, mask


def parallel_loss(rank: int, world: int, options: LossOptions, dtype: torch.dtype) -> tuple:
    features, weight, labels, mask = inputs(dtype)
    rows = PADDED // world
    features.requires_grad_()
    local = weight[rank * rows : (rank + 1) * rows].clone().requires_grad_()
    vocabulary = Vocabulary.of(VOCAB, PADDED, dist.group.WORLD)
    objective, loss = linear_cross_entropy(features, local, labels, mask, vocabulary, options)
    (objective * options.grad_scale).backward()
    with torch.no_grad():
        logits = vocabulary.logits(features, local)
        statistics = summarise(logits, vocabulary, options.temperature)[2]
    if world > 1:  # every rank holds the part of the gradient that comes through its rows
        dist.all_reduce(features.grad)
    return tuple(x.detach().float().numpy() for x in (objective, loss, features.grad, local.grad, *vars(statistics).values()))


def plain_loss(options: LossOptions) -> tuple:
    """The same in float64 from whole logits."""
    features, weight, labels, mask = inputs()
    features, weight = features.double().requires_grad_(), weight.double().requires_grad_()
    logits = features @ weight[:VOCAB].t() / options.temperature
    losses = F.cross_entropy(logits, labels, reduction="none")
    coefficient = mask.double()
    if options.confidence_weighted:
        confidence = logits.softmax(-1).amax(-1).detach() * mask
        coefficient = confidence * mask.sum() / confidence.sum()
    objective = (losses * coefficient).sum()
    (objective * options.grad_scale).backward()
    probabilities = logits.softmax(-1)
    two = probabilities.topk(2, -1).values
    entropy = -(probabilities * probabilities.log()).sum(-1)
    return (
        objective,
        (losses * mask).sum(),
        features.grad,
        weight.grad,
        logits.argmax(-1),
        *two.unbind(-1),
        entropy,
        logits.logsumexp(-1),
    )


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize(
    "options",
    [
        LossOptions(chunk=5),
        LossOptions(chunk=1000, temperature=1.7, grad_scale=1024.0),
        LossOptions(chunk=7, confidence_weighted=True, temperature=0.6),
    ],
    ids=["chunks", "temperature_and_scale", "confidence"],
)
def test_equals_torch_on_whole_logits(world: int, options: LossOptions) -> None:
    expected = plain_loss(options)
    results = workers.run(world, parallel_loss, world, options, torch.float32)
    for result in results:
        for actual, wanted in zip((*result[:3], *result[4:]), (*expected[:3], *expected[4:]), strict=True):
            torch.testing.assert_close(torch.tensor(actual).double(), wanted.detach().double(), rtol=2e-5, atol=2e-5)
    weight_grad = torch.cat([torch.tensor(result[3]) for result in results]).double()
    torch.testing.assert_close(weight_grad, expected[3], rtol=2e-5, atol=2e-5 * options.grad_scale)
    assert weight_grad[VOCAB:].abs().max() == 0, "rows that pad the vocabulary must not train"


def test_small_gradients_survive_half_precision() -> None:
    """With fp16 and its loss scale, tokens' gradients are scaled before they are rounded, or they would vanish."""
    options = LossOptions(grad_scale=2.0**14, temperature=20.0)
    (result,) = workers.run(1, parallel_loss, 1, options, torch.float16)
    expected = plain_loss(options)
    error = (torch.tensor(result[2]).double() - expected[2]).norm() / expected[2].norm()
    assert error < 5e-3
