"""What is known of checkpoints without megatron-core: importing it takes as long as all else that converting a model needs."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from torch.distributed.checkpoint import CheckpointException

from eellm.errors import writing
from eellm.manifest import write_manifest

OPTIMIZER = "optimizer."
"""Keys of optimizer states begin with this; all other tensors are the model's."""

PARTIAL = ".partial"


def partial_path(path: Path) -> Path:
    """Where a checkpoint lies while it is written."""
    return path.with_name(path.name + PARTIAL)


def name_whole(path: Path) -> None:
    """Declare the checkpoint at `partial_path(path)` whole and give it its name."""
    replaced = path.with_name(f"{path.name}.replaced{PARTIAL}")
    with writing(path):
        write_manifest(partial_path(path))
        if path.exists():
            os.replace(path, replaced)
        os.replace(partial_path(path), path)
        shutil.rmtree(replaced, ignore_errors=True)


def make_room(partial: Path) -> None:
    """An empty folder for a checkpoint; what interrupted writes have left beside it goes."""
    with writing(partial):
        for stale in partial.parent.glob(f"*{PARTIAL}"):
            shutil.rmtree(stale)
        partial.mkdir(parents=True)


def failure_reason(error: BaseException) -> str:
    """Why reading or writing failed: of a collective failure, what the first rank that says anything reports."""
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    return str(error).removeprefix("Worker failure: ").strip().rstrip(".") or type(error).__name__
