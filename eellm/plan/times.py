"""Seconds of a microbatch on a stage, from operations, bytes moved and messages: the input of the simulator.

Matrix products run at the device's reached FLOP/s, backward twice the forward and what is computed again. Everything between them
moves memory: a pass reads and writes each kept activation once. Tensor parallelism adds two all-reduces a layer and direction.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from eellm.layout import ParallelLayout
from eellm.metrics.flops import BACKWARD, head_flops, layer_flops, recomputed_flops
from eellm.model.spec import ExitSpec, ModelSpec, StageSpec
from eellm.plan import memory
from eellm.plan.device import Device
from eellm.plan.memory import Shape
from eellm.schedule.costs import Costs, HeadCosts, StageCosts

_MOVED = 2
"""A kept activation is written once and read once in a forward pass, and twice that in a backward pass."""


@dataclass(frozen=True)
class Times:
    """Forward and backward seconds of a microbatch through one layer and through the heads."""

    spec: ModelSpec
    shape: Shape
    device: Device

    @property
    def layer(self) -> tuple[float, float]:
        flops = layer_flops(self.spec, self.shape.sequence) * self.shape.tokens / self.shape.tp
        again: float = recomputed_flops(replace(self.spec, num_layers=1, exits=()), self.shape.sequence, self.shape.recompute)
        again = again * self.shape.tokens / self.shape.tp
        moved = self._moving(memory.layer_bytes(self.spec, replace(self.shape, recompute="none")))
        full = self.shape.recompute == "full"
        forward = flops / self.device.flops + moved + self._reductions
        backward = (BACKWARD * flops + again) / self.device.flops + (BACKWARD + full) * moved + (1 + full) * self._reductions
        return forward, backward

    def head(self, exit_: ExitSpec | None) -> tuple[float, float]:
        """None = the final head. Its memory traffic is that of logits: written, read three times, and written again."""
        flops = head_flops(self.spec, exit_, self.shape.sequence) * self.shape.tokens / self.shape.tp
        logits = self.shape.tokens * self.spec.padded_vocab_size / self.shape.tp * 4
        kept = memory.head_kept_bytes(self.spec, exit_, self.shape)
        forward = flops / self.device.flops + 3 * logits / self.device.memory_bandwidth
        backward = BACKWARD * flops / self.device.flops + (2 * logits + kept) / self.device.memory_bandwidth
        return forward, backward + self._reduction

    def _moving(self, kept: float) -> float:
        return _MOVED * kept / self.device.memory_bandwidth

    @property
    def _reduction(self) -> float:
        size = self.shape.tokens * self.spec.hidden_size * self.shape.width
        return self.device.all_reduce(size, self.shape.tp, self.shape.tp)

    @property
    def _reductions(self) -> float:
        return 2 * self._reduction


def stage_costs(times: Times, part: StageSpec) -> StageCosts:
    spec, shape = times.spec, times.shape
    forward, backward = times.layer
    exits: list[ExitSpec | None] = [*part.exits, *([None] if part.has_final_head else [])]
    return StageCosts(
        forward=part.num_layers * forward,
        backward=part.num_layers * backward,
        weight=part.num_layers * forward,
        heads=tuple(_head_costs(times, exit_) for exit_ in exits),
        kept_bytes=memory.stage_kept_bytes(spec, part, shape),
        working_bytes=memory.working_bytes(spec, shape) if part.num_layers else 0.0,
        output_bytes=memory.hidden_bytes(spec, shape),
    )


def _head_costs(times: Times, exit_: ExitSpec | None) -> HeadCosts:
    forward, backward = times.head(exit_)
    return HeadCosts(
        name="final" if exit_ is None else exit_.name,
        forward=forward,
        backward=backward,
        logits_bytes=memory.logits_bytes(times.spec, times.shape),
        kept_bytes=memory.head_kept_bytes(times.spec, exit_, times.shape),
        is_exit=exit_ is not None,
    )


def layout_costs(times: Times, stages: list[StageSpec], layout: ParallelLayout, deferred: bool) -> Costs:
    """Of all stages, with the way between them."""
    own = [stage_costs(times, part) for part in stages]
    return Costs(own, deferred, times.device.latency, times.device.hop(layout))


@dataclass(frozen=True)
class StepTimes:
    """What follows the pipeline in every step."""

    gradients: float
    """Reduction of gradients, and gathering of parameters where the optimizer is distributed, as far as nothing hides it."""
    optimizer: float


def step_times(device: Device, layout: ParallelLayout, held: memory.StaticMemory, hidden: float, sharded: bool) -> StepTimes:
    """Of the rank that holds most. `hidden` seconds of the backward pass overlap with the reduction (0: no overlap)."""
    span = layout.tp * layout.dp
    reduced = device.all_reduce(held.gradients, layout.dp, span)
    if sharded:  # reduce-scatter of gradients, all-gather of weights
        reduced = (reduced + device.all_reduce(held.weights, layout.dp, span)) / 2
    # states and gradients are read, states and weights written
    moved = 2 * held.optimizer + (held.gradients + held.weights) / (layout.dp if sharded else 1)
    return StepTimes(max(0.0, reduced - hidden), moved / device.memory_bandwidth)
