"""The account of a conversion: every tensor of the source is used exactly once, and every tensor of the target made once."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch

from eellm.errors import ConversionError
from eellm.mcore.whole_tensors import LazyTensor
from eellm.model.shapes import Shape

_SHOWN = 8


class Ledger:
    """Opened with what the source holds; `settle` raises one ConversionError with everything that does not add up."""

    def __init__(self, tensors: Mapping[str, LazyTensor], source: str):
        self._tensors, self._source = tensors, source
        self._used: set[str] = set()
        self._made: dict[str, LazyTensor] = {}
        self._faults: list[str] = []

    def take(self, name: str, shape: Shape) -> LazyTensor:
        """A tensor of the source, which must have this shape; where there is none, one that cannot be read."""
        found = self._tensors.get(name)
        if found is None:
            self._faults.append(f"{name} is missing (looked for {list(shape)})")
        elif name in self._used:
            self._faults.append(f"{name} is used twice")
        elif tuple(found.shape) != tuple(shape):
            self._faults.append(f"{name} is {list(found.shape)} instead of {list(shape)}")
        elif not found.dtype.is_floating_point:
            self._faults.append(f"{name} holds {_plain(found.dtype)}, not floating-point numbers")
        self._used.add(name)
        return found or LazyTensor(tuple(shape), torch.float32, lambda: torch.empty(shape))

    def holds(self, name: str) -> bool:
        return name in self._tensors

    def leave(self, pattern: str) -> None:
        """Tensors that are no weights of the model, by their whole names."""
        self._used |= {name for name in self._tensors if re.fullmatch(pattern, name)}

    def make(self, name: str, tensor: LazyTensor) -> None:
        if name in self._made:
            self._faults.append(f"{name} would be written twice")
        self._made[name] = tensor

    def fault(self, what: str) -> None:
        self._faults.append(what)

    def settle(self, wanted: Iterable[str]) -> dict[str, LazyTensor]:
        """What was made, once it is exactly what is `wanted`. Raises ConversionError naming tensors."""
        wanted = set(wanted)
        faults = [
            *self._faults,
            *(f"{name} is in the source and nothing of the model" for name in sorted(set(self._tensors) - self._used)),
            *(f"{name} would not be written" for name in sorted(wanted - set(self._made))),
            *(f"{name} is nothing of the model" for name in sorted(set(self._made) - wanted)),
        ]
        if faults:
            more = f"\n  ... ({len(faults)} in all)" if len(faults) > _SHOWN else ""
            raise ConversionError("\n  ".join([f"{self._source} cannot be converted:", *faults[:_SHOWN]]) + more)
        return self._made


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
