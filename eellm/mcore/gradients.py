"""What happens to gradients after the last microbatch: megatron-core's reductions, then the tied copies' sum."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads

from eellm.mcore.groups import Groups

Finalise = Callable[..., None]


def mark_tied_copies(stages: list) -> None:
    """Before wrapping: every copy gets a gradient bucket of its own, and all but the first stay out of the gradient norm."""
    for stage in stages:
        weight = stage.tied_weight()
        if weight is not None:
            weight.shared_embedding = True
            weight.shared = stage.copy_index > 0


def finaliser(groups: Groups) -> Finalise:
    """A `finalize_model_grads_func`: reduce over data-parallel and sequence-parallel ranks, divide by tokens, sum tied copies."""

    def finalise(chunks: list[DistributedDataParallel], num_tokens: torch.Tensor | None = None, **options: object) -> None:
        finalize_model_grads(chunks, num_tokens, **options)
        sum_tied_gradients(chunks, groups)

    return finalise


def sum_tied_gradients(chunks: list[DistributedDataParallel], groups: Groups) -> None:
    """Give every copy of the output matrix the sum of all copies' gradients: over this rank's chunks, then over stages.

    With the distributed optimizer only a rank's shard of a gradient is whole; copies lie in buckets of their own and
    are cut alike, so shards meet their counterparts.
    """
    copies = [chunk.module.tied_weight() for chunk in chunks]
    grads = [weight.main_grad for weight in copies if weight is not None and weight.requires_grad]
    if not grads:
        return
    for grad in grads[1:]:
        grads[0].add_(grad)
    if groups.tied is not None:
        dist.all_reduce(grads[0], group=groups.tied)
    for grad in grads[1:]:
        grad.copy_(grads[0])
