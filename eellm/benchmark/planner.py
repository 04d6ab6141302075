"""The planner against a run: the parts of a training step, timed on this machine, and what they predict of the whole.

Passes are recorded while the executor runs the layout's program on all ranks, so that ranks disturb each other as in training;
steps of the run's own engine alternate with them. Every number is the same on all ranks.
"""

from __future__ import annotations

import os
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import psutil
import torch
import torch.distributed as dist

from eellm.benchmark.figure import Figure, timed
from eellm.benchmark.paired_timing import CriticalPath, Work, alternate, median_interval
from eellm.benchmark.variants import random_batch
from eellm.config.planning import DeviceProfileConfig, TimedPassesConfig
from eellm.config.schema import Config
from eellm.data.batch import GlobalBatch
from eellm.engine.chunks import ChunkOptions, Chunks, build_chunks
from eellm.engine.executor import ProgramEngine
from eellm.engine.protocol import Engine
from eellm.engine.schedules import pipeline_schedule, training_engine
from eellm.mcore.data_parallel import ReductionOptions
from eellm.mcore.groups import Groups
from eellm.mcore.optimizer import MegatronOptimizer
from eellm.metrics.flops import layer_flops
from eellm.model.objective import HeadWeights, ObjectiveOptions, head_weights
from eellm.model.spec import ModelSpec, StageSpec
from eellm.plan.case import Case
from eellm.plan.iteration import Iteration, chosen_schedule, iterate, with_ratio
from eellm.plan.memory import hidden_bytes
from eellm.plan.times import kind_of, moved_by_the_optimizer, setting, shape_of
from eellm.schedule.costs import EMBEDDING, LAYERS
from eellm.schedule.measured import Recorded
from eellm.schedule.program import COMMUNICATION, FORWARDS, Program

ERROR_TARGET = 0.15
"""A step may take so much more or less than predicted, as a share of what it takes."""
ROUND_TRIPS = 20
_GIB = 1024**3

Passes = dict[str, tuple[list[float], list[float]]]
"""Seconds of forward and backward passes by what was passed: a layer, the embedding, a kind of head."""


@dataclass
class Training:
    """Whole steps of a run, optimizer included, on this rank's chunks."""

    chunks: Chunks
    engine: Engine
    optimizer: MegatronOptimizer
    weights: HeadWeights
    batch: GlobalBatch
    options: ObjectiveOptions
    events: list[Recorded] = field(default_factory=list)

    def step(self) -> None:
        self.engine.run(self.batch, self.weights)
        self.update()

    def update(self) -> None:
        self.optimizer.step()
        self.chunks.zero_grad()
        self.optimizer.zero_grad()

    def recorded_step(self) -> None:
        """Nothing is deferred, so that exits' forward and backward passes are told apart."""
        layout = self.chunks.groups.layout
        executor = ProgramEngine(self.chunks, replace(self.options, deferred=False), pipeline_schedule(layout))
        executor.recorder = self.events.append
        executor.run(self.batch, self.weights)


def build_training(config: Config, spec: ModelSpec, stages: list[StageSpec], groups: Groups) -> Training:
    """Called by all ranks."""
    adam = config.optimizer
    reduction = ReductionOptions(adam.distributed, adam.overlap_grad_reduce, adam.overlap_param_gather)
    options = ObjectiveOptions(config.exits.deferred, config.trainer.loss_chunk)
    chunks = build_chunks(
        spec, stages, groups, ChunkOptions(config.precision.dtype, config.seed, config.trainer.recompute, reduction)
    )
    optimizer = MegatronOptimizer(adam, config.precision, chunks.wrapped, chunks.config)
    engine = training_engine(with_ratio(config, spec.vocab_size), chunks, options)
    engine.grad_scale = optimizer.loss_scale
    weights = head_weights(config.loss_weights, spec, step=0)
    return Training(chunks, engine, optimizer, weights, random_batch(config, spec, groups), options)


def compared(config: Config, training: Training, program: Program | None) -> tuple[list[Figure], DeviceProfileConfig]:
    """Figures and the measured profile; called by all ranks of the layout. `program` is that of schedule=csv."""
    clock, options = CriticalPath(training.chunks.groups.device), config.benchmark
    works: dict[str, Work] = {"step": training.step, "update": training.update, "passes": training.recorded_step}
    seconds = alternate(works, clock.seconds, options.pairs, options.warmup)
    passes = everybodys(passes_of(training.chunks, training.events))
    profile = measured_profile(config, training, passes, statistics.median(seconds["update"]))
    planned = predicted(config, profile, training.chunks.spec.vocab_size, program)
    errors = [abs(planned.time / each - 1) for each in seconds["step"]]
    figures = [
        Figure("plan/step", "step, predicted", "s", planned.time, note="from the passes below, by the simulator"),
        timed("plan/measured", "step, measured", "s", median_interval(seconds["step"])),
        timed("plan/error", "|predicted / measured - 1|", "x", median_interval(errors), ERROR_TARGET),
        Figure("plan/bubble", "bubble, predicted", "x", planned.timeline.bubble),
        timed("pass/update", "optimizer", "s", median_interval(seconds["update"])),
    ]
    for part, both in passes.items():
        for direction, values in zip(("forward", "backward"), both, strict=True):
            name = f"pass/{part}_{direction}".replace(", ", "_").replace(" ", "_")
            figures.append(timed(name, f"{part}, {direction}", "s", median_interval(values)))
    return figures, profile


def passes_of(chunks: Chunks, events: list[Recorded]) -> Passes:
    """Of this rank's stages. What comes with a stage besides its layers counts as theirs."""
    found: Passes = defaultdict(lambda: ([], []))
    kinds = {exit_.name: kind_of(exit_) for exit_ in chunks.spec.exits} | {"final": kind_of(None), EMBEDDING: EMBEDDING}
    for event in events:
        if event.action.kind in COMMUNICATION:
            continue
        layers, backward = chunks.stages[event.action.chunk].stage_spec.num_layers, event.action.kind not in FORWARDS
        found["layer"][backward].append(sum(length for name, length in event.parts if name == LAYERS) / layers)
        for name, length in event.parts:
            if name != LAYERS:
                found[kinds[name]][backward].append(length)
    return dict(found)


def everybodys(passes: Passes) -> Passes:
    """All ranks' together."""
    ranks: list[Passes] = [passes] * dist.get_world_size()
    dist.all_gather_object(ranks, passes)
    found: Passes = defaultdict(lambda: ([], []))
    for own in ranks:
        for name, both in own.items():
            for all_, values in zip(found[name], both, strict=True):
                all_ += values
    return dict(found)


def measured_profile(config: Config, training: Training, passes: Passes, update: float) -> DeviceProfileConfig:
    """What is not timed is derived: FLOP/s from a layer's forward pass, bandwidth of memory from the optimizer."""
    chunks, layout = training.chunks, training.chunks.groups.layout
    shape, spec = shape_of(config, layout), training.chunks.spec
    medians = {name: [statistics.median(values) if values else 0.0 for values in both] for name, both in passes.items()}
    latency, bandwidth = message_times(hidden_bytes(spec, shape), chunks.groups)
    case = Case.of(config, spec.vocab_size)
    moved = max(moved_by_the_optimizer(case.static(rank), layout.dp if case.distributed else 1) for rank in range(layout.pp))
    reached = layer_flops(spec, shape.sequence) * shape.tokens / layout.tp / medians["layer"][0] / 1e12
    name, memory, count = machine(chunks.groups.device)
    return DeviceProfileConfig(
        name=name,
        half_teraflops=reached,
        fp32_teraflops=reached,
        efficiency=1.0,
        memory=memory / _GIB,
        reserved=0.0,
        memory_bandwidth=moved / update / 1e9,
        link_bandwidth=(bandwidth or moved / update) / 1e9,
        network_bandwidth=(bandwidth or moved / update) / 1e9,
        latency=latency * 1e6,
        per_node=count,
        timed=TimedPassesConfig(
            layer=medians["layer"],
            embedding=medians.get(EMBEDDING, [0.0, 0.0]),
            heads={kind: both for kind, both in medians.items() if kind not in ("layer", EMBEDDING)},
            setting=setting(spec, shape),
        ),
    )


def machine(device: torch.device) -> tuple[str, float, int]:
    """(name, bytes of memory of a device, devices)."""
    if device.type == "cuda":
        found = torch.cuda.get_device_properties(device)
        return found.name, float(found.total_memory), torch.cuda.device_count()
    cores = os.cpu_count() or 1
    return f"CPU, threads a rank: {torch.get_num_threads()}", psutil.virtual_memory().total / dist.get_world_size(), cores


def message_times(size: int, groups: Groups) -> tuple[float, float | None]:
    """(latency in seconds, bytes/s of a message of `size` bytes) between the first two pipeline ranks, of the slowest pair;
    nothing on a single rank."""
    if groups.layout.pp == 1:
        return 0.0, None
    both = tuple(_there_and_back(torch.zeros(count, dtype=torch.uint8, device=groups.device), groups) for count in (1, size))
    times: list[Any] = [both] * dist.get_world_size()
    dist.all_gather_object(times, both)
    latency, whole = (max(found[index] for found in times) / 2 for index in (0, 1))
    return latency, size / max(whole - latency, 1e-9)


def _there_and_back(tensor: torch.Tensor, groups: Groups) -> float:
    """Seconds, the median of some; 0 on ranks that do not take part."""
    times = []
    for _ in range(ROUND_TRIPS if groups.pp_rank < 2 else 0):
        began = time.perf_counter()
        ways: list[Callable[..., Any]] = [dist.send, dist.recv]
        for way in ways if groups.pp_rank == 0 else reversed(ways):
            peer = {"group_dst" if way is dist.send else "group_src": 1 - groups.pp_rank}
            way(tensor, group=groups.pp, **peer)
        if groups.device.type == "cuda":
            torch.cuda.synchronize(groups.device)
        times.append(time.perf_counter() - began)
    dist.barrier()
    return statistics.median(times) if times else 0.0


def predicted(config: Config, profile: DeviceProfileConfig, vocab_size: int, program: Program | None) -> Iteration:
    """What task=plan says of the config with the profile."""
    case = Case.of(config.model_copy(update={"device_profile": profile}), vocab_size)
    return iterate(case, chosen_schedule(config), program)
