"""The engine that tunes exits behind a frozen backbone (EE-Tuning, arXiv 2402.00518).

Microbatches go forward only, without gradients, and nothing of the backbone is kept. The forward and backward of an exit run
where the hidden states pass it, one microbatch at a time, so the only gradients are those of exits and none travel between
stages.
"""

from __future__ import annotations

from collections.abc import Callable

from eellm.data.batch import GlobalBatch, Microbatch
from eellm.engine.chunks import Chunks
from eellm.engine.distillation import Distillation, DistilledExits, DistillingObjective, Teaching
from eellm.engine.hidden_cache import HiddenStates, Keeping, visit_kept
from eellm.engine.megatron import MegatronEngine
from eellm.engine.protocol import Losses, VisitorOf, reduce_losses
from eellm.engine.tuned_exits import PassedExits, TunedExits, TuningObjective
from eellm.mcore.cpu import cpu_stand_ins
from eellm.mcore.schedules import reduce_gradients
from eellm.model.objective import HeadWeights, LossSums, ObjectiveOptions


class TuningEngine:
    """Implements `eellm.engine.protocol.Engine`; the chunks are built with `ChunkOptions.exits_only`."""

    def __init__(self, chunks: Chunks, options: ObjectiveOptions, distillation: Distillation | None = None):
        self.chunks, self.options = chunks, options
        self._teaching = None if distillation is None else Teaching(chunks, distillation)
        self.grad_scale: Callable[[], float] = lambda: 1.0
        """The factor that the optimizer applies to losses (fp16's loss scale)."""
        self.hidden_states: HiddenStates | None = None
        """Where hidden states at exits are kept, of batches that say which samples they hold."""
        self._forward = MegatronEngine(chunks, options)

    def run(self, batch: GlobalBatch, weights: HeadWeights, forward_only: bool = False) -> Losses:
        if forward_only:
            return self._forward.run(batch, weights, forward_only=True)
        sums = LossSums()
        exits = self._exits(weights, sums)
        self._pass(batch, exits.visitor)
        exits.finish()
        num_tokens = int(batch.loss_mask.sum())
        with cpu_stand_ins():
            reduce_gradients(self.chunks.wrapped, self.chunks.config, num_tokens, self.chunks.groups.device)
        return reduce_losses(sums, self.chunks.spec.heads, num_tokens, self.chunks.groups)

    def _exits(self, weights: HeadWeights, sums: LossSums) -> TunedExits:
        options = weights, self.options, sums, self.grad_scale
        groups, teaching = self.chunks.groups, self._teaching
        if teaching is not None:
            return DistilledExits(lambda microbatch: DistillingObjective(microbatch, *options, teaching=teaching), teaching)
        sends = groups.pp_rank < groups.layout.pp - 1  # the last rank would only wait for its next microbatch first
        return PassedExits(lambda microbatch: TuningObjective(microbatch, *options), sends)

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
