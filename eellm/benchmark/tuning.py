"""What a step of tuning exits costs: against the backbone's forward pass up to the deepest exit and the exits alone, in time and
memory.

All times alternate within one run. Every number is the same on all ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from eellm.benchmark.exits_alone import exits_of
from eellm.benchmark.figure import Figure, megabytes, timed
from eellm.benchmark.live_memory import peak_bytes
from eellm.benchmark.paired_timing import CriticalPath, Work, alternate, median_interval
from eellm.benchmark.variants import random_batch
from eellm.config.schema import BenchmarkConfig, Config
from eellm.data.batch import GlobalBatch
from eellm.engine.chunks import ChunkOptions, build_chunks
from eellm.engine.tuned_exits import TuningObjective
from eellm.engine.tuning import TuningEngine
from eellm.mcore.cpu import cpu_stand_ins
from eellm.mcore.groups import Groups
from eellm.model.context import Context, training_context
from eellm.model.objective import HeadWeights, LossSums, ObjectiveOptions, head_weights
from eellm.model.spec import ModelSpec, StageSpec
from eellm.model.stage import Readout

TIME_TARGET = 1.1
"""A step may take this many times the backbone's forward pass and the exits alone."""


class PassingBy:
    """A head visitor that does nothing."""

    def at_exit(self, hidden: torch.Tensor, readout: Readout, context: Context) -> torch.Tensor:
        return hidden

    def at_final(self, hidden: torch.Tensor, readout: Readout, context: Context) -> torch.Tensor:
        return hidden.new_zeros(())


@dataclass(frozen=True)
class Tuning:
    """Exits of a spec that are ready to be tuned, and a batch. The optimizer is left out."""

    engine: TuningEngine
    weights: HeadWeights
    batch: GlobalBatch

    def step(self) -> None:
        self.engine.run(self.batch, self.weights)

    def backbone(self) -> None:
        """The forward pass of all microbatches up to the deepest exit, without exits."""
        self.engine.visit(self.batch, lambda *_: PassingBy())

    def exits(self) -> None:
        """Forward and backward of this rank's exits for all microbatches, on hidden states of the right shape."""
        engine, sums = self.engine, LossSums()
        hidden = self.hidden_states()
        with cpu_stand_ins(), torch.no_grad():
            for index in range(len(self.batch)):
                objective = TuningObjective(self.batch[index], self.weights, engine.options, sums, engine.grad_scale)
                for stage in engine.chunks.stages:
                    context = training_context(stage.spec, self.batch[index].positions, None, hidden.dtype)
                    for readout in exits_of(stage):
                        objective.at_exit(hidden, readout, context)

    def hidden_states(self) -> torch.Tensor:
        """[s, b, h] as layers hand them on, on one rank."""
        chunks = self.engine.chunks
        layout, (_, micro_batch, sequence) = chunks.groups.layout, self.batch.tokens.shape
        shape = (sequence // (layout.tp if layout.sequence_parallel else 1), micro_batch, chunks.spec.hidden_size)
        return torch.ones(shape, dtype=chunks.config.params_dtype, device=chunks.groups.device)


def build_tuning(config: Config, spec: ModelSpec, stages: list[StageSpec], groups: Groups) -> Tuning:
    """Called by all ranks; `spec` and `stages` are those of the tuned part of the model."""
    chunks = build_chunks(spec, stages, groups, ChunkOptions(config.precision.dtype, config.seed, exits_only=True))
    engine = TuningEngine(chunks, ObjectiveOptions(chunk=config.trainer.loss_chunk))
    return Tuning(engine, head_weights(config.loss_weights, spec, step=0), random_batch(config, spec, groups))


def tuning_figures(tuning: Tuning, options: BenchmarkConfig) -> list[Figure]:
    """Called by all ranks of the layout."""
    return time_figures(tuning, options) + memory_figures(tuning)


def time_figures(tuning: Tuning, options: BenchmarkConfig) -> list[Figure]:
    works: dict[str, Work] = {"step": tuning.step, "backbone": tuning.backbone, "exits": tuning.exits}
    clock = CriticalPath(tuning.engine.chunks.groups.device)
    seconds = alternate(works, clock.seconds, options.pairs, options.warmup)
    rounds = zip(seconds["step"], seconds["backbone"], seconds["exits"], strict=True)
    ratios = [step / (backbone + exits) for step, backbone, exits in rounds]
    return [
        timed("tuning/step", "tuning step", "s", median_interval(seconds["step"])),
        timed("tuning/backbone", "backbone, forward", "s", median_interval(seconds["backbone"])),
        timed("tuning/exits", "exits alone, forward and backward", "s", median_interval(seconds["exits"])),
        timed("tuning/ratio", "step / (backbone + exits)", "x", median_interval(ratios), TIME_TARGET),
    ]


def memory_figures(tuning: Tuning) -> list[Figure]:
    """Of the rank that needs most: no activation of the backbone may outlive its layer."""
    step, backbone, exits = largest([peak_bytes(work) for work in (tuning.step, tuning.backbone, tuning.exits)])
    return [
        megabytes("memory/tuning_step", "peak of a tuning step", step, backbone + exits),
        megabytes("memory/backbone", "peak of the backbone, forward", backbone),
        megabytes("memory/exits", "peak of the exits alone", exits),
    ]


def largest(sizes: Sequence[int]) -> list[int]:
    """Each the largest of all ranks'."""
    ranks: list[Sequence[int]] = [sizes] * dist.get_world_size()
    dist.all_gather_object(ranks, sizes)
    return [max(column) for column in zip(*ranks, strict=True)]
