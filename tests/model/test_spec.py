"""The plan of stages and segments, by hand and by property."""

from __future__ import annotations

import itertools

import pytest

from eellm.layout import ParallelLayout
from eellm.model.spec import ExitSpec, Loads, ModelSpec, exit_layer, plan_stages, tied_stages
from tests.engine.layouts import tiny_spec

eight = tiny_spec(num_layers=8, exits=(ExitSpec(2), ExitSpec(4), ExitSpec(5), ExitSpec(8)))


def places(spec: ModelSpec, pp: int, **options) -> list[list[tuple[tuple[int, ...], int | None]]]:
    stages = plan_stages(spec, ParallelLayout(pp=pp), **options)
    return [[(s.layers, s.exit.layer if s.exit else None) for s in stage.segments] for stage in stages]


def test_one_stage() -> None:
    assert places(eight, 1) == [[((1, 2), 2), ((3, 4), 4), ((5,), 5), ((6, 7, 8), 8)]]


def test_exit_on_a_boundary_at_the_end_and_at_the_start() -> None:
    assert places(eight, 2)[0] == [((1, 2), 2), ((3, 4), 4)]
    assert places(eight, 2, boundary="start") == [[((1, 2), 2), ((3, 4), None)], [((), 4), ((5,), 5), ((6, 7, 8), 8)]]


def test_an_exit_after_the_last_layer_stays_on_the_last_stage() -> None:
    assert places(eight, 4, boundary="start")[-1][-1] == ((7, 8), 8)


def test_uneven_layers() -> None:
    assert [stage.layers for stage in plan_stages(eight, ParallelLayout(pp=3), [1, 2, 5])] == [[1], [2, 3], [4, 5, 6, 7, 8]]


@pytest.mark.parametrize("boundary", ["end", "start", "balance"])
@pytest.mark.parametrize("pp", [1, 2, 4, 8])
def test_every_layer_and_exit_exactly_once(pp: int, boundary: str) -> None:
    stages = plan_stages(eight, ParallelLayout(pp=pp), boundary=boundary)
    assert list(itertools.chain.from_iterable(stage.layers for stage in stages)) == list(range(1, 9))
    assert [exit_.layer for stage in stages for exit_ in stage.exits] == [2, 4, 5, 8]


def test_balance_is_the_best_choice() -> None:
    spec = tiny_spec(num_layers=8, exits=(ExitSpec(2), ExitSpec(4), ExitSpec(6)))
    layout = ParallelLayout(pp=4)
    slowest = {
        boundary: max(Loads.of_products(spec).stage(stage) for stage in plan_stages(spec, layout, boundary=boundary))
        for boundary in ("end", "start", "balance")
    }
    assert slowest["balance"] <= min(slowest["end"], slowest["start"])
    assert slowest["end"] < slowest["start"], "the last stage already has the final head"


def test_holders_of_the_output_matrix() -> None:
    spec = tiny_spec(num_layers=8, exits=(ExitSpec(2), ExitSpec(6, tie_output=False)))
    stages = plan_stages(spec, ParallelLayout(pp=4))
    assert tied_stages(spec, stages) == [0, 3]
    untied = tiny_spec(num_layers=8, exits=(ExitSpec(4), ExitSpec(6, tie_output=False)), tie_embeddings=False)
    assert tied_stages(untied, plan_stages(untied, ParallelLayout(pp=4))) == [1, 3]


def test_groups_of_holders_on_64_ranks() -> None:
    """Every rank of a holding stage is in exactly one group, with its own tensor and data coordinates."""
    layout = ParallelLayout(tp=2, pp=8, dp=4)
    groups = layout.groups_over([0, 2, 7])
    members = [rank for group in groups for rank in group]
    assert sorted(members) == [r for r in range(64) if layout.coordinates(r)[2] in (0, 2, 7)]
    for group in groups:
        assert group == sorted(group)
        assert len({layout.coordinates(rank)[:2] for rank in group}) == 1
        assert [layout.coordinates(rank)[2] for rank in group] == [0, 2, 7]


def test_fractions_of_the_depth() -> None:
    assert [exit_layer(position, 24) for position in (0.25, 0.5, 1.0, 1)] == [6, 12, 24, 1]
