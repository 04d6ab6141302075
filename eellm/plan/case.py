"""A run that is planned: its model, layout and what of its config costs time or memory."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

from eellm.config.schema import Config, ScheduleConfig
from eellm.layout import ParallelLayout
from eellm.metrics.flops import Recompute
from eellm.model.spec import ModelSpec, StageSpec, build_layout, build_spec, tuned_spec
from eellm.plan import parameters
from eellm.plan.device import Device
from eellm.plan.memory import Shape, StaticMemory, static_memory
from eellm.plan.times import Split, Times, cut, shape_of, stage_costs, times_of
from eellm.schedule.costs import Costs
from eellm.schedule.program import ScheduleError


@dataclass(frozen=True)
class Case:
    """`layout` says how many devices there are. See the config's keys of the same names."""

    spec: ModelSpec
    layout: ParallelLayout
    device: Device
    shape: Shape
    schedule: ScheduleConfig
    split: Split
    boundary: str
    deferred: bool
    optimizer: Literal["adam", "sgd"]
    distributed: bool
    overlap: bool
    tunes: bool = False
    """Exits alone are trained: `spec` ends where they do."""

    @classmethod
    def of(cls, config: Config, vocab_size: int) -> Case:
        spec, layout, tunes = build_spec(config, vocab_size), build_layout(config), config.plan.task == "tune"
        if tunes:
            spec = tuned_spec(spec, config.tuning.layers or spec.exit_layers, whole=config.tuning.runs_whole_model)
        return cls(
            spec=spec,
            layout=layout,
            device=Device.of(config.device_profile, config.precision.dtype),
            shape=shape_of(config, layout),
            schedule=config.schedule,
            split=config.parallel.layers_per_stage,
            boundary=config.exits.boundary,
            deferred=config.exits.deferred,
            optimizer=config.optimizer.name,
            distributed=config.optimizer.distributed,
            overlap=config.optimizer.overlap_grad_reduce,
            tunes=tunes,
        )

    @cached_property
    def stages(self) -> list[StageSpec]:
        """Raises ScheduleError where the layers cannot be cut so."""
        layers, count = self.spec.built_layers, self.layout.num_stages
        if count > layers:
            raise ScheduleError(f"{layers} layers make no {count} stages")
        if self.split is None and layers % count and not self.tunes:
            raise ScheduleError(
                f"{layers} layers make no {count} equal stages; parallel.layers_per_stage=balance cuts them anyway"
            )
        return cut(self.spec, self.layout, self.split, self.boundary, self.shape, self.device)

    @property
    def times(self) -> Times:
        """Raises ScheduleError where the device profile has others."""
        return times_of(self.spec, self.shape, self.device)

    @cached_property
    def costs(self) -> Costs:
        """Of all stages, with the way between them."""
        own = [stage_costs(self.spec, self.shape, self.times, part) for part in self.stages]
        if self.tunes:  # nothing below an exit is back-propagated, or kept
            own = [replace(stage, backward=0.0, weight=0.0, kept_bytes=0.0, working_bytes=0.0) for stage in own]
        return Costs(own, self.deferred, self.device.latency, self.device.hop(self.layout), self.tunes)

    @property
    def exit_stages(self) -> list[int]:
        return [stage.index for stage in self.stages if stage.exits]

    @property
    def num_microbatches(self) -> int:
        """Raises ScheduleError where microbatches and replicas do not divide the batch."""
        batch, step = self.layout.global_batch_size, self.layout.micro_batch_size * self.layout.dp
        if batch % step:
            replicas = f"micro-batches of {self.layout.micro_batch_size} on {self.layout.dp} replicas"
            raise ScheduleError(f"{replicas} make {step} sequences, which do not divide the batch of {batch}")
        return batch // step

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.layout.global_batch_size * self.shape.sequence

    def static(self, rank: int) -> StaticMemory:
        """Of one device of a pipeline rank."""
        spec, tp = self.spec, self.layout.tp
        stages = [self.stages[index] for index in self.layout.stages_of(rank)]
        held = sum(parameters.stage(spec, stage, tp) for stage in stages)
        trained = sum(parameters.head(spec, exit_, tp) for stage in stages for exit_ in stage.exits) if self.tunes else held
        return static_memory(held, self.shape.dtype, self.optimizer, self.layout.dp if self.distributed else 1, trained)

    def with_layout(self, layout: ParallelLayout, split: Split = None, recompute: Recompute | None = None) -> Case:
        """The same run, laid out otherwise."""
        shape = replace(
            self.shape,
            micro_batch=layout.micro_batch_size,
            tp=layout.tp,
            sequence_parallel=layout.sequence_parallel,
            recompute=recompute or self.shape.recompute,
        )
        return replace(self, layout=layout, shape=shape, split=split)

    def on(self, devices: int) -> Case:
        """On so many devices: what tensor and pipeline parallelism leave of them are replicas. Raises ScheduleError."""
        model = self.layout.tp * self.layout.pp
        if devices % model:
            raise ScheduleError(f"{devices} devices are no multiple of tp x pp = {self.layout.tp} x {self.layout.pp} = {model}")
        return replace(self, layout=replace(self.layout, dp=devices // model))
