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


def inputs(vocab: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    """Features, an output matrix whose padding would take all the probability, labels and a mask."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(TOKENS, HIDDEN, generator=generator).to(dtype)
    weight = torch.randn(PADDED, HIDDEN, generator=generator).to(dtype)
    weight[vocab:] *= 30
    labels = torch.randint(0, vocab, (TOKENS,), generator=generator)
    mask = (torch.rand(TOKENS, generator=generator) > 0.3).float()
    return features, weight, labels, mask


def parallel_loss(rank: int, world: int, vocab: int, options: LossOptions, dtype: torch.dtype) -> tuple:
    features, weight, labels, mask = inputs(vocab, dtype)
    rows = PADDED // world
    features.requires_grad_()
    local = weight[rank * rows : (rank + 1) * rows].clone().requires_grad_()
    vocabulary = Vocabulary.of(vocab, PADDED, dist.group.WORLD)
    objective, loss = linear_cross_entropy(features, local, labels, mask, vocabulary, options)
    (objective * options.grad_scale).backward()
    with torch.no_grad():
        logits = vocabulary.logits(features, local)
        statistics = summarise(logits, vocabulary, options.temperature)[2]
    if world > 1:  # every rank holds the part of the gradient that comes through its rows
        dist.all_reduce(features.grad)
    return tuple(x.detach().float().numpy() for x in (objective, loss, features.grad, local.grad, *vars(statistics).values()))


def plain_loss(vocab: int, options: LossOptions) -> tuple:
    """The same in float64 from whole logits."""
    features, weight, labels, mask = inputs(vocab)
    features, weight = features.double().requires_grad_(), weight.double().requires_grad_()
    logits = features @ weight[:vocab].t() / options.temperature
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


@pytest.mark.parametrize(("world", "vocab"), [(1, VOCAB), (2, VOCAB), (2, 31), (2, 63)])
@pytest.mark.parametrize(
    "options",
    [
        LossOptions(chunk=5),
        LossOptions(chunk=1000, temperature=1.7, grad_scale=1024.0),
        LossOptions(chunk=7, confidence_weighted=True, temperature=0.6),
    ],
    ids=["chunks", "temperature_and_scale", "confidence"],
)
def test_equals_torch_on_whole_logits(world: int, vocab: int, options: LossOptions) -> None:
    """With 31 entries the second rank holds padding alone."""
    expected = plain_loss(vocab, options)
    results = workers.run(world, parallel_loss, world, vocab, options, torch.float32)
    for result in results:
        for actual, wanted in zip((*result[:2], *result[4:]), (*expected[:2], *expected[4:]), strict=True):
            torch.testing.assert_close(torch.tensor(actual).double(), wanted.detach().double(), rtol=2e-5, atol=2e-5)
        torch.testing.assert_close(torch.tensor(result[2]).double(), expected[2], rtol=2e-5, atol=2e-5 * options.grad_scale)
    weight_grad = torch.cat([torch.tensor(result[3]) for result in results]).double()
    torch.testing.assert_close(weight_grad, expected[3], rtol=2e-5, atol=2e-5 * options.grad_scale)
    assert weight_grad[vocab:].abs().max() == 0, "rows that pad the vocabulary must not train"


def test_small_gradients_survive_half_precision() -> None:
    """With fp16 and its loss scale, tokens' gradients are scaled before they are rounded, or they would vanish."""
    options = LossOptions(grad_scale=2.0**14, temperature=20.0)
    (result,) = workers.run(1, parallel_loss, 1, VOCAB, options, torch.float16)
    expected = plain_loss(VOCAB, options)
    error = (torch.tensor(result[2]).double() - expected[2]).norm() / expected[2].norm()
    assert error < 5e-3


def extreme_loss(rank: int, world: int) -> tuple:
    """Every label once, its logit up to 600 away from the largest: probabilities far below what fp32 can hold."""
    rows = PADDED // world
    column = torch.zeros(PADDED, 1)
    column[:VOCAB, 0] = torch.linspace(-300, 300, VOCAB)
    features = torch.ones(VOCAB, 1, requires_grad=True)
    weight = column[rank * rows : (rank + 1) * rows].clone().requires_grad_()
    vocabulary = Vocabulary.of(VOCAB, PADDED, dist.group.WORLD)
    # one token at a time: the loss of a sum would hide a small one
    losses = []
    for label in range(VOCAB):
        parts = (features[label : label + 1], weight, torch.tensor([label]), torch.ones(1))
        objective, loss = linear_cross_entropy(*parts, vocabulary, LossOptions())
        objective.backward()
        losses.append(loss.item())
    if world > 1:
        dist.all_reduce(features.grad)
    return losses, features.grad.flatten().tolist()


@pytest.mark.parametrize("world", [1, 2])
def test_loss_of_labels_whose_probability_underflows(world: int) -> None:
    column = torch.linspace(-300, 300, VOCAB, dtype=torch.float64)
    features = torch.ones(VOCAB, 1, dtype=torch.float64, requires_grad=True)
    expected = F.cross_entropy(features * column, torch.arange(VOCAB), reduction="none")
    expected.sum().backward()
    for losses, gradient in workers.run(world, extreme_loss, world):
        torch.testing.assert_close(torch.tensor(losses).double(), expected.detach(), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(torch.tensor(gradient).double(), features.grad.flatten(), rtol=1e-6, atol=1e-3)
