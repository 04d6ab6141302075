"""Checkpoints as whole tensors under their global names, read and written by one process, one tensor in memory at a time.

For what needs no model and no ranks: converting, adding and moving exits, merging tuned ones. A checkpoint written here is
loaded by any layout, like one that ranks have saved.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed.checkpoint as torch_checkpoint
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.planner import WriteItem

from eellm.errors import CheckpointError, writing
from eellm.manifest import fault
from eellm.mcore.checkpoint_files import OPTIMIZER, failure_reason, make_room, name_whole, partial_path

BACKENDS = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
"""What megatron-core's `CheckpointingConfig` says of a checkpoint's form."""


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that is read when it is needed: `read()` returns [*shape] of `dtype`, anew at every call."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], torch.Tensor]

    @classmethod
    def of(cls, tensor: torch.Tensor) -> LazyTensor:
        """One that is in memory already."""
        return cls(tuple(tensor.shape), tensor.dtype, lambda: tensor)


def read_checkpoint(path: Path) -> dict[str, LazyTensor]:
    """The model's tensors of a checkpoint by global name (`layers.7.mlp.linear_fc1.weight`), in the saved type.

    Optimizer states are left out. Raises CheckpointError where the checkpoint is not whole.
    """
    wrong = fault(path)
    if wrong is not None:
        raise CheckpointError(f"cannot load the checkpoint {path}: {wrong}.")
    reader = FileSystemReader(path)
    try:
        entries = reader.read_metadata().state_dict_metadata
    except Exception as error:  # unpickling what is not a pickle raises nearly anything
        raise CheckpointError(f"cannot load the checkpoint {path}: {path / '.metadata'} cannot be read ({error!r}).") from error

    def lazy(name: str, entry: TensorStorageMetadata) -> LazyTensor:
        def read() -> torch.Tensor:
            tensor = torch.empty(entry.size, dtype=entry.properties.dtype)
            try:
                torch_checkpoint.load({name: tensor}, storage_reader=reader, no_dist=True)
            except (Exception, torch_checkpoint.CheckpointException) as error:  # the latter is no Exception
                raise CheckpointError(f"cannot read {name} of the checkpoint {path}: {failure_reason(error)}.") from error
            return tensor

        return LazyTensor(tuple(entry.size), entry.properties.dtype, read)

    tensors = {name: entry for name, entry in entries.items() if isinstance(entry, TensorStorageMetadata)}
    return {name: lazy(name, entry) for name, entry in tensors.items() if not name.startswith(OPTIMIZER)}


def write_checkpoint(path: Path, tensors: Mapping[str, LazyTensor]) -> None:
    """Write a checkpoint of these tensors; `path` appears when it is whole, and replaces what has the name.

    Raises WriteError, and whatever a tensor's `read` raises, leaving nothing behind.
    """
    partial = partial_path(path)
    make_room(partial)
    try:
        with writing(partial):
            _write(partial, tensors)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    name_whole(path)


def _write(folder: Path, tensors: Mapping[str, LazyTensor]) -> None:
    shapes = {name: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta") for name, tensor in tensors.items()}
    try:
        torch_checkpoint.save(shapes, storage_writer=FileSystemWriter(folder), planner=_Streaming(tensors), no_dist=True)
    except torch_checkpoint.CheckpointException as error:
        raise next(iter(error.failures.values()))[0] from error
    torch.save({}, folder / "common.pt")
    (folder / "metadata.json").write_text(json.dumps(BACKENDS))


class _Streaming(DefaultSavePlanner):
    """Plans with shapes alone and reads each tensor when it is its turn to be written."""

    def __init__(self, tensors: Mapping[str, LazyTensor]):
        super().__init__()
        self._tensors = tensors

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor:
        """The tensor, of the shape and type that were promised."""
        wanted = self._tensors[write_item.index.fqn]
        tensor = wanted.read()
        if tuple(tensor.shape) != wanted.shape or tensor.dtype != wanted.dtype:
            raise ValueError(
                f"{write_item.index.fqn} was read as {tensor.dtype} {list(tensor.shape)}, "
                f"announced as {wanted.dtype} {list(wanted.shape)}"
            )
        return tensor
