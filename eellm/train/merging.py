"""Tuned exits put into the model that they were tuned on: a whole checkpoint, whose other tensors are the source's bytes."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch

from eellm.errors import CheckpointError
from eellm.mcore.whole_tensors import LazyTensor, read_checkpoint, write_checkpoint


def merge_tuned(source: Path, tuned: Path, target: Path) -> str:
    """Write `target`: the checkpoint `source` with the exits of `tuned` in place of its own after the same layers.

    Optimizer states stay behind. Returns a hash of everything that is not a tuned exit, the same before and after; raises
    CheckpointError where it is not. One process calls this; one tensor is in memory at a time.
    """
    exits = read_checkpoint(tuned)
    replaced = tuple({f"heads.{name.split('.')[1]}." for name in exits})
    kept = {name: tensor for name, tensor in read_checkpoint(source).items() if not name.startswith(replaced)}
    before = content_hash(kept)
    write_checkpoint(target, {**kept, **exits})
    written = read_checkpoint(target)
    after = content_hash({name: written[name] for name in kept})
    if before != after:
        raise CheckpointError(
            f"{target} differs from {source} in more than the tuned exits: the disk does not keep what it is given."
        )
    return after


def content_hash(tensors: Mapping[str, LazyTensor]) -> str:
    """Of names, types, shapes and bytes, whatever the order."""
    total = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(tensors.items()):
        total.update(f"{name} {tensor.dtype} {tensor.shape} ".encode())
        total.update(tensor.read().contiguous().view(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()
