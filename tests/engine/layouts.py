"""Runs on forked ranks: one step of a model on a layout, returning whole gradients by global name to compare with the oracle."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist

from eellm.config.schema import OptimizerConfig, PrecisionConfig, ScheduleConfig
from eellm.data.batch import GlobalBatch
from eellm.engine.chunks import ChunkOptions, Chunks, build_chunks
from eellm.engine.executor import ProgramEngine
from eellm.engine.megatron import MegatronEngine
from eellm.engine.schedules import schedule_of
from eellm.layout import ParallelLayout
from eellm.mcore.data_parallel import ReductionOptions
from eellm.mcore.groups import init_groups
from eellm.mcore.optimizer import MegatronOptimizer
from eellm.model.objective import HeadWeights, ObjectiveOptions
from eellm.model.spec import ExitSpec, ModelSpec, plan_stages, tied_stages

SEED, SEQUENCE, GLOBAL_BATCH, MICRO = 7, 16, 8, 1


def tiny_spec(**changes) -> ModelSpec:
    values = {
        "num_layers": 4,
        "hidden_size": 32,
        "num_heads": 4,
        "num_query_groups": 2,
        "head_dim": 8,
        "ffn_hidden_size": 64,
        "vocab_size": 61,
        "padded_vocab_size": 64,
        "max_positions": SEQUENCE,
        "exits": (ExitSpec(1), ExitSpec(2), ExitSpec(3)),
        "init_std": 0.1,
    }
    return ModelSpec(**(values | changes))


@dataclass(frozen=True)
class Case:
    """One point of the matrix: what is trained, on which layout, how."""

    spec: ModelSpec
    layout: dict = field(default_factory=dict)
    layers_per_stage: tuple[int, ...] | None = None
    boundary: str = "end"
    options: ObjectiveOptions = field(default_factory=lambda: ObjectiveOptions(chunk=11))
    recompute: str = "none"
    reduction: ReductionOptions = field(default_factory=ReductionOptions)
    dtype: str = "fp32"
    unmasked: int | None = None
    documents: bool = False
    token_confidence: bool = False
    schedule: str | None = None
    """None: megatron-core's own engine; else a schedule that the executor runs."""
    fill: tuple[int | None, int | None] = (None, None)
    identical: bool = False
    """All microbatches are the same one."""

    @property
    def parallel(self) -> ParallelLayout:
        return ParallelLayout(**self.layout, micro_batch_size=MICRO, global_batch_size=GLOBAL_BATCH)

    @property
    def weights(self) -> HeadWeights:
        values = {name: 0.3 + 0.2 * index for index, name in enumerate(self.spec.heads)}
        return HeadWeights(values, self.token_confidence)


def global_batch(case: Case, dp_rank: int = 0, dp: int = 1) -> GlobalBatch:
    """The data of one data-parallel rank; with dp = 1 all of it. Microbatch m of rank r is number m * dp + r."""
    generator = torch.Generator().manual_seed(3)
    rows = GLOBAL_BATCH // MICRO
    text = torch.randint(0, case.spec.vocab_size, (rows, MICRO, SEQUENCE + 1), generator=generator)
    mask = torch.ones(rows, MICRO, SEQUENCE)
    if case.unmasked is not None:  # a fixed number of tokens that count, spread unevenly over the batch
        mask.zero_()
        chosen = torch.randperm(mask.numel(), generator=generator)[: case.unmasked]
        mask.view(-1)[chosen] = 1.0
    positions = torch.arange(SEQUENCE).expand(rows, MICRO, -1).clone()
    documents = None
    if case.documents:
        cut = torch.randint(1, SEQUENCE, (rows, MICRO, 1), generator=generator)
        documents = (positions >= cut).to(torch.int32)
        positions = torch.where(positions >= cut, positions - cut, positions)
    if case.identical:
        text, mask = text[:1].expand_as(text), mask[:1].expand_as(mask)
    parts = (text[..., :-1], text[..., 1:], mask, positions, documents)
    return GlobalBatch(*(None if part is None else part[dp_rank::dp].contiguous() for part in parts))


def build(case: Case, rank: int) -> Chunks:
    plan = plan_stages(case.spec, case.parallel, list(case.layers_per_stage) if case.layers_per_stage else None, case.boundary)
    groups = init_groups(case.parallel, torch.device("cpu"), tied_stages(case.spec, plan))
    options = ChunkOptions(case.dtype, SEED, case.recompute, case.reduction)
    return build_chunks(case.spec, plan, groups, options)


def optimizer_of(case: Case, chunks: Chunks, clipped_apart: Sequence[str] = ()) -> MegatronOptimizer:
    """Adam that clips, as training uses it; fp16 starts with a loss scale whose sums over tokens it can hold."""
    adam = OptimizerConfig(
        name="adam",
        lr=1e-3,
        beta1=0.9,
        beta2=0.95,
        eps=1e-8,
        momentum=0.0,
        weight_decay=0.1,
        clip_grad=1.0,
        distributed=case.reduction.distributed_optimizer,
        overlap_grad_reduce=case.reduction.overlap_grad_reduce,
        overlap_param_gather=case.reduction.overlap_param_gather,
    )
    precision = PrecisionConfig(dtype=case.dtype, initial_loss_scale=64.0, loss_scale_window=1000)
    return MegatronOptimizer(adam, precision, chunks.wrapped, chunks.config, clipped_apart)


@dataclass
class Piece:
    """A parameter on one rank, with its place in the whole. `split` is the dimension that tensor parallelism cuts, or None;
    `halves` is 2 where each rank holds a part of both halves."""

    name: str
    tp_rank: int
    split: int | None
    halves: int
    parameter: np.ndarray
    gradient: np.ndarray | None
    """None where the parameter is frozen."""


def engine_of(case: Case, chunks: Chunks) -> MegatronEngine | ProgramEngine:
    if case.schedule is None:
        return MegatronEngine(chunks, case.options)
    return ProgramEngine(chunks, case.options, schedule_of(schedule_config(case), case.parallel, chunks.plan))


def schedule_config(case: Case) -> ScheduleConfig:
    first, second = case.fill
    return ScheduleConfig(
        name=case.schedule, engine="executor", path=None, backward_forward_ratio=2.0, part_one=first, part_two=second
    )


def one_step(rank: int, case: Case) -> dict:
    """Losses, this rank's parameters with their gradients, and the gradient norm that the optimizer reports."""
    chunks = build(case, rank)
    optimizer = optimizer_of(case, chunks)
    engine = engine_of(case, chunks)
    engine.grad_scale = optimizer.loss_scale
    batch = global_batch(case, chunks.groups.dp_rank, case.parallel.dp)
    chunks.zero_grad()
    optimizer.zero_grad()
    losses = engine.run(batch, case.weights)
    validation = engine.run(batch, case.weights, forward_only=True)
    pieces = pieces_of(case, chunks, optimizer)
    return {"losses": losses, "validation": validation, "pieces": pieces, "grad_norm": optimizer.step().grad_norm}


def pieces_of(case: Case, chunks: Chunks, optimizer: MegatronOptimizer) -> list[Piece]:
    return [piece for index in range(len(chunks.stages)) for piece in _pieces(case, chunks, index, optimizer.loss_scale())]


def _pieces(case: Case, chunks: Chunks, index: int, loss_scale: float) -> Iterator[Piece]:
    stage = chunks.stages[index]
    for name, parameter in stage.named_parameters():
        yield Piece(
            stage.global_name(name),
            chunks.groups.tp_rank,
            parameter.partition_dim if getattr(parameter, "tensor_model_parallel", False) else None,
            2 if case.spec.gated and name.endswith("linear_fc1.weight") else 1,
            parameter.detach().float().numpy().copy(),
            _whole_gradient(chunks, chunks.wrapped[index], parameter).div_(loss_scale).numpy()
            if parameter.requires_grad
            else None,
        )


def _whole_gradient(chunks: Chunks, wrapped: Any, parameter: Any) -> torch.Tensor:
    """A copy. With the distributed optimizer each data-parallel rank's gradient is right only on its share of a bucket:
    the shares put together."""
    gradient = parameter.main_grad.detach().clone()
    if wrapped.ddp_config.use_distributed_optimizer:
        buckets = [bucket for buffer in wrapped.buffers for bucket in buffer.buckets]
        data = next(bucket.grad_data for bucket in buckets if parameter in bucket.params)
        place = torch.arange(gradient.numel()) + (parameter.main_grad.storage_offset() - data.storage_offset())
        mine = place // (data.numel() // chunks.groups.layout.dp) == chunks.groups.dp_rank
        gradient.view(-1).mul_(mine)
        dist.all_reduce(gradient, group=chunks.groups.dp)
    return gradient


def assemble(
    results: list[dict], values: Literal["parameter", "gradient"], pieces: str = "pieces"
) -> dict[str, list[torch.Tensor]]:
    """Global name -> every copy of the whole tensor (several where it is tied or replicated)."""
    shards: dict[tuple, dict[int, Piece]] = {}
    for rank, result in enumerate(results):
        for occurrence, piece in enumerate(result[pieces]):
            # tensor-parallel ranks are numbered fastest, so ranks that share a tensor are neighbours
            shards.setdefault((piece.name, rank - piece.tp_rank, occurrence), {})[piece.tp_rank] = piece
    whole: dict[str, list[torch.Tensor]] = {}
    for (name, *_), parts in shards.items():
        if getattr(parts[0], values) is None:
            continue
        tensors = [torch.from_numpy(getattr(parts[tp_rank], values)) for tp_rank in sorted(parts)]
        split, halves = parts[0].split, parts[0].halves
        if split is not None:
            stacked = torch.cat([tensor.unflatten(split, (halves, -1)) for tensor in tensors], dim=split + 1)
            tensors = [stacked.flatten(split, split + 1)]
        whole.setdefault(name, []).extend(tensors)
    return whole
