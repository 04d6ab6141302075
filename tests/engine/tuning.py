"""Runs on forked ranks: steps that tune exits, with whole gradients and updated values by global name to compare."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from eellm.benchmark.live_memory import peak_bytes
from eellm.data.batch import GlobalBatch
from eellm.engine.chunks import ChunkOptions, Chunks, build_chunks
from eellm.engine.distillation import Distillation
from eellm.engine.hidden_cache import HiddenStates
from eellm.engine.tuning import TuningEngine
from eellm.mcore.groups import init_groups
from eellm.model.objective import HeadWeights
from eellm.model.spec import ModelSpec, plan_stages, tied_stages, tuned_spec
from tests.engine.layouts import GLOBAL_BATCH, MICRO, SEED, SEQUENCE, Case, global_batch, optimizer_of, pieces_of


def tuned(spec: ModelSpec, layers: list[int] | None = None, whole: bool = False) -> ModelSpec:
    return tuned_spec(spec, layers or spec.exit_layers, whole)


def build_tuning(case: Case) -> Chunks:
    plan = plan_stages(case.spec, case.parallel, list(case.layers_per_stage) if case.layers_per_stage else None, case.boundary)
    groups = init_groups(case.parallel, torch.device("cpu"), tied_stages(case.spec, plan))
    options = ChunkOptions(case.dtype, SEED, case.recompute, case.reduction, exits_only=True)
    return build_chunks(case.spec, plan, groups, options)


def tuning_steps(
    rank: int, case: Case, steps: int = 1, weights: HeadWeights | None = None, distillation: Distillation | None = None
) -> dict[str, Any]:
    """Losses and gradients of the last of some steps, and the parameters before the first and after the last."""
    chunks = build_tuning(case)
    optimizer = optimizer_of(case, chunks, [exit_.name for exit_ in case.spec.exits])
    engine = TuningEngine(chunks, case.options, distillation)
    engine.grad_scale = optimizer.loss_scale
    batch = global_batch(case, chunks.groups.dp_rank, case.parallel.dp)
    weights = weights or case.weights
    before = pieces_of(case, chunks, optimizer)
    for _ in range(steps):
        chunks.zero_grad()
        optimizer.zero_grad()
        losses = engine.run(batch, weights)
        pieces = pieces_of(case, chunks, optimizer)
        result = optimizer.step()
    return {
        "losses": losses,
        "validation": engine.run(batch, weights, forward_only=True),
        "pieces": pieces,
        "before": before,
        "after": pieces_of(case, chunks, optimizer),
        "grad_norm": result.grad_norm,
        "held": sum(parameter.numel() for group in optimizer.param_groups for parameter in group["params"]),
        "layers": [name for stage in chunks.stages for name in stage.layers._modules],
    }


def peaks_of_distilling(rank: int, case: Case) -> list[int]:
    """Bytes that a step makes and holds at most, with half of the microbatches and with all."""
    engine = TuningEngine(build_tuning(case), case.options, Distillation(0.5, 2.0))
    batch = global_batch(case)
    half = GlobalBatch(*(None if part is None else part[: len(batch) // 2] for part in vars(batch).values()))
    engine.run(batch, case.weights)
    return [peak_bytes(partial(engine.run, part, case.weights)) for part in (half, batch)]


def steps_from_kept_states(rank: int, case: Case, folder: str, dtype: str) -> dict[str, Any]:
    """Gradients of a step that passes the backbone and keeps hidden states, and of one that may not pass it."""
    chunks = build_tuning(case)
    optimizer = optimizer_of(case, chunks)
    engine = TuningEngine(chunks, case.options)
    layout, batch = case.parallel, global_batch(case, chunks.groups.dp_rank, case.parallel.dp)
    batch.sample_ids = torch.arange(GLOBAL_BATCH).view(-1, MICRO)[chunks.groups.dp_rank :: layout.dp]
    length = SEQUENCE // (layout.tp if layout.sequence_parallel else 1)
    engine.hidden_states = HiddenStates(Path(folder), dtype, GLOBAL_BATCH, (length, case.spec.hidden_size), chunks.groups)
    results = {}
    for name in ("passing", "kept"):
        chunks.zero_grad()
        losses = engine.run(batch, case.weights)
        results[name] = pieces_of(case, chunks, optimizer)
        results[f"{name}_losses"] = losses.means
        for stage in chunks.stages:
            stage.forward = None  # type: ignore[assignment]
    return results


def only(case: Case, layer: int) -> Case:
    """The case with one of its exits alone."""
    return replace(case, spec=tuned(case.spec, [layer]))
