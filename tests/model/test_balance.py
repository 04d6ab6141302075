"""Balanced splits against all splits there are."""

from __future__ import annotations

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from eellm.layout import ParallelLayout
from eellm.model.spec import ExitSpec, Loads, ModelSpec, plan_stages


@settings(deadline=None, max_examples=60)
@given(
    layers=st.integers(4, 8),
    stages=st.integers(1, 4),
    exits=st.sets(st.integers(1, 8), max_size=4),
    vocabulary=st.sampled_from([64, 512, 2048]),
    boundary=st.sampled_from(["end", "start", "balance"]),
)
def test_no_split_has_a_lighter_slowest_stage(layers: int, stages: int, exits: set[int], vocabulary: int, boundary: str) -> None:
    chosen = tuple(ExitSpec(layer, "mlp" if layer % 3 == 0 else "norm") for layer in sorted(exits) if layer <= layers)
    spec = ModelSpec(layers, 32, 4, 4, 8, 96, vocabulary, vocabulary, 16, exits=chosen)
    layout = ParallelLayout(pp=stages)

    def slowest(split: list[int]) -> int:
        return max(Loads.of_products(spec).stage(stage) for stage in plan_stages(spec, layout, split, boundary))

    plan = plan_stages(spec, layout, "balance", boundary)
    splits = [list(split) for split in itertools.product(range(1, layers + 1), repeat=stages) if sum(split) == layers]
    assert max(Loads.of_products(spec).stage(stage) for stage in plan) == min(map(slowest, splits))
    assert [layer for stage in plan for layer in stage.layers] == list(range(1, layers + 1))


def test_the_last_stage_gets_fewer_layers() -> None:
    """A head weighs as much as one layer (vocabulary 12 h): of 15 layers the last of 4 stages has one less than the others."""
    spec = ModelSpec(15, 32, 4, 4, 8, 85, 384, 384, 16)
    assert [stage.num_layers for stage in plan_stages(spec, ParallelLayout(pp=4), "balance")] == [4, 4, 4, 3]
