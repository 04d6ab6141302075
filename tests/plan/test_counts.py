"""Parameters against the modules themselves, on the meta device; activations against the live storages of a forward pass."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from eellm.benchmark.live_memory import LiveStorages
from eellm.data.batch import Microbatch
from eellm.layout import ParallelLayout
from eellm.mcore.cpu import cpu_stand_ins
from eellm.mcore.groups import destroy_groups, init_groups
from eellm.mcore.parts import transformer_config
from eellm.model.spec import ExitSpec, ModelSpec, plan_stages, tied_stages
from eellm.model.stage import Stage
from eellm.plan import parameters
from eellm.plan.memory import Shape, layer_bytes, logits_bytes, static_memory

SPEC = ModelSpec(4, 32, 4, 4, 8, 96, 101, 104, 16)
EXITS = (ExitSpec(1, "embedding"), ExitSpec(2, "mlp", tie_output=False), ExitSpec(3, "block"), ExitSpec(4, "norm"))
SPECS = {
    "llama": SPEC,
    "untied, all heads": replace(SPEC, tie_embeddings=False, exits=EXITS),
    "tied, all heads": replace(SPEC, exits=EXITS),
    "gpt-2": replace(SPEC, activation="gelu", norm="layernorm", position="learned", linear_bias=True),
    "qwen": replace(SPEC, num_query_groups=2, qkv_bias=True, qk_norm="head"),
    "olmo2": replace(SPEC, norm_placement="after", qk_norm="projection"),
    "neox": replace(SPEC, residual="parallel", activation="gelu", norm="layernorm"),
    "wide heads": replace(SPEC, head_dim=16, num_query_groups=2, position="none"),
}


@pytest.fixture
def groups_of(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes the groups of a tensor-parallel size in one process; with more than one rank nothing is ever sent."""

    def make(tp: int) -> Any:
        if tp > 1:
            dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=tp)
            new_group = dist.new_group
            monkeypatch.setattr(dist, "new_group", lambda ranks, *args, **_: new_group(ranks, *args, backend="fake"))
        else:
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        return init_groups(ParallelLayout(tp=tp), torch.device("cpu"), [0], 1)

    yield make
    destroy_groups()


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("boundary", ["end", "start"])
@pytest.mark.parametrize("name", SPECS)
def test_parameters_are_the_modules(name: str, boundary: str, tp: int, groups_of: Any) -> None:
    spec, layout = SPECS[name], ParallelLayout(tp=tp, pp=2)
    groups = groups_of(tp)
    plan = plan_stages(spec, layout, [3, 1], boundary)
    config = transformer_config(spec, ParallelLayout(tp=tp))
    for part in plan:
        with torch.device("meta"), cpu_stand_ins():
            stage = Stage(spec, part, config, tied_stages(spec, plan), groups.tp)
        assert parameters.stage(spec, part, tp) == sum(parameter.numel() for parameter in stage.parameters())
        assert {parameter.device.type for parameter in stage.parameters()} == {"meta"}
    if tp == 1:
        (whole,) = plan_stages(spec, ParallelLayout())
        assert parameters.whole_model(spec) == parameters.stage(spec, whole)


class Passing:
    """No head computes anything."""

    def at_exit(self, hidden: torch.Tensor, *_: object) -> torch.Tensor:
        return hidden

    def at_final(self, hidden: torch.Tensor, *_: object) -> torch.Tensor:
        return hidden


def kept_by_layers(spec: ModelSpec, shape: Shape, groups: Any) -> float:
    """Bytes that each further layer leaves alive after a forward pass."""
    left = []
    for count in (2, 4):
        deep = replace(spec, num_layers=count, exits=())
        (part,) = plan_stages(deep, ParallelLayout())
        with cpu_stand_ins():
            stage = Stage(deep, part, transformer_config(deep, ParallelLayout(), shape.dtype), [0], groups.tp)
        for parameter in stage.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
        stage.set_recompute(shape.recompute)
        tokens = torch.zeros(shape.micro_batch, shape.sequence, dtype=torch.long)
        positions = torch.arange(shape.sequence).expand(shape.micro_batch, -1)
        batch = Microbatch(tokens, tokens, torch.ones(tokens.shape), positions)
        with LiveStorages() as live, cpu_stand_ins():
            output = stage(batch, Passing())
            left.append(live.current)
        del output
    return (left[1] - left[0]) / 2


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", SPECS)
def test_activations_are_what_autograd_keeps(name: str, dtype: str, recompute: Any, groups_of: Any) -> None:
    shape = Shape(16, 3, dtype, recompute=recompute, fused_norm=False)
    measured = kept_by_layers(SPECS[name], shape, groups_of(1))
    assert layer_bytes(SPECS[name], shape) == pytest.approx(measured, rel=0.005)


def test_tensor_parallelism_splits_what_lies_between_the_projections() -> None:
    whole, split, sequence = Shape(16, 2, "bf16"), Shape(16, 2, "bf16", 2), Shape(16, 2, "bf16", 2, True)
    inside = 32 * 2 * (32 * 6 + 96 * 5) + 32 * 4 * 4
    outside = 32 * (4 * 32 * 2 + 2 * 4)
    assert layer_bytes(SPEC, whole) == inside + outside
    assert layer_bytes(SPEC, split) == inside / 2 + outside
    assert layer_bytes(SPEC, sequence) == layer_bytes(SPEC, whole) / 2


def test_static_memory() -> None:
    """Adam in bf16: 2 + 4 bytes a parameter, and 12 that the distributed optimizer shards (Megatron-LM's table: 6 + 12/d)."""
    assert static_memory(1000, "bf16", "adam").total == 18000
    assert static_memory(1000, "bf16", "adam", 8).total == 6000 + 12000 / 8
    assert static_memory(1000, "fp32", "adam").total == 16000
    assert static_memory(1000, "fp32", "sgd").total == 12000


def test_logits_of_the_published_layouts() -> None:
    """fp32 logits of a microbatch per tensor-parallel rank: 1.3B 1.05 GB, 7B 0.52, 13B 0.13, 30B 0.066 (landscape A5)."""
    for micro_batch, tp, gigabytes in ((4, 1, 1.05), (2, 1, 0.52), (1, 2, 0.13), (1, 4, 0.066)):
        spec = replace(SPEC, vocab_size=32000, padded_vocab_size=32000)
        shape = Shape(2048, micro_batch, "fp32", tp, chunk=2**20)
        features = shape.tokens * spec.hidden_size * 4
        assert (logits_bytes(spec, shape) - features) / 1e9 == pytest.approx(gigabytes, rel=0.015)
