"""Exits are added to, moved in and dropped from a checkpoint, without ranks; what stays or moves keeps its bytes."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch

from eellm.convert.exit_origins import exit_origins
from eellm.convert.ledger import Ledger
from eellm.convert.weights import EXIT
from eellm.mcore.whole_tensors import LazyTensor
from eellm.model.initialise import initial_value, source_name
from eellm.model.shapes import Shape, parameter_shapes
from eellm.model.spec import ExitSpec, ModelSpec

_OF_AN_EXIT = re.compile(r"heads\.exit_(\d+)\.(.+)")


def edited_tensors(
    tensors: Mapping[str, LazyTensor], before: ModelSpec, after: ModelSpec, moves: Mapping[int, int], seed: int
) -> dict[str, LazyTensor]:
    """A checkpoint's tensors with the exits of `after` in place of those of `before`; the backbone is the same.

    Norm, MLP, block and output matrix of an exit stay or move together (`exit_origins`); what is new is initialised by
    `after.exit_init`. Raises ConversionError naming the tensors that the checkpoint lacks or that belong to nothing.
    """
    ledger = Ledger(tensors, "the checkpoint")
    origins = exit_origins(before.exits, after.exits, moves)
    there, wanted = parameter_shapes(before), parameter_shapes(after)
    backbone = {name: ledger.take(name, shape) for name, shape in wanted.items() if not name.startswith(EXIT)}
    for name, shape in wanted.items():
        source = _origin(name, origins)
        if name in backbone:
            ledger.make(name, backbone[name])
        elif source in there:
            ledger.make(name, ledger.take(source, shape))
        else:
            ledger.make(name, initial_exit_tensor(after, name, shape, backbone, seed))
    for exit_ in before.exits:
        if exit_.layer not in origins.values():
            ledger.leave(rf"heads\.{exit_.name}\..*")
    return ledger.settle(wanted)


def initial_exit_tensor(spec: ModelSpec, name: str, shape: Shape, backbone: Mapping[str, LazyTensor], seed: int) -> LazyTensor:
    """A parameter of a new exit, in the backbone's type: the copy that `exits.init` asks for, or what training starts from."""
    source = source_name(spec, name)
    if source in backbone:
        return backbone[source]
    dtype: torch.dtype = backbone["embedding.tokens.weight"].dtype
    return LazyTensor(shape, dtype, lambda: initial_value(spec, name, shape, seed).to(dtype))


def _origin(name: str, origins: Mapping[int, int | None]) -> str | None:
    """The parameter of the exit that an exit's parameter comes from; None where there is none."""
    match = _OF_AN_EXIT.fullmatch(name)
    layer = None if match is None else origins[int(match[1])]
    return None if match is None or layer is None else f"heads.{ExitSpec(layer).name}.{match[2]}"
