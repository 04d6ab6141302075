"""Runs on spawned ranks: one step of a model on a layout, returning whole gradients by global name to compare with the oracle."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from eellm.data.batch import GlobalBatch
from eellm.engine.chunks import ChunkOptions, Chunks, build_chunks
from eellm.engine.megatron import MegatronEngine
from eellm.layout import ParallelLayout
from eellm.mcore.data_parallel import ReductionOptions
from eellm.mcore.groups import init_groups
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
    parts = (text[..., :-1], text[..., 1:], mask, positions, documents)
    return GlobalBatch(*(None if part is None else part[dp_rank::dp].contiguous() for part in parts))


def build(case: Case, rank: int) -> Chunks:
    plan = plan_stages(case.spec, case.parallel, list(case.layers_per_stage) if case.layers_per_stage else None, case.boundary)
    groups = init_groups(case.parallel, torch.device("cpu"), tied_stages(case.spec, plan))
    options = ChunkOptions(case.dtype, SEED, case.recompute, case.reduction)
    return build_chunks(case.spec, plan, groups, options)


def one_step(rank: int, case: Case) -> dict:
    """Losses, and this rank's parameters and gradients with their place in the whole."""
    chunks = build(case, rank)
    groups = chunks.groups
    engine = MegatronEngine(chunks, case.options)
    batch = global_batch(case, groups.dp_rank, case.parallel.dp)
    chunks.zero_grad()
    losses = engine.run(batch, case.weights)
    validation = engine.run(batch, case.weights, forward_only=True)
    pieces = []
    for stage in chunks.stages:
        for name, parameter in stage.named_parameters():
            halves = 2 if case.spec.gated and name.endswith("linear_fc1.weight") else 1
            split = parameter.partition_dim if getattr(parameter, "tensor_model_parallel", False) else None
            pieces.append(
                (stage.global_name(name), groups.tp_rank, groups.dp_rank, split, halves, parameter.data, parameter.main_grad)
            )
    return {"losses": losses, "validation": validation, "pieces": [tuple(map(_plain, piece)) for piece in pieces]}


def _plain(value):
    return value.detach().float().clone().numpy() if isinstance(value, torch.Tensor) else value


def assemble(results: list[dict], field_: int) -> dict[str, list[torch.Tensor]]:
    """Global name -> every copy of the whole tensor (several where it is tied or replicated)."""
    shards: dict[tuple, dict[int, tuple]] = {}
    for rank, result in enumerate(results):
        for occurrence, piece in enumerate(result["pieces"]):
            name, tp_rank, dp_rank = piece[:3]
            # tensor-parallel ranks are numbered fastest, so ranks that share a shard group are neighbours
            key = (name, dp_rank, rank - tp_rank, occurrence)
            shards.setdefault(key, {})[tp_rank] = (piece[3], piece[4], torch.from_numpy(piece[field_]))
    whole: dict[str, list[torch.Tensor]] = {}
    for (name, *_), parts in shards.items():
        split, halves, _ = parts[0]
        tensors = [parts[rank][2] for rank in sorted(parts)]
        if split is None:
            whole.setdefault(name, []).extend(tensors)
        else:
            stacked = torch.cat([t.unflatten(split, (halves, -1)) for t in tensors], dim=split + 1)
            whole.setdefault(name, []).append(stacked.flatten(split, split + 1))
    return whole
