"""Runs on forked ranks: models and optimizer states loaded, saved and refused without training; whole tensors to compare."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from eellm.data.corpus import prepare_corpus
from eellm.engine.chunks import ChunkOptions, Chunks, build_chunks
from eellm.errors import CheckpointError, WriteError
from eellm.mcore.checkpoint import load, load_model_state, model_state
from eellm.mcore.checkpoint_writer import CheckpointWriter
from eellm.mcore.data_parallel import ReductionOptions
from eellm.mcore.groups import init_groups
from eellm.mcore.optimizer import MegatronOptimizer
from eellm.model.spec import tied_stages
from eellm.quiet import quiet_dependencies
from eellm.tasks.session import Plan
from eellm.train.warm_start import warm_start
from tests.train.fitting import BASE
from tests.workers import composed


@dataclass(frozen=True)
class Model:
    chunks: Chunks
    optimizer: MegatronOptimizer

    def state(self, is_loading: bool = False) -> dict:
        model = model_state(self.chunks.stages)
        return {**model, "optimizer": self.optimizer.sharded_state(model, is_loading)}


def build(overrides: list[str], cache: str) -> Model:
    """A freshly initialised model and its optimizer on the layout of the overrides."""
    quiet_dependencies()
    config = composed([*BASE, f"data.cache_dir={cache}", *overrides])
    plan = Plan.of(config, prepare_corpus(config).vocab_size)
    groups = init_groups(plan.layout, torch.device("cpu"), tied_stages(plan.spec, plan.stages))
    options = ChunkOptions(config.precision.dtype, config.seed, reduction=ReductionOptions(config.optimizer.distributed))
    chunks = build_chunks(plan.spec, plan.stages, groups, options)
    return Model(chunks, MegatronOptimizer(config.optimizer, config.precision, chunks.wrapped, chunks.config))


def reshard(rank: int, overrides: list[str], cache: str, source: str, target: str) -> int:
    """Load everything on one layout and save it from there; returns the optimizer's count of steps."""
    model = build(overrides, cache)
    loaded = load(Path(source), model.state(is_loading=True))
    load_model_state(model.chunks.stages, loaded)
    model.optimizer.load_state(model_state(model.chunks.stages), loaded["optimizer"])
    CheckpointWriter().save(Path(target), model.state())
    return loaded["optimizer"]["0"]["step"]


def save_initial(rank: int, overrides: list[str], cache: str, target: str, start_from: str | None = None) -> str:
    """Save a model as it is before its first step; returns what a warm start says."""
    model = build(overrides, cache)
    said = ""
    if start_from is not None:
        said = str(warm_start(Path(start_from), model.chunks.stages, model.chunks.spec))
        model.optimizer.reload_parameters()
    CheckpointWriter().save(Path(target), model.state())
    return said


def refusal(rank: int, overrides: list[str], cache: str, source: str, warm: bool = False) -> str:
    """How loading fails on this rank."""
    model = build(overrides, cache)
    try:
        if warm:
            warm_start(Path(source), model.chunks.stages, model.chunks.spec)
        else:
            load(Path(source), model.state(is_loading=True))
    except CheckpointError as error:
        return str(error)
    return "loaded"


def interrupted_write(rank: int, overrides: list[str], cache: str, target: str) -> tuple[str, list[str]]:
    """Kill the process that writes in the background; what the rank is told, and what lies there then."""
    model = build(overrides, cache)
    writer = CheckpointWriter(in_background=True)
    ballast = torch.nn.Parameter(torch.zeros(32_000_000))  # long enough to be caught writing
    name, stage = "ballast", model.chunks.stages[0]
    stage.register_parameter(name, ballast)
    writer.save(Path(target), model_state(model.chunks.stages))
    os.kill(writer._queue.async_calls[0].async_caller.process.pid, signal.SIGKILL)
    there = sorted(path.name for path in Path(target).parent.iterdir())
    try:
        writer.finish(wait=True)
    except WriteError as error:
        return str(error), there
    return "written", there


def whole_tensors(checkpoint: Path, scratch: Path) -> dict[str, torch.Tensor]:
    """Global name -> whole tensor, read by torch alone."""
    dcp_to_torch_save(checkpoint, scratch / "whole.pt")
    state = torch.load(scratch / "whole.pt", weights_only=False)
    return {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}
