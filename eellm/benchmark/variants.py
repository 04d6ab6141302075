"""The model of a run with its exits and without, side by side on the same ranks, and a batch for both."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from eellm.config.schema import Config, ScheduleConfig
from eellm.data.batch import GlobalBatch
from eellm.engine.chunks import ChunkOptions, Chunks, build_chunks
from eellm.engine.protocol import TrainingEngine
from eellm.engine.schedules import schedule_of, training_engine
from eellm.mcore.groups import Groups, group_of_holders
from eellm.model.objective import HeadWeights, ObjectiveOptions, head_weights
from eellm.model.spec import ModelSpec, StageSpec, tied_stages
from eellm.plan.iteration import with_ratio
from eellm.plan.times import stages_of
from eellm.schedule.program import Program


@dataclass(frozen=True)
class Variant:
    """A model that is ready to step. `run` is one training step without the optimizer; `program` is what its engine runs."""

    chunks: Chunks
    options: ObjectiveOptions
    engine: TrainingEngine
    program: Program
    weights: HeadWeights
    batch: GlobalBatch

    @property
    def spec(self) -> ModelSpec:
        return self.chunks.spec

    @property
    def groups(self) -> Groups:
        return self.chunks.groups

    def run(self) -> None:
        self.engine.run(self.batch, self.weights)


@dataclass(frozen=True)
class Variants:
    with_exits: Variant
    without_exits: Variant


def build_variants(config: Config, spec: ModelSpec, stages: list[StageSpec], groups: Groups) -> Variants:
    """Called by all ranks. Both have the same batch, the same weights where both have them, and the config's schedule; bubbles
    are filled with losses of exits, so without any the batch runs as 1F1B."""
    bare = replace(spec, exits=())
    bare_stages = stages_of(config, bare, groups.layout, config.parallel.layers_per_stage)
    # without exits the output matrix may have its copies on other stages
    bare_groups = replace(groups, tied=group_of_holders(groups.layout, tied_stages(bare, bare_stages)))
    batch = random_batch(config, spec, groups)
    schedule = with_ratio(config, spec.vocab_size)
    bare_schedule = schedule.model_copy(update={"name": "auto"}) if schedule.name == "bubble_filling" else schedule
    return Variants(
        with_exits=_variant(config, schedule, _build(config, spec, stages, groups), batch),
        without_exits=_variant(config, bare_schedule, _build(config, bare, bare_stages, bare_groups), batch),
    )


def _build(config: Config, spec: ModelSpec, stages: list[StageSpec], groups: Groups) -> Chunks:
    return build_chunks(spec, stages, groups, ChunkOptions(config.precision.dtype, config.seed, config.trainer.recompute))


def _variant(config: Config, schedule: ScheduleConfig, chunks: Chunks, batch: GlobalBatch) -> Variant:
    options = ObjectiveOptions(config.exits.deferred, config.trainer.loss_chunk)
    return Variant(
        chunks=chunks,
        options=options,
        engine=training_engine(schedule, chunks, options),
        program=schedule_of(schedule, chunks.groups.layout, chunks.plan)(len(batch)).program,
        weights=head_weights(config.loss_weights, chunks.spec, step=0),
        batch=batch,
    )


def random_batch(config: Config, spec: ModelSpec, groups: Groups) -> GlobalBatch:
    """Random tokens, all of which count: one optimizer step of this data-parallel rank."""
    layout, sequence = groups.layout, config.data.sequence_length
    shape = (layout.num_microbatches, layout.micro_batch_size, sequence)
    generator = torch.Generator().manual_seed(config.seed * layout.dp + groups.dp_rank)
    text = torch.randint(0, spec.vocab_size, (*shape[:2], sequence + 1), generator=generator)
    positions = torch.arange(sequence).expand(shape).contiguous()
    batch = GlobalBatch(text[..., :-1].contiguous(), text[..., 1:].contiguous(), torch.ones(shape), positions)
    return batch.to(groups.device)
