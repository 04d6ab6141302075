"""Groups, exits and data of 16 and 64 ranks, worked out without starting them: each rank is played in turn, nobody answers."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from eellm.config.compose import compose
from eellm.data.batches import BatchPlan
from eellm.layout import ParallelLayout
from eellm.mcore.groups import destroy_groups, init_groups
from eellm.model.spec import StageSpec, build_layout, build_spec, plan_stages, tied_stages

PUBLISHED = {
    "1_3b on 16": ("eellm_1_3b", 4),
    "1_3b on 64": ("eellm_1_3b", 16),
    "13b on 64": ("eellm_13b", 8),
    "30b on 64": ("eellm_30b", 4),
}
ALL = pytest.mark.parametrize("name", PUBLISHED)


def planned(name: str) -> tuple[ParallelLayout, list[StageSpec], list[int]]:
    """(layout, stages, stages that hold the output matrix) of a published experiment with so many data-parallel ranks."""
    experiment, dp = PUBLISHED[name]
    config = compose([f"experiment={experiment}", "task=train", "data=text", "data.path=."])
    spec, layout = build_spec(config, 32000), build_layout(config, dp)
    stages = plan_stages(spec, layout, config.parallel.layers_per_stage, config.exits.boundary)
    return layout, stages, tied_stages(spec, stages)


def groups_made(layout: ParallelLayout, tied: list[int], rank: int) -> tuple[list, list[int] | None]:
    """(ranks of every group in the order this rank makes them, ranks of its own group of holders)."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=layout.world_size)
    made, new_group = [], dist.new_group

    def recorded(ranks: list[int], *args: object, **options: object) -> dist.ProcessGroup:
        made.append(list(ranks))
        return new_group(ranks, *args, **{**options, "backend": "fake"})

    try:
        with mock.patch.object(dist, "new_group", recorded):
            groups = init_groups(layout, torch.device("cpu"), tied)
        members = (groups.tp, groups.dp, groups.pp)
        places = [dist.get_rank(group) for group in members]
        assert places == list(layout.coordinates(rank)), "ranks are numbered as megatron-core numbers them"
        return made, None if groups.tied is None else dist.get_process_group_ranks(groups.tied)
    finally:
        destroy_groups()


@ALL
def test_no_rank_skips_a_group(name: str) -> None:
    """All ranks make the same groups in the same order, or they wait for each other for ever; holders in rank order."""
    layout, _, tied = planned(name)
    ranks = range(layout.world_size) if layout.world_size <= 16 else (0, 1, 15, 16, 31, 37, 62, 63)
    holders = {rank: groups_made(layout, tied, rank) for rank in ranks}
    expected = holders[0][0]
    stages = {layout.pp_rank_of(stage) for stage in tied}
    for rank, (made, own) in holders.items():
        assert made == expected
        tp_rank, dp_rank, pp_rank = layout.coordinates(rank)
        column = sorted(layout.rank(tp_rank, dp_rank, stage) for stage in stages)
        assert own == (column if pp_rank in stages and len(stages) > 1 else None)


@ALL
def test_published_exits_lie_on_the_second_and_third_stage(name: str) -> None:
    layout, stages, tied = planned(name)
    assert layout.world_size in (16, 64)
    assert [len(stage.exits) for stage in stages] == [0, 1, 1, 0]
    assert tied == ([0, 1, 2, 3] if "1_3b" in name else [3])


def test_interleaved_holders_are_named_once() -> None:
    """Chunks of one rank that hold copies make one member of the group."""
    layout = ParallelLayout(tp=2, pp=4, vp=2, dp=2)
    for rank in range(16):
        _, own = groups_made(layout, [0, 1, 5, 7], rank)
        tp_rank, dp_rank, pp_rank = layout.coordinates(rank)
        assert own == (sorted(layout.rank(tp_rank, dp_rank, stage) for stage in (0, 1, 3)) if pp_rank in (0, 1, 3) else None)


@ALL
def test_every_sample_is_read_once_whatever_the_stage(name: str) -> None:
    layout, _, _ = planned(name)
    for step in (0, 5):
        read = [BatchPlan(layout, dp_rank, eod_id=0).sample_ids(step) for dp_rank in range(layout.dp)]
        assert {part.shape for part in read} == {(layout.num_microbatches, layout.micro_batch_size)}
        together = torch.cat([part.flatten() for part in read]).sort().values
        assert torch.equal(together, torch.arange(step * layout.global_batch_size, (step + 1) * layout.global_batch_size))
