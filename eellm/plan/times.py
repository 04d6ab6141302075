"""Seconds of a microbatch on a stage: the input of the simulator, and the measure by which stages are balanced.

Modelled: matrix products run at the device's reached FLOP/s, backward twice the forward and what is computed again. Everything
between them moves memory: a pass reads and writes each kept activation once. Tensor parallelism adds two all-reduces a layer and
direction. Or measured: passes that were timed on the device itself.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, Protocol

from eellm.config.planning import TimedPassesConfig
from eellm.config.schema import Config
from eellm.layout import ParallelLayout
from eellm.metrics.flops import BACKWARD, head_flops, layer_flops, recomputed_flops
from eellm.model.spec import ExitSpec, Loads, ModelSpec, StageSpec, plan_stages
from eellm.plan import memory
from eellm.plan.device import Device
from eellm.plan.memory import Shape
from eellm.schedule.costs import HeadCosts, StageCosts
from eellm.schedule.program import ScheduleError

Split = list[int] | Literal["balance"] | None

_MOVED = 2
"""A kept activation is written once and read once in a forward pass, and twice that in a backward pass."""
_ELSEWHERE = ("num_layers", "exits", "depth", "exit_init", "init_std", "tie_embeddings", "vocab_size", "fused_norm")
"""What passes do not depend on, or what they say themselves; of the vocabulary, the padded one counts."""


class Times(Protocol):
    """(forward, backward) seconds of a microbatch through one layer, through the embedding and through a head."""

    @property
    def layer(self) -> tuple[float, float]: ...

    @property
    def embedding(self) -> tuple[float, float]: ...

    def head(self, exit_: ExitSpec | None) -> tuple[float, float]:
        """None = the final head."""
        ...


def times_of(spec: ModelSpec, shape: Shape, device: Device) -> Times:
    """Raises ScheduleError where passes were timed, but others than these."""
    if device.timed is None:
        return ModelledTimes(spec, shape, device)
    return MeasuredTimes(device.timed, setting(spec, shape))


def setting(spec: ModelSpec, shape: Shape) -> dict[str, Any]:
    """What the times of layers and heads depend on."""
    values = {**asdict(spec), **asdict(shape)}
    return {key: value for key, value in values.items() if key not in _ELSEWHERE and not isinstance(value, dict)}


def kind_of(exit_: ExitSpec | None) -> str:
    """Heads of one kind take the same time, wherever they stand."""
    if exit_ is None:
        return "final"
    return exit_.head if exit_.tie_output else f"{exit_.head}, own matrix"


class MeasuredTimes:
    """Passes as they were timed."""

    def __init__(self, timed: TimedPassesConfig, planned: dict[str, Any]):
        differing = [f"{key}={timed.setting.get(key)}" for key, value in planned.items() if timed.setting.get(key) != value]
        if differing:
            asked = ", ".join(f"{key}={planned[key]}" for key, _, _ in (each.partition("=") for each in differing))
            raise ScheduleError(f"the device profile was timed with {', '.join(differing)}, not {asked}")
        self._timed = timed

    @property
    def layer(self) -> tuple[float, float]:
        return self._timed.layer[0], self._timed.layer[1]

    @property
    def embedding(self) -> tuple[float, float]:
        return self._timed.embedding[0], self._timed.embedding[1]

    def head(self, exit_: ExitSpec | None) -> tuple[float, float]:
        kind = kind_of(exit_)
        if kind not in self._timed.heads:
            known = ", ".join(sorted(self._timed.heads))
            raise ScheduleError(f"the device profile has no time of a head `{kind}`, only of: {known}")
        forward, backward = self._timed.heads[kind]
        return forward, backward


@dataclass(frozen=True)
class ModelledTimes:
    """From operations, bytes moved and messages."""

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

    @property
    def embedding(self) -> tuple[float, float]:
        """Rows are looked up and added to."""
        moved = self._moving(memory.hidden_bytes(self.spec, self.shape))
        return moved + self._reduction, moved

    def head(self, exit_: ExitSpec | None) -> tuple[float, float]:
        """The forward pass makes the gradients of the output matrix and of what it is given too, so that no logits are kept: its
        traffic is logits, written, read four times and written again. The backward pass scales these gradients."""
        output = 2 * self.spec.hidden_size * self.spec.vocab_size
        tokens = self.shape.tokens / self.shape.tp
        body = (head_flops(self.spec, exit_, self.shape.sequence) - output) * tokens
        logits = self.shape.tokens * self.spec.padded_vocab_size / self.shape.tp * 4
        forward = (body + (1 + BACKWARD) * output * tokens) / self.device.flops + 6 * logits / self.device.memory_bandwidth
        kept = self._moving(memory.head_kept_bytes(self.spec, exit_, self.shape))
        return forward, BACKWARD * body / self.device.flops + kept + self._reduction

    def _moving(self, kept: float) -> float:
        return _MOVED * kept / self.device.memory_bandwidth

    @property
    def _reduction(self) -> float:
        size = self.shape.tokens * self.spec.hidden_size * self.shape.width
        return self.device.all_reduce(size, self.shape.tp, self.shape.tp)

    @property
    def _reductions(self) -> float:
        return 2 * self._reduction


def loads_of(spec: ModelSpec, times: Times) -> Loads:
    """Forward and backward, in seconds; of layers that end where exits are tuned, forward."""
    exits = {exit_.layer: sum(times.head(exit_)) for exit_ in spec.exits}
    final = sum(times.head(None)) if spec.has_final_head else 0.0
    passes = 1 if spec.depth is not None else 2
    return Loads(sum(times.layer[:passes]), exits, final, sum(times.embedding[:passes]))


def cut(spec: ModelSpec, layout: ParallelLayout, split: Split, boundary: str, shape: Shape, device: Device) -> list[StageSpec]:
    """Virtual stages; what `balance` leaves open is decided by the times on the device. Raises ScheduleError where the passes
    that were timed are others than these."""
    balances = "balance" in (split, boundary)
    return plan_stages(spec, layout, split, boundary, loads_of(spec, times_of(spec, shape, device)) if balances else None)


def stages_of(config: Config, spec: ModelSpec, layout: ParallelLayout, split: Split) -> list[StageSpec]:
    """Those that a run of the config has."""
    device = Device.of(config.device_profile, config.precision.dtype)
    return cut(spec, layout, split, config.exits.boundary, shape_of(config, layout), device)


def shape_of(config: Config, layout: ParallelLayout) -> Shape:
    trainer = config.trainer
    return Shape.of(layout, config.data.sequence_length, config.precision.dtype, trainer.recompute, trainer.loss_chunk)


def stage_costs(spec: ModelSpec, shape: Shape, times: Times, part: StageSpec) -> StageCosts:
    (forward, backward), (look_up, add_up) = times.layer, times.embedding if part.has_embedding else (0.0, 0.0)
    exits: list[ExitSpec | None] = [*part.exits, *([None] if part.has_final_head else [])]
    return StageCosts(
        forward=part.num_layers * forward + look_up,
        backward=part.num_layers * backward + add_up,
        weight=part.num_layers * forward,
        heads=tuple(_head_costs(spec, shape, times, exit_) for exit_ in exits),
        kept_bytes=memory.stage_kept_bytes(spec, part, shape),
        working_bytes=memory.working_bytes(spec, shape) if part.num_layers else 0.0,
        output_bytes=memory.hidden_bytes(spec, shape),
    )


def _head_costs(spec: ModelSpec, shape: Shape, times: Times, exit_: ExitSpec | None) -> HeadCosts:
    forward, backward = times.head(exit_)
    return HeadCosts(
        name="final" if exit_ is None else exit_.name,
        forward=forward,
        backward=backward,
        logits_bytes=memory.logits_bytes(spec, shape),
        kept_bytes=memory.head_kept_bytes(spec, exit_, shape),
        is_exit=exit_ is not None,
    )


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
    moved = moved_by_the_optimizer(held, layout.dp if sharded else 1)
    return StepTimes(max(0.0, reduced - hidden), moved / device.memory_bandwidth)


def moved_by_the_optimizer(held: memory.StaticMemory, sharded_over: int) -> float:
    """Bytes: states and gradients are read, states and weights written."""
    return 2 * held.optimizer + (held.gradients + held.weights) / sharded_over
