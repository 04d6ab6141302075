"""Products with an output matrix whose rows are split over tensor-parallel ranks: loss and confidence, in chunks.

No function here gathers logits: ranks exchange maxima, sums and a label's own logit per token. Rows that pad
the vocabulary are left out of the product, so they never take probability.

Shape legend: n tokens, h channels, v local rows of the output matrix.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Vocabulary:
    """How the rows of an output matrix are split: this rank holds rows [start, start + rows) of `size` real entries."""

    size: int
    start: int
    rows: int
    group: dist.ProcessGroup

    @classmethod
    def of(cls, size: int, padded_size: int, group: dist.ProcessGroup) -> Vocabulary:
        per_rank = padded_size // group.size()
        start = group.rank() * per_rank
        return cls(size, start, max(0, min(per_rank, size - start)), group)

    def reduce(self, tensor: torch.Tensor, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> torch.Tensor:
        if self.group.size() > 1:
            dist.all_reduce(tensor, op=op, group=self.group)
        return tensor

    def local(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(index into the local rows, whether the id lives here) of token ids [n]."""
        here = (ids >= self.start) & (ids < self.start + self.rows)
        return torch.where(here, ids - self.start, 0), here

    def logits(self, features: torch.Tensor, weight: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
        """[n, h] x [v, h] -> fp32 [n, rows]."""
        logits = (features @ weight[: self.rows].t()).float()
        return logits if temperature == 1.0 else logits.div_(temperature)


@dataclass(frozen=True)
class LossOptions:
    """`grad_scale` (fp16's loss scale) is applied before gradients are rounded to the weights' type and taken out again."""

    temperature: float = 1.0
    chunk: int = 1024
    confidence_weighted: bool = False
    grad_scale: float = 1.0


class ChunkGradients:
    """Gradients of a loss of `features @ weight.T`, made while a chunk's logits exist; only those that autograd asks for."""

    def __init__(self, features: torch.Tensor, weight: torch.Tensor, rows: int, needed: tuple[bool, bool]) -> None:
        self._inputs = features, weight[:rows]
        self.features = torch.empty_like(features) if needed[0] else None
        self.weight = torch.zeros_like(weight, dtype=torch.float32) if needed[1] else None
        self.needed = any(needed)

    def add(self, part: slice, grad_logits: torch.Tensor) -> None:
        """`grad_logits` [n of the part, rows], fp32."""
        features, weight = self._inputs
        grad_logits = grad_logits.to(weight.dtype)
        if self.features is not None:
            torch.mm(grad_logits, weight, out=self.features[part])
        if self.weight is not None:
            _accumulate_(self.weight[: len(weight)], grad_logits, features[part])


def scaled_gradients(ctx: Any, grads: Sequence[torch.Tensor | None], factor: torch.Tensor) -> list[torch.Tensor | None]:
    """Those of features and weight times `factor` (fp32 scalar), the scale of fp16 taken out; `ctx` keeps that and the type."""
    features, weight = (None if grad is None else grad.mul_(factor / ctx.grad_scale) for grad in grads)
    return [features, None if weight is None else weight.to(ctx.weight_dtype)]


class _LinearCrossEntropy(torch.autograd.Function):
    """Cross-entropy of `features @ weight.T`; gradients are made in the forward pass, while a chunk's logits exist."""

    @staticmethod
    def forward(ctx, features, weight, labels, mask, vocabulary, options):  # type: ignore[no-untyped-def]
        grads = ChunkGradients(features, weight, vocabulary.rows, ctx.needs_input_grad[:2])
        objective, loss_sum, weight_sum = (features.new_zeros((), dtype=torch.float32) for _ in range(3))
        for begin in range(0, features.shape[0], options.chunk):
            part = slice(begin, begin + options.chunk)
            probabilities = vocabulary.logits(features[part], weight, options.temperature)
            losses, confidence, index, here = _softmax_(probabilities, labels[part], vocabulary)
            coefficient = mask[part] * confidence if options.confidence_weighted else mask[part]
            loss_sum += (losses * mask[part]).sum()
            objective += (losses * coefficient).sum()
            weight_sum += coefficient.sum()
            if grads.needed:
                _subtract_labels_(probabilities, index, here)
                factor = coefficient * (options.grad_scale / options.temperature)
                grads.add(part, probabilities.mul_(factor.unsqueeze(1)))
        # token weights w_t become w_t * n / sum(w): their mean over the microbatch's tokens is 1
        share = mask.sum() / weight_sum.clamp(min=1e-12) if options.confidence_weighted else torch.ones_like(weight_sum)
        ctx.save_for_backward(grads.features, grads.weight, share)
        ctx.grad_scale, ctx.weight_dtype = options.grad_scale, weight.dtype
        ctx.mark_non_differentiable(loss_sum)
        return objective * share, loss_sum

    @staticmethod
    def backward(ctx, grad_objective, _):  # type: ignore[no-untyped-def]
        grad_features, grad_weight, share = ctx.saved_tensors
        grads = scaled_gradients(ctx, (grad_features, grad_weight), grad_objective.float() * share)
        return *grads, None, None, None, None


def _softmax_(logits: torch.Tensor, labels: torch.Tensor, vocabulary: Vocabulary) -> tuple[torch.Tensor, ...]:
    """Turn logits [n, rows] into probabilities in place; return losses, top probability, local label index and presence [n]."""
    if vocabulary.group.size() == 1:
        return _softmax_of_whole_rows_(logits, labels)
    top = vocabulary.reduce(logits.amax(dim=1), dist.ReduceOp.MAX) if logits.shape[1] else _no_rows(logits, vocabulary)
    logits.sub_(top.unsqueeze(1))
    index, here = vocabulary.local(labels)
    label_logit = logits.gather(1, index.unsqueeze(1)).squeeze(1).mul(here) if logits.shape[1] else torch.zeros_like(top)
    logits.exp_()
    label_logit, total = vocabulary.reduce(torch.stack((label_logit, logits.sum(dim=1)))).unbind()
    logits.div_(total.unsqueeze(1))
    return total.log() - label_logit, 1 / total, index, here


def _softmax_of_whole_rows_(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The same where one rank holds the whole vocabulary: one kernel of torch's instead of three passes."""
    top = logits.amax(dim=1)
    label_logit = logits.gather(1, labels.unsqueeze(1)).squeeze(1)
    torch.softmax(logits, dim=1, out=logits)
    confidence = logits.amax(dim=1)
    # from the logits: the probability of the label may be too small for fp32, the largest one is not
    losses = (top - label_logit) - confidence.log()
    return losses, confidence, labels, torch.ones_like(labels, dtype=torch.bool)


def _no_rows(logits: torch.Tensor, vocabulary: Vocabulary) -> torch.Tensor:
    """A rank that holds padding only still takes part in the exchange of maxima."""
    return vocabulary.reduce(logits.new_full((logits.shape[0],), -torch.inf), dist.ReduceOp.MAX)


def _subtract_labels_(probabilities: torch.Tensor, index: torch.Tensor, here: torch.Tensor) -> None:
    if probabilities.shape[1]:
        probabilities.scatter_add_(1, index.unsqueeze(1), -here.to(probabilities.dtype).unsqueeze(1))


def _accumulate_(total: torch.Tensor, grad_logits: torch.Tensor, features: torch.Tensor) -> None:
    if grad_logits.dtype == torch.float32:
        total.addmm_(grad_logits.t(), features)
    else:
        total.add_(grad_logits.t() @ features)


def linear_cross_entropy(
    features: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    mask: torch.Tensor,
    vocabulary: Vocabulary,
    options: LossOptions,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(objective, loss): sums over tokens, fp32 scalars, of [n, h] features, [n] labels and an [n] mask.

    The loss is plain and not differentiable; the objective is what is trained: with `confidence_weighted` each token
    counts by its own detached top probability, normalised within the microbatch (EE-Tuning's dynamic token weights).
    """
    if not torch.is_grad_enabled():  # a Function is told that a parameter needs its gradient even then
        weight = weight.detach()
    return _LinearCrossEntropy.apply(features, weight, labels, mask, vocabulary, options)
