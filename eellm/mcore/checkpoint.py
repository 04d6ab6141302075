"""Reading checkpoints in megatron-core's distributed format: keys name whole tensors, so any layout loads what any other saved.

Every function is called by all ranks together, and whatever is wrong with a checkpoint is raised by all of them: a rank
that failed alone would leave the others waiting.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch.distributed.checkpoint import CheckpointException, FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from eellm.errors import CheckpointError, UserError
from eellm.manifest import fault
from eellm.mcore.checkpoint_files import OPTIMIZER, failure_reason
from eellm.mcore.cpu import cpu_stand_ins

T = TypeVar("T")

Shapes = Mapping[str, tuple[int, ...]]
"""Global name -> shape of the whole tensor."""


def model_state(stages: Sequence[Any]) -> dict[str, Any]:
    """Sharded view of this rank's stages. The keys of the dictionary are local; those of its tensors are global."""
    return {f"stage_{stage.stage_spec.index}": _tensors_only(stage.sharded_state_dict()) for stage in stages}


def _tensors_only(state: dict[str, Any]) -> dict[str, Any]:
    """Without the places that megatron-core's linear layers keep for Transformer Engine's fp8 state, which ours never have."""
    return {name: value for name, value in state.items() if not name.endswith("_extra_state")}


def load_model_state(stages: Sequence[Any], state: Mapping[str, Any]) -> None:
    for stage in stages:
        stage.load_state_dict(state[f"stage_{stage.stage_spec.index}"])


def trained_state(stages: Sequence[Any]) -> dict[str, Any]:
    """`model_state` without what is frozen: of a model that trains as a whole, all of it."""
    states = model_state(stages).items()
    return {name: {key: tensor for key, tensor in state.items() if tensor.data.requires_grad} for name, state in states}


def load_trained_state(stages: Sequence[Any], state: Mapping[str, Any]) -> None:
    for stage in stages:
        missing, unexpected = stage.load_state_dict(state.get(f"stage_{stage.stage_spec.index}", {}), strict=False)
        lost = [name for name in missing if stage.get_parameter(name).requires_grad]
        assert not lost, f"not in the checkpoint: {lost}"
        assert not unexpected, f"not in the stage: {unexpected}"


def load(path: Path, template: dict[str, Any]) -> dict[str, Any]:
    """Fill a sharded template; what is not in it but in the checkpoint's common part comes along.

    The checkpoint's model must be the template's, tensor by tensor; optimizer states that the template leaves out stay
    unread. Raises CheckpointError naming what was looked for and found: a checkpoint is loaded whole or not at all.
    """
    there, wanted = saved_shapes(path), template_shapes(template)
    foreign = {key for key in there if not key.startswith(OPTIMIZER)} - set(wanted)
    check_shapes(path, there, wanted)
    if foreign:
        raise CheckpointError(f"{path} is of another model: it also has {_some(foreign)}.")
    return load_checked(path, template)


def load_stages(path: Path, stages: Sequence[Any]) -> None:
    """Weights only, on whatever layout the stages have."""
    load_model_state(stages, load(path, model_state(stages)))


def saved_shapes(path: Path) -> Shapes:
    """What a checkpoint holds. Raises CheckpointError where it is not whole."""

    def read() -> Shapes:
        wrong = fault(path)
        if wrong is not None:
            raise CheckpointError(f"cannot load the checkpoint {path}: {wrong}.")
        try:
            tensors = FileSystemReader(path).read_metadata().state_dict_metadata
        except Exception as error:  # unpickling what is not a pickle raises nearly anything
            raise CheckpointError(
                f"cannot load the checkpoint {path}: {path / '.metadata'} cannot be read ({error!r})."
            ) from error
        return {key: tuple(entry.size) for key, entry in tensors.items() if isinstance(entry, TensorStorageMetadata)}

    return from_main_rank(read)


def template_shapes(template: Any) -> Shapes:
    """What the templates of all ranks ask for."""
    mine = {tensor.key: tuple(tensor.global_shape) for tensor in _sharded_tensors(template)}
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, mine)
    return {key: shape for part in parts for key, shape in part.items()}


def check_shapes(path: Path, there: Shapes, wanted: Shapes) -> None:
    """Raise CheckpointError unless every wanted tensor is there, in its shape."""
    missing = set(wanted) - set(there)
    if missing:
        raise CheckpointError(
            f"{path} is of another model: looked for {_some(missing)}, found {_some(set(there) - set(wanted))}."
        )
    others = [key for key in sorted(wanted) if wanted[key] != there[key]]
    if others:
        shapes = ", ".join(f"{key} {list(there[key])} instead of {list(wanted[key])}" for key in others[:4])
        raise CheckpointError(f"{path} is of another model: {len(others)} tensors differ in shape: {shapes}.")


def load_checked(path: Path, template: dict[str, Any]) -> dict[str, Any]:
    """`dist_checkpointing.load` of a template whose keys and shapes are known to fit."""
    try:
        with cpu_stand_ins():
            return dist_checkpointing.load(template, str(path))
    except (Exception, CheckpointException) as error:  # the latter is no Exception
        raise CheckpointError(f"cannot load the checkpoint {path}: {failure_reason(error)}.") from error


def from_main_rank(action: Callable[[], T]) -> T:
    """What `action` returns, or the UserError that it raises, on rank 0: the same on all ranks."""
    box: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            box[0] = action()
        except UserError as error:
            box[1] = error
    dist.broadcast_object_list(box, 0)
    if box[1] is not None:
        raise box[1]
    return box[0]


def _sharded_tensors(template: Any) -> Iterator[ShardedTensor]:
    for leaf in nested_values(template):
        if isinstance(leaf, ShardedTensorFactory):
            yield from nested_values(leaf.build())
        elif isinstance(leaf, ShardedTensor):
            yield leaf


def _some(keys: set[str]) -> str:
    """The first few keys of a set and how many there are."""
    shown = ", ".join(sorted(keys)[:4]) or "nothing else"
    return shown if len(keys) <= 4 else f"{shown}, ... ({len(keys)} in all)"
