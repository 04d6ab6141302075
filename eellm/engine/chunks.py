"""This rank's model chunks: built from the plan, initialised, and for training wrapped for gradient reduction."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from eellm.mcore.cpu import cpu_stand_ins
from eellm.mcore.data_parallel import ReductionOptions, wrap
from eellm.mcore.groups import Groups
from eellm.mcore.parts import TransformerConfig, transformer_config
from eellm.model.initialise import initialise
from eellm.model.spec import ModelSpec, StageSpec, tied_stages
from eellm.model.stage import Stage


@dataclass(frozen=True)
class Chunks:
    """`plan` is the whole model's; `stages` are this rank's bare modules, `wrapped` the same behind megatron-core's
    DistributedDataParallel."""

    spec: ModelSpec
    plan: list[StageSpec]
    groups: Groups
    config: TransformerConfig
    stages: list[Stage]
    wrapped: list[Any]

    def zero_grad(self) -> None:
        for chunk in self.wrapped:
            chunk.zero_grad_buffer()

    def synchronise_parameters(self) -> None:
        """Finish gathering parameters that an overlapping optimizer left to the next forward pass."""
        for chunk in self.wrapped:
            if chunk.ddp_config.overlap_param_gather:
                chunk.start_param_sync(force_sync=True)


@dataclass(frozen=True)
class ChunkOptions:
    """How chunks are built; see the config's `precision`, `seed` and `trainer.recompute`."""

    dtype: str = "fp32"
    seed: int | None = 1
    """None: weights are loaded, nothing is initialised."""
    recompute: str = "none"
    reduction: ReductionOptions = field(default_factory=ReductionOptions)
    trainable: bool = True
    """False: no gradients and no buffers for them; the schedules then run the bare stages, forward only."""
    exits_only: bool = False
    """True: the backbone is frozen, and with it the output matrix that exits share with it."""


def build_stages(
    spec: ModelSpec, plan: list[StageSpec], groups: Groups, config: TransformerConfig, seed: int | None
) -> list[Stage]:
    """The stages that this rank holds. `plan` is the whole model's (`plan_stages`); `seed` None leaves values unset."""
    tied = tied_stages(spec, plan)
    stages = []
    for chunk, index in enumerate(groups.layout.stages_of(groups.pp_rank)):
        with cpu_stand_ins():
            stage = Stage(spec, plan[index], config, tied, groups.tp)
        stage.vp_stage = chunk if groups.layout.vp > 1 else None
        stage.to(groups.device)
        if seed is not None:
            initialise(stage, seed, groups.tp_rank)
        stages.append(stage)
    return stages


def build_chunks(spec: ModelSpec, plan: list[StageSpec], groups: Groups, options: ChunkOptions) -> Chunks:
    """All chunks of a rank, to train or to evaluate."""
    config = transformer_config(spec, groups.layout, options.dtype, on_cpu=groups.device.type == "cpu")
    stages = build_stages(spec, plan, groups, config, options.seed)
    for stage in stages:
        stage.set_recompute(options.recompute)
        stage.requires_grad_(options.trainable)
        if options.exits_only:
            stage.freeze_backbone()
    wrapped = wrap(stages, config, groups, options.reduction) if options.trainable else stages
    return Chunks(spec, plan, groups, config, stages, wrapped)
