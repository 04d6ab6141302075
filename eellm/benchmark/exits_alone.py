"""The exits of a rank and nothing else: their forward and backward on hidden states of the right shape."""

from __future__ import annotations

import torch

from eellm.benchmark.variants import Variant
from eellm.mcore.cpu import cpu_stand_ins
from eellm.model.context import training_context
from eellm.model.objective import LossSums, Objective
from eellm.model.stage import Readout, Stage


class ExitsAlone:
    """What a step of `variant` does at its exits: every microbatch through every exit of this rank's stages, by the
    same code and into the same gradient buffers, in one backward pass per microbatch and stage as in training."""

    def __init__(self, variant: Variant):
        engine, batch = variant.engine, variant.batch
        sums = LossSums()
        self.objectives = [
            Objective(batch[index], variant.weights, variant.options, sums, engine.grad_scale) for index in range(len(batch))
        ]
        self.stages = [_StageExits(stage, variant) for stage in variant.chunks.stages if exits_of(stage)]

    def run(self) -> None:
        with cpu_stand_ins():  # as training runs
            for objective in self.objectives:
                for stage in self.stages:
                    stage.run(objective)


class _StageExits:
    def __init__(self, stage: Stage, variant: Variant):
        shape, dtype = hidden_shape(variant), stage.config.params_dtype
        self.readouts = exits_of(stage)
        self.hidden = torch.randn(shape, dtype=dtype, device=variant.groups.device).requires_grad_()
        self.gradient = torch.randn_like(self.hidden)
        self.context = training_context(stage.spec, variant.batch[0].positions, None, dtype)

    def run(self, objective: Objective) -> None:
        self.hidden.grad = None
        passing: torch.Tensor = self.hidden
        for readout in self.readouts:
            passing = objective.at_exit(passing, readout, self.context)
        passing.backward(self.gradient)


def exits_of(stage: Stage) -> list[Readout]:
    return [segment.exit for segment in stage.segments if segment.exit is not None]


def hidden_shape(variant: Variant) -> tuple[int, int, int]:
    """[s, b, h] of the hidden states between layers on one rank."""
    layout = variant.groups.layout
    _, micro_batch, sequence = variant.batch.tokens.shape
    return sequence // (layout.tp if layout.sequence_parallel else 1), micro_batch, variant.spec.hidden_size
