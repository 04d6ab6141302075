"""Stands in for a CUDA graph where there is no CUDA: records the operations on tensors that a function makes, and repeats them
on the same tensors. What the function reads elsewhere is frozen as it was, as in a graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class _Record(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, tuple, dict, list[torch.Tensor]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        given = {_storage(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)}
        made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        fresh = [tensor for tensor in made if _storage(tensor) not in given]
        assert func is not torch.ops.aten._local_scalar_dense.default, "a graph cannot tell the host what a tensor holds"
        if fresh or func._schema.is_mutable:  # a view needs no repeating
            self.operations.append((func, args, kwargs, made if fresh else []))
        return out


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class Recorder:
    """`capture` in place of `cuda_capture`; counts what it has captured and replayed."""

    def __init__(self) -> None:
        self.captured, self.replayed = 0, 0

    def capture(self, run: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        self.captured += 1
        run()  # as the real one does
        with _Record() as record:
            out = run()

        def replay() -> torch.Tensor:
            self.replayed += 1
            for func, args, kwargs, made in record.operations:
                again = [leaf for leaf in tree_leaves(func(*args, **kwargs)) if isinstance(leaf, torch.Tensor)]
                for tensor, value in zip(made, again, strict=bool(made)):
                    tensor.copy_(value)
            return out

        return replay
