"""Lean layers and heads compute what the modules whose parameters they share compute from whole sequences."""

from __future__ import annotations

import zlib
from collections.abc import Iterator

import pytest
import torch

from eellm.decoding.model.ragged import Span
from eellm.decoding.model.segments import InferenceModel
from eellm.model.context import training_context
from eellm.model.spec import ExitSpec, ModelSpec
from eellm.model.stage import Stage
from tests import workers
from tests.decoding.models import build, spec
from tests.engine.test_parity import VARIANTS

LENGTH, SEQUENCES = 14, 4
HEADS = (
    ExitSpec(1, "embedding"),
    ExitSpec(2, "mlp", tie_output=False, temperature=1.5),
    ExitSpec(3, "block"),
    ExitSpec(4, "norm", tie_output=False),
)
FAMILIES = {
    "llama": {},
    **VARIANTS,
    "one_group": {"num_query_groups": 1, "activation": "squared_relu"},
    "one_head_per_group": {"num_query_groups": 4, "activation": "relu", "position": "none"},
    "neox_after": {"residual": "parallel", "norm_placement": "after", "qk_norm": "head", "rotary_fraction": 0.5},
}

WAYS = {
    "one_sequence": [[(2, 5)], [(2, 1)], [(2, 1)], [(2, 3)], [(2, 1)], [(2, 3)]],
    "row_by_row": [[(1, 1)]] * LENGTH,
    "together": [[(0, 2), (1, 4), (2, 1), (3, 6)], *[[(0, 1), (1, 1), (2, 1), (3, 1)]] * 8],
    "catching_up": [
        [(0, 3), (1, 5), (2, 2), (3, 6)],
        [(0, 2), (1, 1), (2, 4), (3, 1)],
        [(3, 2), (1, 1)],
        [(2, 3), (0, 1), (1, 4)],
        [(0, 1), (1, 1), (2, 1), (3, 1)],
    ],
    "some_of_them": [[(3, 7), (1, 1)], [(1, 1), (3, 1)], [(3, 1), (0, 1)], [(3, 1), (0, 1), (1, 1)], [(0, 3), (3, 1), (1, 2)]],
}
"""Forwards as lists of (slot, tokens): prompts, single rows, rows that catch up, sequences of different lengths."""


def fill(stage: Stage) -> None:
    """Norms and biases away from their initial 1 and 0; the same on all ranks."""
    for name, parameter in stage.named_parameters():
        if "norm" in name or name.endswith("bias"):
            generator = torch.Generator().manual_seed(zlib.crc32(stage.global_name(name).encode()))
            parameter.data.add_(torch.randn(parameter.shape, generator=generator), alpha=0.3)


def inputs(spec_: ModelSpec, dtype: torch.dtype) -> torch.Tensor:
    """Hidden states [s, b, h], the same on all ranks."""
    generator = torch.Generator().manual_seed(5)
    return torch.randn(LENGTH, SEQUENCES, spec_.hidden_size, generator=generator).to(dtype)


def rows(whole: torch.Tensor, spans: list[Span]) -> torch.Tensor:
    """The spans' rows [r, 1, h] of [s, b, h]."""
    return torch.cat([whole[span.start : span.end, span.slot] for span in spans]).unsqueeze(1)


def forwards(way: str) -> Iterator[list[Span]]:
    seen = [0] * SEQUENCES
    for forward in WAYS[way]:
        yield [Span(slot, seen[slot], count) for slot, count in forward]
        for slot, count in forward:
            seen[slot] += count


def distance(own: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((own.double() - wanted.double()).norm() / wanted.double().norm()).item()


def of_modules(stage: Stage, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """What the modules of a stage of this type make of whole sequences, [s, b, h] by layer or head."""
    spec_, hidden = stage.spec, inputs(stage.spec, stage.config.params_dtype).to(dtype)
    whole = training_context(spec_, torch.arange(LENGTH).expand(SEQUENCES, -1), None, dtype)
    made = {name: module(hidden, whole) for name, module in stage.layers.named_children()}
    return made | {name: stage.readout(name).head.features(hidden, whole) for name in spec_.heads}


def of_lean_layers(stage: Stage) -> tuple[dict[str, list[torch.Tensor]], list[list[Span]]]:
    """Rows [r, 1, h] by layer or head and forward, and whose rows they are."""
    model = InferenceModel(stage, stage.spec.exit_layers)
    hidden = inputs(stage.spec, model.dtype)
    lean = {layer.name: layer for segment in model.segments for layer in segment.layers}
    readouts = [segment.exit for segment in model.segments if segment.exit is not None] + [model.final]
    made: dict[str, list[torch.Tensor]] = {name: [] for name in [*lean, *stage.spec.heads]}
    passed = []
    for way in WAYS:
        cache = model.cache(LENGTH, SEQUENCES)
        for spans in forwards(way):
            passed.append(spans)
            context, own = model.context(cache, spans), rows(hidden, spans)
            before = own.clone()
            for name, layer in lean.items():
                made[name].append(layer(own, context))
            for readout in readouts:
                made[readout.name].append(model.features(readout, own, context))
            assert torch.equal(own, before), "states that may wait at an exit have changed"
    return made, passed


@torch.inference_mode()
def differences(rank: int, spec_: ModelSpec, tp: int, dtype: str) -> dict[str, tuple[float, float, float]]:
    """By layer or head: lean rows against the modules', and the errors of both against fp64."""
    stage = build(spec_, tp, dtype)
    fill(stage)
    own, passed = of_lean_layers(stage)
    modules = of_modules(stage, stage.config.params_dtype)
    exact = of_modules(stage.double(), torch.float64)
    found = {}
    for name in own:
        lean, plain, true = (torch.cat(x) for x in (own[name], *([rows(w[name], s) for s in passed] for w in (modules, exact))))
        found[name] = distance(lean, plain), distance(lean, true), distance(plain, true)
    return found


NAMES = {"1", "2", "3", "4", "exit_01", "exit_02", "exit_03", "exit_04", "final"}


@pytest.mark.parametrize(
    ("family", "tp"), [(family, tp) for family in FAMILIES for tp in (1, 2) if (family, tp) != ("one_group", 2)]
)
def test_fp32(family: str, tp: int) -> None:
    for found in workers.run(tp, differences, spec(exits=HEADS, **FAMILIES[family]), tp, "fp32"):
        assert set(found) == NAMES
        assert max(difference for difference, _, _ in found.values()) < 1e-5, found


@pytest.mark.parametrize("family", FAMILIES)
def test_bf16(family: str) -> None:
    """Rounded elsewhere than in the modules, not more often."""
    found = workers.run(1, differences, spec(exits=HEADS, **FAMILIES[family]), 1, "bf16")[0]
    assert set(found) == NAMES
    for name, (_, lean, plain) in found.items():
        assert lean < 1.3 * plain + 1e-6, (name, lean, plain)
        assert plain < 0.1, name


def shared(rank: int, spec_: ModelSpec) -> tuple[int, int]:
    """(bytes of tensors that lean layers and heads hold and no parameter does, those of the parameters)."""
    stage = build(spec_)
    model = InferenceModel(stage, spec_.exit_layers)
    parameters = {parameter.data_ptr() for parameter in stage.parameters()}
    own = 0
    pending, seen = [model.segments, model._heads], set()
    while pending:
        item = pending.pop()
        if id(item) in seen or isinstance(item, torch.nn.Module):
            continue
        seen.add(id(item))
        if isinstance(item, torch.Tensor):
            own += 0 if item.data_ptr() in parameters else item.numel() * item.element_size()
        elif isinstance(item, list | tuple):
            pending += item
        elif isinstance(item, dict):
            pending += item.values()
        elif type(item).__module__.startswith("eellm.decoding"):
            pending += vars(item).values()
    return own, sum(parameter.numel() * parameter.element_size() for parameter in stage.parameters())


def test_no_second_copy_of_weights() -> None:
    own, parameters = workers.run(1, shared, spec(exits=HEADS))[0]
    assert own < parameters / 100
