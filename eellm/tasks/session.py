"""What every task opens and closes around its work: process group, parallel groups, the metrics record."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from eellm.config.schema import Config
from eellm.layout import ParallelLayout
from eellm.mcore.groups import PATIENCE, Groups, destroy_groups, init_groups, init_process_group, pick_device
from eellm.metrics.recorder import Recorder, open_recorder
from eellm.model.spec import ModelSpec, StageSpec, build_layout, build_spec, tied_stages, tuned_spec
from eellm.plan.times import stages_of
from eellm.preemption import Preempted
from eellm.tasks.context import TaskContext


def is_main_rank() -> bool:
    """Before there is a process group."""
    return int(os.environ.get("RANK", 0)) == 0


@dataclass(frozen=True)
class Plan:
    """The model and where its parts lie."""

    spec: ModelSpec
    layout: ParallelLayout
    stages: list[StageSpec]

    @classmethod
    def of(cls, config: Config, vocab_size: int) -> Plan:
        spec, layout = build_spec(config, vocab_size), build_layout(config)
        return cls(spec, layout, stages_of(config, spec, layout, config.parallel.layers_per_stage))

    @classmethod
    def of_tuning(cls, config: Config, vocab_size: int) -> Plan:
        """The exits that are tuned and the layers below them, or where exits learn from the final head the whole model."""
        spec, layout = build_spec(config, vocab_size), build_layout(config)
        spec = tuned_spec(spec, config.tuning.layers or spec.exit_layers, whole=config.tuning.runs_whole_model)
        return cls(spec, layout, stages_of(config, spec, layout, config.parallel.layers_per_stage))

    @classmethod
    def around_tuning(cls, config: Config, vocab_size: int) -> Plan:
        """All layers and all exits, before tuning and after: `parallel.layers_per_stage` is about those that tuning runs."""
        spec, layout = build_spec(config, vocab_size), build_layout(config)
        return cls(spec, layout, stages_of(config, spec, layout, None))


@contextlib.contextmanager
def process_group(config: Config, alone: bool = False, timeout_minutes: float = PATIENCE) -> Iterator[torch.device]:
    """Join the ranks of the run, or with `alone` form a group of this rank only."""
    device = pick_device(config.device)
    init_process_group(device, alone, timeout_minutes)
    try:
        yield device
    finally:
        destroy_groups()


@contextlib.contextmanager
def groups_of(plan: Plan, device: torch.device, seed: int, timeout_minutes: float = PATIENCE) -> Iterator[Groups]:
    """Parallel groups of a plan, inside a process group."""
    groups = init_groups(plan.layout, device, tied_stages(plan.spec, plan.stages), seed, timeout_minutes)
    try:
        yield groups
    finally:
        destroy_groups(process_group=False)


@contextlib.contextmanager
def recording(context: TaskContext, resume_step: int | None = None) -> Iterator[tuple[Recorder, dict[str, float]]]:
    """The run's record and the final scalars, to be filled; closed with how the run ended."""
    recorder = open_recorder(context.config, context.run_dir, is_main_rank(), resume_step)
    final: dict[str, float] = {}
    try:
        yield recorder, final
    except (Preempted, KeyboardInterrupt):
        recorder.close(final, "preempted")
        raise
    except BaseException:
        recorder.close(final, "failed")
        raise
    recorder.close(final, "done")
