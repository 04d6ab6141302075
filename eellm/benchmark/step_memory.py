"""How much memory exits add to a training step, and how much of it each microbatch in flight adds."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.distributed as dist

from eellm.benchmark.exits_alone import hidden_shape
from eellm.benchmark.live_memory import peak_bytes
from eellm.benchmark.variants import Variant, Variants
from eellm.layout import ParallelLayout
from eellm.mcore.cpu import cpu_stand_ins
from eellm.model.initialise import initialise
from eellm.model.objective import LossSums, Objective, ObjectiveOptions
from eellm.model.spec import ModelSpec, plan_stages
from eellm.model.stage import Stage
from eellm.schedule.invariants import most_in_flight

_FP32 = 4


@dataclass(frozen=True)
class RankMemory:
    """Bytes of one rank: the peaks of a step with exits and without, and what exits are allowed to add."""

    with_exits: int
    without_exits: int
    allowance: int

    @property
    def added(self) -> int:
        return self.with_exits - self.without_exits


@dataclass(frozen=True)
class StepMemory:
    """Of all ranks: what the largest of them needs decides which device will do, and each has an allowance of its own."""

    ranks: tuple[RankMemory, ...]

    @property
    def with_exits(self) -> int:
        return max(rank.with_exits for rank in self.ranks)

    @property
    def without_exits(self) -> int:
        return max(rank.without_exits for rank in self.ranks)

    @property
    def added(self) -> int:
        """To the largest peak; the rank that has it with exits may be another one than without."""
        return self.with_exits - self.without_exits

    @property
    def nearest(self) -> RankMemory:
        """The rank whose exits come nearest to their allowance or exceed it most."""
        return max(self.ranks, key=lambda rank: rank.added / rank.allowance)


def step_memory(variants: Variants) -> StepMemory:
    """Called by all ranks, and the same on all."""
    with_exits, without_exits = (peak_bytes(variant.run) for variant in (variants.with_exits, variants.without_exits))
    mine = RankMemory(with_exits, without_exits, allowance(variants.with_exits))
    ranks: list[RankMemory] = [mine] * dist.get_world_size()
    dist.all_gather_object(ranks, mine)
    return StepMemory(tuple(ranks))


def allowance(variant: Variant) -> int:
    """Twice the fp32 logits that exist at a time, and the hidden states that an exit at a stage's end keeps until the
    backward pass of their microbatch: the stage itself has no use for what it sent."""
    stages = variant.chunks.stages
    ends = {stage.stage_spec.index for stage in stages if not stage.post_process and stage.segments[-1].exit is not None}
    in_flight = most_in_flight(variant.program, ends)[variant.groups.pp_rank]
    return 2 * logits_bytes(variant) + in_flight * hidden_bytes(variant)


def logits_bytes(variant: Variant) -> int:
    """fp32 logits of one microbatch, or of one chunk where the loss is cut smaller; this rank's rows."""
    _, micro_batch, sequence = variant.batch.tokens.shape
    tokens = min(variant.options.chunk, micro_batch * sequence)
    return tokens * variant.chunks.stages[0].vocabulary.rows * _FP32


def hidden_bytes(variant: Variant) -> int:
    sequence, micro_batch, hidden = hidden_shape(variant)
    return sequence * micro_batch * hidden * variant.chunks.config.params_dtype.itemsize


class FirstStage:
    """The layers up to the deepest exit as the first stage of a pipeline, to hold any number of microbatches in flight.

    Built for this measurement on every rank alike, with and without exits; gradients are there beforehand.
    """

    def __init__(self, variant: Variant):
        self.variant = variant
        self.stage = self._build(variant.spec)
        self.bare = self._build(replace(variant.spec, exits=()))

    @staticmethod
    def depth(spec: ModelSpec) -> int:
        """Layers up to the deepest exit that a first stage can end in; 0 where there is none."""
        return max((layer for layer in spec.exit_layers if layer < spec.num_layers), default=0)

    @property
    def hidden_bytes(self) -> int:
        """What the exit at this stage's end keeps for each microbatch in flight."""
        return hidden_bytes(self.variant)

    def growth(self, deferred: bool, in_flight: int) -> float:
        """Bytes that exits add to the peak for each further microbatch in flight, from 1 to `in_flight` of them."""
        options = replace(self.variant.options, deferred=deferred)
        first, last = (self._added(options, number) for number in (1, in_flight))
        return (last - first) / (in_flight - 1)

    def _build(self, spec: ModelSpec) -> Stage:
        chunks, groups = self.variant.chunks, self.variant.groups
        layers = self.depth(self.variant.spec)
        plan = plan_stages(spec, ParallelLayout(pp=2), [layers, spec.num_layers - layers])
        with cpu_stand_ins():
            stage = Stage(spec, plan[0], chunks.config, [], groups.tp).to(groups.device)
        initialise(stage, 1, groups.tp_rank)
        stage.set_recompute(chunks.stages[0].recompute)
        for parameter in stage.parameters():
            parameter.grad = torch.zeros_like(parameter)
        return stage

    def _added(self, options: ObjectiveOptions, in_flight: int) -> int:
        with_exits, without = (peak_bytes(partial(self._run, stage, options, in_flight)) for stage in (self.stage, self.bare))
        return with_exits - without

    def _run(self, stage: Stage, options: ObjectiveOptions, in_flight: int) -> None:
        """All forward passes, then all backward passes, oldest first. A sum needs no values of what it adds up, so a
        stage's output goes at once, as megatron-core's schedules let it go."""
        batch, weights, sums = self.variant.batch, self.variant.weights, LossSums()
        pending = []
        for index in range(in_flight):
            microbatch = batch[index % len(batch)]
            objective = Objective(microbatch, weights, options, sums, self.variant.engine.grad_scale)
            pending.append(stage(microbatch, objective).sum())
        while pending:
            pending.pop(0).backward()
