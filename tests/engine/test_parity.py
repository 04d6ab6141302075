"""Losses and gradients of every layout equal one-process autograd of the plain model."""

from __future__ import annotations

import pytest
import torch

from eellm.mcore.data_parallel import ReductionOptions
from eellm.model.objective import ObjectiveOptions
from eellm.model.spec import ExitSpec
from tests import workers
from tests.engine.layouts import Case, assemble, global_batch, one_step, tiny_spec
from tests.reference import Reference

TOLERANCE = 1e-5
mixed_heads = (ExitSpec(1, "embedding"), ExitSpec(2, "mlp", tie_output=False, temperature=1.5), ExitSpec(3, "block"))
plain, mixed = tiny_spec(), tiny_spec(exits=mixed_heads)
untied = tiny_spec(exits=mixed_heads, tie_embeddings=False)
eight = tiny_spec(num_layers=8, exits=(ExitSpec(2), ExitSpec(3, "mlp"), ExitSpec(6, "block", tie_output=False), ExitSpec(8)))

CASES = {
    "single": Case(plain),
    "single_mixed_heads": Case(mixed),
    "single_untied": Case(untied),
    "single_eager": Case(mixed, options=ObjectiveOptions(deferred=False, chunk=1000)),
    "single_recompute_full": Case(mixed, recompute="full"),
    "single_masked": Case(mixed, unmasked=31),
    "single_documents": Case(mixed, documents=True),
    "single_token_confidence": Case(mixed, token_confidence=True, unmasked=31),
    "dp2": Case(mixed, {"dp": 2}, unmasked=31),
    "dp2_distributed_overlap": Case(mixed, {"dp": 2}, reduction=ReductionOptions(True, True, True)),
    "tp2": Case(mixed, {"tp": 2}),
    "tp2_sequence_parallel": Case(untied, {"tp": 2, "sequence_parallel": True}, documents=True),
    "tp2_token_confidence": Case(mixed, {"tp": 2}, token_confidence=True, unmasked=5),
    "pp2": Case(plain, {"pp": 2}),
    "pp2_boundary_start": Case(mixed, {"pp": 2}, boundary="start"),
    "pp2_uneven_untied": Case(untied, {"pp": 2}, layers_per_stage=(1, 3), recompute="selective"),
    "pp2_one_token": Case(mixed, {"pp": 2}, unmasked=1),
    "pp2_vp2": Case(mixed, {"pp": 2, "vp": 2}),
    "pp2_vp2_eager_untied": Case(untied, {"pp": 2, "vp": 2}, options=ObjectiveOptions(deferred=False), boundary="start"),
    "pp2_dp2_distributed": Case(plain, {"pp": 2, "dp": 2}, reduction=ReductionOptions(distributed_optimizer=True)),
    "pp2_dp2_overlap": Case(mixed, {"pp": 2, "dp": 2}, reduction=ReductionOptions(overlap_grad_reduce=True)),
    "tp2_pp2": Case(eight, {"tp": 2, "pp": 2, "sequence_parallel": True}, recompute="full"),
    "pp4": Case(eight, {"pp": 4}, boundary="balance"),
    "pp4_vp2": Case(eight, {"pp": 4, "vp": 2}),
}


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual - expected).norm() / expected.norm().clamp(min=1e-12)).item()


def check(case: Case, tolerance: float = TOLERANCE) -> float:
    """Compare with the oracle; returns the largest relative difference of a gradient."""
    results = workers.run(case.parallel.world_size, one_step, case)
    parameters = {name: copies[0].double().requires_grad_() for name, copies in assemble(results, 5).items()}
    objective, means = Reference(case.spec, parameters).losses(global_batch(case), case.weights)
    objective.backward()
    for result in results:
        for losses in (result["losses"], result["validation"]):
            assert losses.num_tokens == global_batch(case).loss_mask.sum()
            for name, mean in means.items():
                assert losses.means[name] == pytest.approx(mean.item(), rel=tolerance)
    worst = 0.0
    sharded = case.reduction.distributed_optimizer and case.parallel.dp > 1
    for name, copies in assemble(results, 6).items():
        expected = parameters[name].grad
        for copy in [_shards_of(copies, expected)] if sharded else copies:
            worst = max(worst, relative(copy.double(), expected))
            assert relative(copy.double(), expected) < tolerance, name
    return worst


def _shards_of(copies: list[torch.Tensor], expected: torch.Tensor) -> torch.Tensor:
    """With the distributed optimizer each rank's gradient is whole on its shard only: take the nearest copy per element."""
    stacked = torch.stack([copy.double() for copy in copies])
    nearest = (stacked - expected).abs().argmin(0, keepdim=True)
    return stacked.gather(0, nearest).squeeze(0)


@pytest.mark.parametrize("name", CASES)
def test_losses_and_gradients_equal_autograd(name: str) -> None:
    check(CASES[name])


VARIANTS = {
    "gpt2": {"norm": "layernorm", "position": "learned", "activation": "gelu_tanh", "qkv_bias": True, "linear_bias": True},
    "neox": {"norm": "layernorm", "residual": "parallel", "rotary_fraction": 0.25, "activation": "gelu", "linear_bias": True},
    "olmo2": {"norm_placement": "after", "qk_norm": "projection"},
    "qwen3": {"qk_norm": "head", "qkv_bias": True, "head_dim": 16},
    "mistral": {"sliding_window": 5, "activation": "geglu", "attention": "unfused"},
}


@pytest.mark.parametrize("family", VARIANTS)
@pytest.mark.parametrize("layout", [{}, {"tp": 2, "sequence_parallel": True}], ids=["single", "tp2_sp"])
def test_families_of_layers(family: str, layout: dict) -> None:
    check(Case(tiny_spec(exits=mixed_heads, **VARIANTS[family]), layout))
