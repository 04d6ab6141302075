"""Process groups of a rank, made once from a layout and passed around explicitly."""

from __future__ import annotations

import datetime
import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from eellm.layout import ParallelLayout
from eellm.mcore.cpu import cpu_stand_ins

Group = dist.ProcessGroup


@dataclass(frozen=True)
class Groups:
    """This rank's place in the layout. `tied` joins the holders of the output matrix's copies; None where this rank has none."""

    layout: ParallelLayout
    rank: int
    device: torch.device
    tp: Group
    pp: Group
    dp: Group
    tied: Group | None

    @property
    def tp_rank(self) -> int:
        return self.layout.coordinates(self.rank)[0]

    @property
    def dp_rank(self) -> int:
        return self.layout.coordinates(self.rank)[1]

    @property
    def pp_rank(self) -> int:
        return self.layout.coordinates(self.rank)[2]

    @property
    def is_main(self) -> bool:
        """The one rank that writes files and the console."""
        return self.rank == 0


def pick_device(device: str) -> torch.device:
    """`auto`, `cpu` or `cuda` -> this rank's device."""
    if device == "cuda" or (device == "auto" and torch.cuda.is_available()):
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("cpu")


PATIENCE = 30.0
"""Minutes that a rank waits for the others in a collective."""


def init_process_group(device: torch.device, alone: bool = False, timeout_minutes: float = PATIENCE) -> None:
    """Join the ranks that the environment names; stand alone where it names none, or when asked to."""
    backend = "nccl" if device.type == "cuda" else "gloo"
    timeout = datetime.timedelta(minutes=timeout_minutes)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if "RANK" in os.environ and not alone:
        dist.init_process_group(backend, timeout=timeout)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)


def init_groups(
    layout: ParallelLayout, device: torch.device, tied_stages: list[int], seed: int = 1, timeout_minutes: float = PATIENCE
) -> Groups:
    """Create all groups of a layout; every rank calls this. `tied_stages` are virtual stages (`model.spec.tied_stages`)."""
    assert dist.get_world_size() == layout.world_size
    parallel_state.initialize_model_parallel(
        layout.tp,
        layout.pp,
        virtual_pipeline_model_parallel_size=layout.vp if layout.vp > 1 else None,
        distributed_timeout_minutes=timeout_minutes,
    )
    with cpu_stand_ins():
        model_parallel_cuda_manual_seed(seed)
    return Groups(
        layout=layout,
        rank=dist.get_rank(),
        device=device,
        tp=parallel_state.get_tensor_model_parallel_group(),
        pp=parallel_state.get_pipeline_model_parallel_group(),
        dp=parallel_state.get_data_parallel_group(with_context_parallel=True),
        tied=group_of_holders(layout, tied_stages),
    )


def group_of_holders(layout: ParallelLayout, stages: list[int]) -> Group | None:
    """This rank's group of pipeline ranks that hold virtual stages, sorted; None where it is not among them, or they are one.

    Every rank makes every group, in the same order.
    """
    mine = None
    holders = sorted({layout.pp_rank_of(stage) for stage in stages})
    for ranks in layout.groups_over(holders) if len(holders) > 1 else []:
        group = dist.new_group(ranks)
        if dist.get_rank() in ranks:
            mine = group
    return mine


def destroy_groups(process_group: bool = True) -> None:
    """Undo `init_groups`, and `init_process_group` too unless told otherwise."""
    parallel_state.destroy_model_parallel()
    if process_group and dist.is_initialized():
        dist.destroy_process_group()
