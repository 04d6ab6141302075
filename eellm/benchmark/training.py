"""What exits cost a training step: time on the critical path, memory, and both against the loss written plainly.

All times alternate within one run. Every number is the same on all ranks.
"""

from __future__ import annotations

from collections.abc import Sequence

from eellm.benchmark.exits_alone import ExitsAlone
from eellm.benchmark.figure import Figure, megabytes, timed
from eellm.benchmark.live_memory import peak_bytes
from eellm.benchmark.paired_timing import CriticalPath, Work, alternate, median_interval
from eellm.benchmark.plain_loss import LossAlone
from eellm.benchmark.step_memory import FirstStage, step_memory
from eellm.benchmark.variants import Variant, Variants
from eellm.config.schema import BenchmarkConfig
from eellm.engine.executor import ProgramEngine
from eellm.engine.megatron import MegatronEngine
from eellm.engine.schedules import pipeline_schedule

TIME_TARGET = 1.05
"""A step may take this much more than the exits' own time longer than a step without them."""


def training_figures(variants: Variants, options: BenchmarkConfig) -> list[Figure]:
    """Called by all ranks of the layout. The plain loss is compared where the whole model lies on one rank."""
    layout = variants.with_exits.groups.layout
    figures = time_figures(variants, options) + memory_figures(variants)
    if FirstStage.depth(variants.with_exits.spec):
        figures += growth_figures(variants.with_exits, options.in_flight)
    if layout.pp > 1 and isinstance(variants.with_exits.engine, MegatronEngine):
        figures += executor_figures(variants.with_exits, options)
    if layout.num_stages == layout.tp == 1:
        figures += plain_figures(variants.with_exits, options)
    return figures


def time_figures(variants: Variants, options: BenchmarkConfig) -> list[Figure]:
    """Time with exits minus time without, against the exits alone (of the rank whose exits take longest)."""
    works: dict[str, Work] = {
        "with": variants.with_exits.run,
        "without": variants.without_exits.run,
        "alone": ExitsAlone(variants.with_exits).run,
    }
    clock = CriticalPath(variants.with_exits.groups.device)
    seconds = alternate(works, clock.seconds, options.pairs, options.warmup)
    added = [with_ - without for with_, without in zip(seconds["with"], seconds["without"], strict=True)]
    return [
        timed("time/with_exits", "step with exits", "s", median_interval(seconds["with"])),
        timed("time/without_exits", "step without exits", "s", median_interval(seconds["without"])),
        timed("time/added", "difference", "s", median_interval(added)),
        timed("time/exits_alone", "exits alone", "s", median_interval(seconds["alone"])),
        timed("time/ratio", "difference / exits alone", "x", median_interval(_ratios(added, seconds["alone"])), TIME_TARGET),
    ]


def executor_figures(variant: Variant, options: BenchmarkConfig) -> list[Figure]:
    """megatron-core's schedule of the layout against the executor that runs it as a program, on the same chunks."""
    chunks = variant.chunks
    executor = ProgramEngine(chunks, variant.options, pipeline_schedule(chunks.groups.layout))
    works: dict[str, Work] = {"megatron": variant.run, "executor": lambda: executor.run(variant.batch, variant.weights)}
    seconds = alternate(works, CriticalPath(chunks.groups.device).seconds, options.pairs, options.warmup)
    ratios = _ratios(seconds["executor"], seconds["megatron"])
    return [
        timed("executor/time", "step of the executor", "s", median_interval(seconds["executor"])),
        timed("executor/ratio", "executor / megatron-core's schedule", "x", median_interval(ratios), TIME_TARGET),
    ]


def memory_figures(variants: Variants) -> list[Figure]:
    memory = step_memory(variants)
    return [
        megabytes("memory/with_exits", "peak of a step with exits", memory.with_exits),
        megabytes("memory/without_exits", "peak of a step without exits", memory.without_exits),
        megabytes("memory/added", "difference of the peaks", memory.added),
        megabytes("memory/added_to_rank", "most added to a rank", memory.nearest.added, memory.nearest.allowance),
    ]


def growth_figures(variant: Variant, in_flight: int) -> list[Figure]:
    """What a further microbatch in flight costs on a first stage that ends in an exit."""
    stage = FirstStage(variant)
    deferred, eager = (stage.growth(value, in_flight) for value in (True, False))
    return [
        megabytes("memory/growth_deferred", "exits, per microbatch in flight", deferred, stage.hidden_bytes),
        megabytes("memory/growth_eager", "... with exits.deferred=false", eager),
    ]


def plain_figures(variant: Variant, options: BenchmarkConfig) -> list[Figure]:
    """One microbatch's whole loss, forward and backward, against the same in plain PyTorch."""
    loss = LossAlone(variant)
    works: dict[str, Work] = {"ours": loss.ours, "plain": loss.plain}
    seconds = alternate(works, CriticalPath(variant.groups.device).seconds, options.pairs, options.warmup)
    ours, plain = (peak_bytes(work) for work in works.values())
    ratios = _ratios(seconds["ours"], seconds["plain"])
    return [
        timed("plain/time", "loss in plain PyTorch", "s", median_interval(seconds["plain"])),
        timed("plain/time_ours", "loss, ours", "s", median_interval(seconds["ours"])),
        timed("plain/time_ratio", "ours / plain", "x", median_interval(ratios), 1.0),
        megabytes("plain/memory", "peak of the loss in plain PyTorch", plain),
        megabytes("plain/memory_ours", "peak of the loss, ours", ours, plain),
    ]


def _ratios(numerators: Sequence[float], denominators: Sequence[float]) -> list[float]:
    return [above / below for above, below in zip(numerators, denominators, strict=True)]
