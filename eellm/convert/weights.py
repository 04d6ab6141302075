"""How the weights of a family become ours and ours become theirs: for each of our parameters one link to some of theirs.

Shape legend: g key/value groups, p query heads per group, d channels of a head.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from eellm.convert.families import Family, Form, Weights
from eellm.model.shapes import Shape, parameter_shapes
from eellm.model.spec import ExitSpec, ModelSpec

_LAYER = re.compile(r"layers\.(\d+)\.")

EXIT = "heads.exit_"
"""Names of what belongs to exits begin with this; everything else is the backbone's."""


@dataclass(frozen=True)
class Link:
    """One of our parameters, and the tensors of theirs that are the same weights, with their shapes."""

    ours: str
    shape: Shape
    theirs: tuple[str, ...]
    shapes: tuple[Shape, ...]
    join: Callable[[Sequence[torch.Tensor]], torch.Tensor]
    split: Callable[[torch.Tensor], Sequence[torch.Tensor]]


def links(family: Family, spec: ModelSpec) -> list[Link]:
    """One link for each parameter of the backbone, in the order of the network."""
    backbone = {name: shape for name, shape in parameter_shapes(spec).items() if not name.startswith(EXIT)}
    return [_link(family, spec, name, shape) for name, shape in backbone.items()]


def exit_links(family: Family, spec: ModelSpec, exit_: ExitSpec) -> list[Link]:
    """One link for each parameter of an exit; theirs are those of `eellm.convert.modeling_early_exit.Exit`."""
    prefix = f"heads.{exit_.name}."
    own = {name: shape for name, shape in parameter_shapes(spec).items() if name.startswith(prefix)}
    return [_made(spec, name, shape, _of_an_exit(family, name.removeprefix(prefix))) for name, shape in own.items()]


def _link(family: Family, spec: ModelSpec, name: str, shape: Shape) -> Link:
    module = name.rpartition(".")[0]
    layer = _LAYER.match(module)
    weights = family.weights[_LAYER.sub("layers.{n}.", module)]
    number = int(layer[1]) - 1 if layer else 0
    return _made(spec, name, shape, Weights(weights.form, tuple(module.format(i=number) for module in weights.modules)))


def _of_an_exit(family: Family, name: str) -> Weights:
    """Blocks and MLPs have a layer's modules, under the names that these have below a layer."""
    module = name.rpartition(".")[0]
    if module in ("norm", "mlp_norm"):
        return Weights("same", (module,))
    if module == "output":
        return Weights("rows", (module,))
    block = "block." if module.startswith("block.") else ""
    weights = family.weights["layers.{n}." + module.removeprefix(block)]
    return Weights(weights.form, tuple(block + theirs.partition("{i}.")[2] for theirs in weights.modules))


def _made(spec: ModelSpec, name: str, shape: Shape, weights: Weights) -> Link:
    kind = name.rpartition(".")[2]
    return Link(name, shape, tuple(f"{module}.{kind}" for module in weights.modules), *_FORMS[weights.form](spec, shape))


_Made = tuple[
    tuple[Shape, ...], Callable[[Sequence[torch.Tensor]], torch.Tensor], Callable[[torch.Tensor], Sequence[torch.Tensor]]
]
"""(their shapes, theirs to ours, ours to theirs)"""


def _same(spec: ModelSpec, shape: Shape) -> _Made:
    return (shape,), lambda theirs: theirs[0], lambda ours: [ours]


def _rows(spec: ModelSpec, shape: Shape) -> _Made:
    """Ours has rows that pad the vocabulary; they are 0 and take no probability."""
    padding = spec.padded_vocab_size - spec.vocab_size

    def join(theirs: Sequence[torch.Tensor]) -> torch.Tensor:
        return torch.nn.functional.pad(theirs[0], (0, 0, 0, padding)) if padding else theirs[0]

    return ((spec.vocab_size, *shape[1:]),), join, lambda ours: [ours[: spec.vocab_size]]


def _transposed(spec: ModelSpec, shape: Shape) -> _Made:
    """GPT-2's Conv1D stores matrices as [in, out]; a bias is a bias."""
    if len(shape) == 1:
        return _same(spec, shape)
    return (shape[::-1],), lambda theirs: theirs[0].t(), lambda ours: [ours.t()]


def _stacked(spec: ModelSpec, shape: Shape) -> _Made:
    half = (shape[0] // 2, *shape[1:])
    return (half, half), lambda theirs: torch.cat(tuple(theirs)), lambda ours: ours.chunk(2)


def _grouped(spec: ModelSpec, shape: Shape) -> _Made:
    """Queries, keys and values for all heads each; megatron-core has a group's p queries, its key and its value together."""
    groups, width, rest = spec.num_query_groups, spec.head_dim, shape[1:]
    per_group = spec.num_heads // groups
    key = (groups * width, *rest)

    def join(theirs: Sequence[torch.Tensor]) -> torch.Tensor:
        return torch.cat([part.reshape(groups, -1, *rest) for part in theirs], dim=1).reshape(shape)

    def split(ours: torch.Tensor) -> list[torch.Tensor]:
        parts = ours.reshape(groups, (per_group + 2) * width, *rest).split((per_group * width, width, width), dim=1)
        return [part.flatten(0, 1) for part in parts]

    return ((groups * per_group * width, *rest), key, key), join, split


def _thirds(spec: ModelSpec, shape: Shape) -> _Made:
    """GPT-2's queries, keys and values in one Conv1D, behind each other."""
    (whole,), upright, lying = _transposed(spec, shape)
    _, join, split = _grouped(spec, shape)
    return (
        (whole,),
        lambda theirs: join(upright(theirs).chunk(3)),
        lambda ours: lying(torch.cat(tuple(split(ours)))),
    )


_FORMS: dict[Form, Callable[[ModelSpec, Shape], _Made]] = {
    "same": _same,
    "rows": _rows,
    "transposed": _transposed,
    "stacked": _stacked,
    "grouped": _grouped,
    "thirds": _thirds,
}
