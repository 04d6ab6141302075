"""Optimizer states in one form, whichever of megatron-core's optimizers holds them.

In a checkpoint each state is a whole tensor named after its parameter: `optimizer.state.exp_avg.layers.3.mlp...`, and
`optimizer.state.fp32_param....` where the model's own weights are not fp32. Plain and distributed optimizers nest these
tensors differently, and call the last kind differently; here the nesting stays local and the names are made the same, so
that a checkpoint of either is loaded by the other.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace
from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject, ShardedBase, ShardedTensor, ShardedTensorFactory

_MAIN_PARAMETER, _IN_DISTRIBUTED = "optimizer.state.fp32_param.", "optimizer.state.param."


def initialise_states(optimizer: torch.optim.Optimizer) -> None:
    """Give every parameter the states that torch's optimizers make in their first step, as that step would find them.

    megatron-core reads their shapes to load them, and cannot save a run whose steps were all skipped without them. It makes
    those of Apex and Transformer Engine itself.
    """
    if not isinstance(optimizer, torch.optim.Adam | torch.optim.SGD):
        return
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state[parameter]
            if state:
                continue
            if "betas" in group:
                state["step"] = torch.tensor(0.0)
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
            elif group["momentum"]:
                state["momentum_buffer"] = torch.zeros_like(parameter)


def saved_form(state: dict[str, Any], fp32_model: bool) -> dict[str, Any]:
    """megatron-core's sharded optimizer state -> what goes into a checkpoint."""
    tensors = {str(number): tensor for number, tensor in enumerate(_tensors(state, fp32_model))}
    return {"tensors": tensors, "step": _step(state), "grad_scaler": state.get("grad_scaler")}


def loaded_form(template: dict[str, Any], saved: dict[str, Any], fp32_model: bool) -> dict[str, Any]:
    """What `saved_form` made of a template, filled by a checkpoint -> megatron-core's state, in the template's place.

    Hyperparameters are the template's: they belong to the run's config.
    """
    values = {id(tensor): saved["tensors"][str(n)] for n, tensor in enumerate(_tensors(template, fp32_model))}

    def filled(leaf: Any) -> Any:
        if isinstance(leaf, ShardedBase):
            return values.get(id(leaf), leaf.data)
        return leaf.unwrap() if isinstance(leaf, LocalNonpersistentObject) else leaf

    state = dict_list_map_inplace(filled, template)
    _set_step(state, saved["step"])
    if "grad_scaler" in state and saved["grad_scaler"] is not None:
        state["grad_scaler"] = saved["grad_scaler"]
    return state


def _tensors(state: Any, fp32_model: bool) -> Iterator[ShardedTensor | ShardedTensorFactory]:
    """The tensors to save, under their names in checkpoints. An fp32 model's weights are its main parameters: saved once."""
    if isinstance(state, dict | list):
        for value in state.values() if isinstance(state, dict) else state:
            yield from _tensors(value, fp32_model)
    elif isinstance(state, ShardedTensor | ShardedTensorFactory):
        if state.key.startswith(_IN_DISTRIBUTED):
            state.key = _MAIN_PARAMETER + state.key.removeprefix(_IN_DISTRIBUTED)
        if not (fp32_model and state.key.startswith(_MAIN_PARAMETER)):
            yield state


def _step(state: dict[str, Any]) -> int | None:
    """Updates so far; None where the optimizer does not count them (SGD)."""
    if "param_state" in state:
        step = state["optimizer"]["param_groups"][0]["step"]
    else:
        step = _inner(state)["state"].get("common_step", 0.0 if "betas" in _inner(state)["param_groups"][0] else None)
    return None if step is None else int(step)


def _set_step(state: dict[str, Any], step: int | None) -> None:
    if step is None:
        return
    if "param_state" in state:
        for group in state["optimizer"]["param_groups"]:
            group["step"] = float(step)
    else:
        _inner(state)["state"]["common_step"] = torch.tensor(float(step))


def _inner(state: dict[str, Any]) -> dict[str, Any]:
    """torch's part of a plain optimizer's state: below `optimizer` where there are fp32 copies beside it."""
    return state.get("optimizer", state)
