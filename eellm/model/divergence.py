"""How far what an exit predicts is from what the final head does: forward Kullback-Leibler divergence, in chunks.

Like the cross-entropy in `eellm.model.vocabulary`: rows of both output matrices are split over tensor-parallel ranks, logits
are never gathered, and gradients are made in the forward pass, while a chunk's logits exist.

Shape legend: n tokens, h channels, v local rows of an output matrix.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from eellm.model.vocabulary import ChunkGradients, Vocabulary, scaled_gradients


@dataclass(frozen=True)
class Teacher:
    """What exits learn from: the final head's `features` [n, h] and its output matrix `weight` [v, h]; neither has gradients."""

    features: torch.Tensor
    weight: torch.Tensor


@dataclass(frozen=True)
class DivergenceOptions:
    """`exit_temperature` is the exit's own, `temperature` divides the logits of both; see `LossOptions` for the others."""

    exit_temperature: float = 1.0
    temperature: float = 1.0
    chunk: int = 1024
    grad_scale: float = 1.0


class _LinearDivergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, features, weight, teacher, mask, vocabulary, options):  # type: ignore[no-untyped-def]
        grads = ChunkGradients(features, weight, vocabulary.rows, ctx.needs_input_grad[:2])
        total, temperature = features.new_zeros((), dtype=torch.float32), options.temperature
        for begin in range(0, features.shape[0], options.chunk):
            part = slice(begin, begin + options.chunk)
            student = vocabulary.logits(features[part], weight, options.exit_temperature * temperature)
            log_student = _log_softmax(student, vocabulary)
            log_teacher = _log_softmax(vocabulary.logits(teacher.features[part], teacher.weight, temperature), vocabulary)
            target = log_teacher.exp()
            # the factor T^2 keeps gradients as large as those of the text's loss (Hinton et al., arXiv 1503.02531)
            divergence = vocabulary.reduce((target * (log_teacher - log_student)).sum(dim=1)) * temperature**2
            total += (divergence * mask[part]).sum()
            if grads.needed:
                factor = mask[part] * (options.grad_scale * temperature / options.exit_temperature)
                grads.add(part, log_student.exp_().sub_(target).mul_(factor.unsqueeze(1)))
        ctx.save_for_backward(grads.features, grads.weight)
        ctx.grad_scale, ctx.weight_dtype = options.grad_scale, weight.dtype
        return total

    @staticmethod
    def backward(ctx, grad_total):  # type: ignore[no-untyped-def]
        return *scaled_gradients(ctx, ctx.saved_tensors, grad_total.float()), None, None, None, None


def _log_softmax(logits: torch.Tensor, vocabulary: Vocabulary) -> torch.Tensor:
    """Of [n, rows], over the rows of all tensor-parallel ranks."""
    if vocabulary.group.size() == 1:
        return torch.log_softmax(logits, dim=1)
    top = logits.amax(dim=1) if logits.shape[1] else logits.new_full((len(logits),), -torch.inf)
    logits = logits - vocabulary.reduce(top, dist.ReduceOp.MAX).unsqueeze(1)
    return logits - vocabulary.reduce(logits.exp().sum(dim=1)).log().unsqueeze(1)


def linear_divergence(
    features: torch.Tensor,
    weight: torch.Tensor,
    teacher: Teacher,
    mask: torch.Tensor,
    vocabulary: Vocabulary,
    options: DivergenceOptions,
) -> torch.Tensor:
    """T^2 KL(final head || exit) at temperature T, summed over the unmasked of n tokens: an fp32 scalar.

    `features` [n, h] and `weight` [v, h] are the exit's, `mask` is [n].
    """
    return _LinearDivergence.apply(features, weight, teacher, mask, vocabulary, options)
