"""The engine that tunes exits behind a frozen backbone (EE-Tuning, arXiv 2402.00518).

Microbatches go forward only, without gradients, and nothing of the backbone is kept. The forward and backward of an exit run
where the hidden states pass it, one microbatch at a time, so the only gradients are those of exits and none travel between
stages.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from eellm.data.batch import GlobalBatch, Microbatch
from eellm.engine.chunks import Chunks
from eellm.engine.hidden_cache import HiddenStates, Keeping, visit_kept
from eellm.engine.megatron import MegatronEngine
from eellm.engine.protocol import Losses, VisitorOf, reduce_losses
from eellm.mcore.cpu import cpu_stand_ins
from eellm.mcore.schedules import reduce_gradients
from eellm.model.context import Context
from eellm.model.divergence import DivergenceOptions, Teacher, linear_divergence
from eellm.model.objective import HeadWeights, LossSums, Objective, ObjectiveOptions
from eellm.model.stage import HeadVisitor, Readout


@dataclass(frozen=True)
class Distillation:
    """See the config's `tuning.distillation`. The model is built as a whole, on one pipeline stage."""

    share: float
    temperature: float


class TuningEngine:
    """Implements `eellm.engine.protocol.Engine`; the chunks are built with `ChunkOptions.exits_only`."""

    def __init__(self, chunks: Chunks, options: ObjectiveOptions, distillation: Distillation | None = None):
        self.chunks, self.options = chunks, options
        self.objective: Callable[..., TuningObjective] = TuningObjective
        if distillation is not None:
            self.objective = partial(DistillingObjective, share=distillation.share, temperature=distillation.temperature)
        self.grad_scale: Callable[[], float] = lambda: 1.0
        """The factor that the optimizer applies to losses (fp16's loss scale)."""
        self.hidden_states: HiddenStates | None = None
        """Where hidden states at exits are kept, of batches that say which samples they hold."""
        self._forward = MegatronEngine(chunks, options)

    def run(self, batch: GlobalBatch, weights: HeadWeights, forward_only: bool = False) -> Losses:
        if forward_only:
            return self._forward.run(batch, weights, forward_only=True)
        sums, waiting = LossSums(), _Waiting()
        groups = self.chunks.groups
        sends = groups.pp_rank < groups.layout.pp - 1  # the last rank would only wait for its next microbatch first

        def tuning(_: int, microbatch: Microbatch) -> HeadVisitor:
            waiting.run()
            objective = self.objective(microbatch, weights, self.options, sums, self.grad_scale)
            return _AfterSending(objective, waiting) if sends else objective

        self._pass(batch, tuning)
        waiting.run()
        num_tokens = int(batch.loss_mask.sum())
        with cpu_stand_ins():
            reduce_gradients(self.chunks.wrapped, self.chunks.config, num_tokens)
        return reduce_losses(sums, self.chunks.spec.heads, num_tokens, groups)

    def _pass(self, batch: GlobalBatch, visitor_of: VisitorOf) -> None:
        """Through the backbone, or where the hidden states at all exits are kept, past it."""
        states, ids = self.hidden_states, batch.sample_ids
        if states is None or ids is None:
            return self.visit(batch, visitor_of)
        layers = [exit_.layer for stage in self.chunks.stages for exit_ in stage.stage_spec.exits]
        if states.have(layers, ids.cpu()):
            return visit_kept(self.chunks.stages, batch, visitor_of, states)

        def keeping(index: int, microbatch: Microbatch) -> Keeping:
            return Keeping(visitor_of(index, microbatch), states, ids[index].cpu())

        self.visit(batch, keeping)

    def visit(self, batch: GlobalBatch, visitor_of: VisitorOf) -> None:
        self._forward.visit(batch, visitor_of)


class TuningObjective(Objective):
    """Losses of one microbatch; the gradients of an exit's are in its buffers when the hidden states go on."""

    def at_exit(self, hidden: torch.Tensor, readout: Readout, context: Context) -> torch.Tensor:
        with torch.enable_grad():
            loss = self._loss(hidden, readout, context)
            loss.backward(torch.full_like(loss, self.scale()))
        return hidden


class _Waiting:
    """Exits of the microbatch that has just passed a stage."""

    def __init__(self) -> None:
        self._exits: list[Callable[[], object]] = []

    def add(self, exit_: Callable[[], object]) -> None:
        self._exits.append(exit_)

    def run(self) -> None:
        with cpu_stand_ins(), torch.no_grad():
            while self._exits:
                self._exits.pop(0)()


class _AfterSending:
    """Lets exits wait until the stage has sent the hidden states on and turns to its next microbatch: otherwise the stages
    behind it would wait for them."""

    def __init__(self, objective: HeadVisitor, waiting: _Waiting):
        self._objective, self._waiting = objective, waiting

    def at_exit(self, hidden: torch.Tensor, readout: Readout, context: Context) -> torch.Tensor:
        # as a tensor of its own: the schedule empties what it has sent
        self._waiting.add(partial(self._objective.at_exit, hidden.detach(), readout, context))
        return hidden

    def at_final(self, hidden: torch.Tensor, readout: Readout, context: Context) -> torch.Tensor:
        return self._objective.at_final(hidden, readout, context)


class DistillingObjective(TuningObjective):
    """Exits learn from the final head too, so their hidden states wait until the microbatch has passed all layers."""

    def __init__(self, *parts: Any, share: float, temperature: float):
        super().__init__(*parts)
        self.share, self.temperature = share, temperature
        self.waiting: list[tuple[torch.Tensor, Readout, Context]] = []
        self.teacher: Teacher | None = None

    def at_exit(self, hidden: torch.Tensor, readout: Readout, context: Context) -> torch.Tensor:
        self.waiting.append((hidden, readout, context))
        return hidden

    def at_final(self, hidden: torch.Tensor, readout: Readout, context: Context) -> torch.Tensor:
        features = readout.head.features(hidden, context)
        self.teacher = Teacher(features.flatten(0, 1), readout.weight)
        for waiting in self.waiting:
            super().at_exit(*waiting)
        return self._text_loss(features, readout)

    def _loss(self, hidden: torch.Tensor, readout: Readout, context: Context) -> torch.Tensor:
        """(1 - share) of the text's loss and `share` of the divergence."""
        assert self.teacher is not None
        features = readout.head.features(hidden, context)
        options = DivergenceOptions(readout.head.temperature, self.temperature, self.options.chunk, self.scale())
        mask = self.batch.loss_mask.t().reshape(-1)
        divergence = linear_divergence(features.flatten(0, 1), readout.weight, self.teacher, mask, readout.vocabulary, options)
        text = self._text_loss(features, readout)
        return (1 - self.share) * text + self.share * self.weights.values[readout.name] * divergence
