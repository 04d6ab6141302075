"""Losses, predictions and confidences from a vocabulary split over ranks equal those of whole logits, ties included."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from eellm.model.statistics import label_scores
from eellm.model.vocabulary import Vocabulary
from tests import workers


def inputs(size: int, padded: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Features, weight and labels. Three rows of the weight are one vector, along which the features lie.

    Products of such small fractions are exact, so that equal rows give equal logits whatever the shape of the product.
    """
    generator = torch.Generator().manual_seed(2)
    weight = torch.randint(-3, 4, (padded, 8), generator=generator) / 8
    weight[[1, size // 2, size - 1]] = torch.tensor([0.5, -0.5] * 4)
    features = torch.randint(-2, 3, (40, 8), generator=generator) + 4 * weight[1]
    labels = torch.randint(0, size, (40,), generator=generator)
    return features.to(dtype), weight.to(dtype), labels


def scores_on_rank(rank: int, size: int, padded: int, dtype: torch.dtype, temperature: float) -> tuple:
    features, weight, labels = inputs(size, padded, dtype)
    vocabulary = Vocabulary.of(size, padded, dist.group.WORLD)
    own = weight.chunk(dist.get_world_size())[rank]
    scores = label_scores(features, own, labels, vocabulary, temperature)
    return tuple(tensor.numpy() for tensor in (scores.loss, scores.prediction, scores.confidence))


@pytest.mark.parametrize("temperature", [1.0, 0.5, 3.0])
@pytest.mark.parametrize(("size", "padded", "world_size"), [(31, 32, 1), (31, 32, 2), (3, 8, 2), (5, 8, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_equal_whole_logits(size: int, padded: int, world_size: int, temperature: float, dtype: torch.dtype) -> None:
    features, weight, labels = inputs(size, padded, dtype)
    logits = (features @ weight[:size].t()).double()
    largest = (logits == logits.amax(1, keepdim=True)).long().argmax(1)
    assert (logits == logits.amax(1, keepdim=True)).sum(1).gt(1).float().mean() > 0.5, "most tokens should have a tie"
    losses, confidences = F.cross_entropy(logits, labels, reduction="none"), (logits / temperature).softmax(1).amax(1)
    for loss, prediction, confidence in workers.run(world_size, scores_on_rank, size, padded, dtype, temperature):
        assert loss == pytest.approx(losses.numpy(), rel=1e-5, abs=1e-6)
        assert confidence == pytest.approx(confidences.numpy(), rel=1e-5)
        assert prediction.tolist() == largest.tolist()
