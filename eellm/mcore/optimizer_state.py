"""Optimizer states in checkpoints: one form, whichever of megatron-core's optimizers holds them.

Each state is a whole tensor named after its parameter: `optimizer.state.exp_avg.layers.3.mlp...`, and
`optimizer.state.fp32_param....` where the model's own weights are not fp32. megatron-core's own forms differ between its
optimizers; that of the distributed one (`fully_reshardable`) moreover shifts states whenever a parameter's size is no
multiple of 64, because it forgets the padding between parameters (it warns of "data corruption").
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params

MAIN_PARAMETER = "fp32_param"


@dataclass(frozen=True)
class Shard:
    """What this rank updates of a parameter: elements [start, end) of it, flattened; `main` are they in fp32."""

    main: torch.Tensor
    start: int
    end: int


@torch.no_grad()
def sharded_states(part: Any, model_state: dict[str, Any], is_loading: bool) -> dict[str, Any]:
    """megatron-core's sharded view of one of its optimizers; `model_state` is that of the model.

    All data-parallel ranks call this: of a distributed optimizer each holds a piece of every tensor.
    """
    initialise_states(part.optimizer)
    distributed = isinstance(part, DistributedOptimizer)
    tensors: dict[str, Any] = {}
    for sharded, kind, shard, values in _entries(part, model_state):
        if distributed:
            values = _whole(sharded.data, shard, values, None if is_loading else part.data_parallel_group)
        tensors[str(len(tensors))] = make_sharded_optimizer_tensor(sharded, values, f"optimizer.state.{kind}")
    scaler = getattr(part, "grad_scaler", None)
    return {"tensors": tensors, "step": _step_of_all(part.optimizer), "grad_scaler": scaler.state_dict() if scaler else None}


@torch.no_grad()
def load_states(part: Any, model_state: dict[str, Any], saved: dict[str, Any]) -> None:
    """Take what `sharded_states` described and a checkpoint filled in. Hyperparameters stay: they are the config's."""
    for number, (_, _, shard, values) in enumerate(_entries(part, model_state)):
        if shard is not None:
            values.copy_(saved["tensors"][str(number)].flatten()[shard.start : shard.end].view_as(values))
    _set_step(part.optimizer, saved["step"])
    scaler = getattr(part, "grad_scaler", None)
    if scaler and saved["grad_scaler"]:
        scaler.load_state_dict(saved["grad_scaler"])


def initialise_states(optimizer: torch.optim.Optimizer) -> None:
    """Give every parameter the states that the optimizer's first step makes, as that step would find them.

    They are saved even if all steps so far were skipped, and a fresh optimizer has to have them to be loaded.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state[parameter]
            if state:
                continue
            if _counts(optimizer):
                state["step"] = torch.tensor(0.0)
            for kind in _kinds(optimizer):
                state[kind] = torch.zeros_like(parameter)


def _entries(part: Any, model_state: dict[str, Any]) -> Iterator[tuple[Any, str, Shard | None, torch.Tensor | None]]:
    """(the model's sharded tensor, kind of state, this rank's shard, its values) of every state, in the same order everywhere."""
    shards = _shards(part)
    for sharded in nested_values(extract_sharded_tensors_and_factories(model_state)[0]):
        if not sharded.data.requires_grad:
            continue
        shard = shards.get(sharded.data)
        state = {} if shard is None else part.optimizer.state[shard.main]
        for kind in _kinds(part.optimizer):
            yield sharded, kind, shard, state.get(kind)
        if sharded.data.dtype != torch.float32:  # elsewhere main parameters are the model's
            yield sharded, MAIN_PARAMETER, shard, None if shard is None else shard.main


def main_parameters(part: Any) -> dict[torch.nn.Parameter, torch.Tensor]:
    """The model's parameter -> what this rank updates in its place."""
    return {parameter: shard.main for parameter, shard in _shards(part).items()}


def _shards(part: Any) -> dict[torch.nn.Parameter, Shard]:
    if isinstance(part, DistributedOptimizer):
        groups = part.optimizer.param_groups
        places = {
            parameter: (groups[group]["params"][order], part._get_model_param_range_map(parameter)["param"])
            for parameter, (group, order) in part.model_param_group_index_map.items()
        }
        return {parameter: Shard(main, where.start, where.end) for parameter, (main, where) in places.items()}
    if isinstance(part, Float16OptimizerWithFloat16Params):
        groups = zip(part.float16_groups, part.fp32_from_float16_groups, strict=True)
        pairs = [pair for models, mains in groups for pair in zip(models, mains, strict=True)]
        pairs += [(parameter, parameter) for group in part.fp32_from_fp32_groups for parameter in group]
    else:
        pairs = [(parameter, parameter) for parameter in part.get_parameters()]
    return {parameter: Shard(main, 0, main.numel()) for parameter, main in pairs}


def _whole(
    parameter: torch.Tensor, shard: Shard | None, values: torch.Tensor | None, group: dist.ProcessGroup | None
) -> torch.Tensor:
    """A state in the parameter's shape, put together from the pieces of a group's ranks; empty without a group."""
    if group is None:
        return torch.empty(parameter.shape, dtype=torch.float32, device=parameter.device)
    whole = torch.zeros(parameter.numel(), dtype=torch.float32, device=parameter.device)
    if shard is not None and values is not None:
        whole[shard.start : shard.end] = values.flatten()
    dist.all_reduce(whole, group=group)  # every element is on one rank, and nothing elsewhere
    return whole.view(parameter.shape)


def _kinds(optimizer: torch.optim.Optimizer) -> tuple[str, ...]:
    group = optimizer.param_groups[0]
    if "betas" in group:
        return ("exp_avg", "exp_avg_sq")
    return ("momentum_buffer",) if group["momentum"] else ()


def _counts(optimizer: torch.optim.Optimizer) -> bool:
    """torch's Adam counts its steps for every parameter, those of Apex and Transformer Engine for every group."""
    return isinstance(optimizer, torch.optim.Adam)


def _step(optimizer: torch.optim.Optimizer) -> int | None:
    """Updates so far; None where nothing counts them (SGD)."""
    if _counts(optimizer):
        return max((int(state["step"]) for state in optimizer.state.values()), default=0)
    return optimizer.param_groups[0].get("step", 0) if "betas" in optimizer.param_groups[0] else None


def _step_of_all(optimizer: torch.optim.Optimizer) -> int | None:
    """The same on all ranks, of which some may hold nothing that is trained: what rank 0 says is saved."""
    steps: list[int | None] = [None] * dist.get_world_size()
    dist.all_gather_object(steps, _step(optimizer))
    return max((step for step in steps if step is not None), default=None)


def _set_step(optimizer: torch.optim.Optimizer, step: int | None) -> None:
    if _counts(optimizer):
        for state in optimizer.state.values():
            state["step"].fill_(step)
    elif step is not None:
        for group in optimizer.param_groups:
            group["step"] = step
