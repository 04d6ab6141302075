"""The engine on megatron-core's own schedules: no pipelining, 1F1B, interleaved 1F1B."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from eellm.data.batch import GlobalBatch, Microbatch
from eellm.engine.chunks import Chunks
from eellm.engine.protocol import Losses, VisitorOf, reduce_losses
from eellm.mcore.cpu import cpu_stand_ins
from eellm.mcore.schedules import forward_backward
from eellm.model.objective import HeadWeights, LossSums, Objective, ObjectiveOptions


class MegatronEngine:
    """Implements `eellm.engine.protocol.Engine`."""

    def __init__(self, chunks: Chunks, options: ObjectiveOptions):
        self.chunks, self.options = chunks, options
        self.grad_scale: Callable[[], float] = lambda: 1.0
        """The factor that the optimizer applies to losses (fp16's loss scale); exits take the same."""

    def run(self, batch: GlobalBatch, weights: HeadWeights, forward_only: bool = False) -> Losses:
        sums = LossSums()
        scale = (lambda: 1.0) if forward_only else self.grad_scale

        def objective(_: int, microbatch: Microbatch) -> Objective:
            return Objective(microbatch, weights, self.options, sums, scale)

        self._run(batch, objective, forward_only)
        return reduce_losses(sums, self.chunks.spec.heads, int(batch.loss_mask.sum()), self.chunks.groups)

    def visit(self, batch: GlobalBatch, visitor_of: VisitorOf) -> None:
        self._run(batch, visitor_of, forward_only=True)

    def _run(self, batch: GlobalBatch, visitor_of: VisitorOf, forward_only: bool) -> None:
        for chunk in self.chunks.wrapped:
            chunk.train(not forward_only)
        shape = batch.tokens.shape
        with cpu_stand_ins(), torch.set_grad_enabled(not forward_only):
            forward_backward(
                partial(_forward_step, batch, visitor_of),
                self.chunks.wrapped,
                num_microbatches=shape[0],
                shape=(shape[2], shape[1]),
                forward_only=forward_only,
            )
        for chunk in self.chunks.wrapped:
            chunk.train()


def _forward_step(
    batch: GlobalBatch, visitor_of: VisitorOf, indices: Iterator[int], chunk: Any
) -> tuple[torch.Tensor, Callable[[torch.Tensor], tuple]]:
    """One microbatch through one chunk, as megatron-core's schedules ask for it: (output, loss function).

    Microbatches are addressed by index, so every stage pairs the same data with what it receives.
    """
    index = next(indices)
    microbatch = batch[index]
    output = chunk(microbatch, visitor_of(index, microbatch))
    num_tokens = microbatch.loss_mask.sum().to(torch.int)
    return output, lambda total: (total, num_tokens, {})
