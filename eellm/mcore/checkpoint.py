"""Checkpoints in megatron-core's distributed format: keys name whole tensors, so any layout can load what any other saved.

A checkpoint is a folder, written beside its place and renamed when whole.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException

from eellm.errors import CheckpointError
from eellm.mcore.cpu import cpu_stand_ins


def model_state(stages: Sequence[Any]) -> dict[str, Any]:
    """Sharded view of this rank's stages. The keys of the dictionary are local; those of its tensors are global."""
    return {f"stage_{stage.stage_spec.index}": stage.sharded_state_dict() for stage in stages}


def load_model_state(stages: Sequence[Any], state: Mapping[str, Any]) -> None:
    for stage in stages:
        stage.load_state_dict(state[f"stage_{stage.stage_spec.index}"])


def save(path: Path, state: dict[str, Any]) -> None:
    """All ranks save together; the folder appears under its name only when it is complete."""
    partial = path.with_name(path.name + ".partial")
    if dist.get_rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier()
    with cpu_stand_ins():
        dist_checkpointing.save(state, str(partial))
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(path, ignore_errors=True)
        os.replace(partial, path)
    dist.barrier()


def load(path: Path, template: dict[str, Any]) -> dict[str, Any]:
    """Fill a sharded template; what is not in it but in the checkpoint's common part comes along.

    Raises CheckpointError naming what was looked for: a checkpoint is loaded whole or not at all.
    """
    try:
        with cpu_stand_ins():
            return dist_checkpointing.load(template, str(path))
    except (CheckpointingException, KeyError, OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"cannot load the checkpoint {path}: {error}") from error


def load_stages(path: Path, stages: Sequence[Any]) -> None:
    """Weights only, on whatever layout the stages have."""
    load_model_state(stages, load(path, model_state(stages)))
