"""Exact memory of a piece of work: the bytes of every tensor storage that it creates, while they are alive.

Counted are storages that an operation made, from the operation on until the last tensor over them is gone. What was
there before the work (parameters, gradient buffers, inputs) is not counted, nor is what a kernel allocates and frees
within itself, nor what an allocator rounds up or keeps.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveStorages(TorchDispatchMode):
    """While entered: `current` bytes alive of those created since, and their `peak`.

    A storage that is in an operation's output and not in its input is new; views and in-place results share their
    input's. A storage is counted once, however many tensors look at it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.current = 0
        self.peak = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        known = {storage._cdata for storage in _storages((args, kwargs))}
        for storage in _storages(result):
            if storage._cdata in self._sizes or storage._cdata not in known:
                self._count(storage)
        self.peak = max(self.peak, self.current)
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        """Count a new storage, or one that an `out=` has resized."""
        address, size = storage._cdata, storage.nbytes()
        if address not in self._sizes:
            weakref.finalize(storage, self._release, address)
        self.current += size - self._sizes.get(address, 0)
        self._sizes[address] = size

    def _release(self, address: int) -> None:
        self.current -= self._sizes.pop(address)


def _storages(tree: Any) -> Iterator[torch.UntypedStorage]:
    for leaf in tree_leaves(tree):
        if isinstance(leaf, torch.Tensor):
            yield leaf.untyped_storage()


def peak_bytes(work: Callable[[], object]) -> int:
    """Most bytes that were alive at a time of what `work` created."""
    with LiveStorages() as storages:
        work()
    return storages.peak
