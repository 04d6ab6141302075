"""Ranks that somebody else starts: torchrun, or srun."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass


@dataclass(frozen=True)
class OuterRank:
    """This process's place among the ranks that an outer launcher started."""

    rank: int
    local_rank: int
    world_size: int


def outer_rank() -> OuterRank | None:
    """None where nobody else starts the ranks. Under srun, torch's own variables are set from SLURM's."""
    if "RANK" not in os.environ and int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        os.environ["RANK"] = os.environ["SLURM_PROCID"]
        os.environ["WORLD_SIZE"] = os.environ["SLURM_STEP_NUM_TASKS"]
        os.environ["LOCAL_RANK"] = os.environ["SLURM_LOCALID"]
        os.environ.setdefault("MASTER_ADDR", first_host(os.environ["SLURM_STEP_NODELIST"]))
        os.environ.setdefault("MASTER_PORT", str(20000 + int(os.environ.get("SLURM_JOB_ID", "0")) % 20000))
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return None
    rank = int(os.environ["RANK"])
    return OuterRank(rank, int(os.environ.get("LOCAL_RANK", rank)), int(os.environ["WORLD_SIZE"]))


def first_host(node_list: str) -> str:
    """`gpu[03-05,9],login` -> gpu03"""
    match = re.match(r"([^\[,]+)(?:\[(\w+))?", node_list)
    return "".join(part for part in match.groups() if part) if match else node_list
