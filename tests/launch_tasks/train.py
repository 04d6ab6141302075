"""A task that stands in for training in tests of the launcher; `logger.wandb.project` says how it ends."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from eellm.errors import CheckpointError, DataError
from eellm.preemption import deferred
from eellm.tasks.context import TaskContext


def run(context: TaskContext) -> dict[str, float]:
    """Sum the ranks' numbers, or fail on rank 1 in the way asked for."""
    rank, how = int(os.environ.get("RANK", 0)), context.config.logger.wandb.project
    if how == "wait":
        (context.run_dir / "waiting").touch()
        time.sleep(60)
    if how == "wait_patiently":
        with deferred(lambda number, again: (context.run_dir / "noted").touch()):
            (context.run_dir / "waiting").touch()
            deadline = time.monotonic() + 60
            while time.monotonic() < deadline:
                time.sleep(0.1)
    if rank == 1:
        if how == "user":
            raise DataError("the corpus is gone")
        if how == "bug":
            raise KeyError("a bug")
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
    import torch
    import torch.distributed as dist

    total = torch.tensor([float(rank)])
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group("gloo")
        dist.all_reduce(total)
        dist.destroy_process_group()
    Path(context.run_dir / f"rank_{rank}").write_text(f"{context.config.parallel.dp} {torch.get_num_threads()}")
    if how == "alone" and rank == 0:
        raise CheckpointError("no such checkpoint")
    return {"val/loss/final": total.item()}
