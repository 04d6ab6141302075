"""How matrices stand in memory changes; what they are, and what is computed with them, does not."""

from __future__ import annotations

import pytest
import torch

from eellm.decoding.model.segments import InferenceModel
from eellm.decoding.model.weight_layout import store_columns_together
from tests import workers
from tests.decoding.models import build, spec


def by_columns(weight: torch.Tensor) -> bool:
    return weight.t().is_contiguous() and not weight.is_contiguous()


def test_values_shapes_and_sharing_remain() -> None:
    weight = torch.nn.Parameter(torch.arange(12.0).view(3, 4), requires_grad=False)
    shared = torch.nn.Linear(4, 3, bias=False)
    shared.weight = weight
    store_columns_together([weight, weight])
    assert shared.weight is weight
    assert by_columns(weight)
    assert torch.equal(weight, torch.arange(12.0).view(3, 4))


@pytest.mark.parametrize(
    "weight",
    [
        torch.nn.Parameter(torch.ones(3, 4)),  # trained: its storage may be part of a gradient bucket's
        torch.nn.Parameter(torch.ones(3, 4, dtype=torch.bfloat16), requires_grad=False),
        torch.nn.Parameter(torch.ones(4), requires_grad=False),
    ],
    ids=["trained", "bf16", "vector"],
)
def test_others_are_left_alone(weight: torch.nn.Parameter) -> None:
    where = weight.data_ptr()
    store_columns_together([weight])
    assert weight.is_contiguous()
    assert weight.data_ptr() == where


def turned(rank: int, dtype: str) -> list[bool]:
    stage = build(spec(), dtype=dtype)
    before = {name: parameter.clone() for name, parameter in stage.named_parameters()}
    InferenceModel(stage, stage.spec.exit_layers)
    assert all(torch.equal(parameter, before[name]) for name, parameter in stage.named_parameters())
    return [by_columns(parameter) for parameter in stage.parameters() if parameter.dim() == 2]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_decoder_turns_all_matrices_of_its_stage(dtype: str) -> None:
    """Its tokens are held against the plain model's in test_decoder, its layers against the modules' in test_lean_layer."""
    (found,) = workers.run(1, turned, dtype)
    assert found
    assert all(found) if dtype == "fp32" else not any(found)
