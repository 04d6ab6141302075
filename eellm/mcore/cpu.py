"""Stand-ins that let megatron-core run without CUDA.

megatron-core names CUDA in its constructors, schedules, optimizer and checkpoint code. `cpu_stand_ins` is
entered around exactly those calls where there is no CUDA, and does nothing where there is. It is never
process-wide: the function mode doubles the cost of small operations and belongs to one thread.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode

_active = threading.local()


class _CudaToCpu(TorchFunctionMode):
    """Redirects `device="cuda"` to the CPU and answers megatron-core's checks of CUDA tensor types."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        device = kwargs.get("device")
        if device is not None and torch.device(device).type == "cuda":
            kwargs = {**kwargs, "device": "cpu"}
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            # optimizer and clipping compare type() with 'torch.cuda.FloatTensor'
            name = func(*args)
            return name if "cuda" in name else name.replace("torch.", "torch.cuda.")
        return func(*args, **kwargs)


class _NoStream:
    """A CUDA stream on which everything has already happened."""

    def wait_stream(self, _: Any) -> None:
        pass

    def synchronize(self) -> None:
        pass


@contextlib.contextmanager
def cpu_stand_ins() -> Iterator[None]:
    """Enter around megatron-core's constructors, schedules, optimizer and checkpoint calls; re-entrant."""
    if torch.cuda.is_available() or getattr(_active, "entered", False):
        yield
        return
    import megatron.core.tensor_parallel.random as mcore_random

    logging.getLogger(mcore_random.__name__).setLevel(logging.ERROR)
    cuda = {
        "current_device": lambda: torch.device("cpu"),
        "current_stream": lambda *_: _NoStream(),
        "stream": lambda *_: contextlib.nullcontext(),
        "synchronize": lambda *_: None,
        "get_rng_state": lambda *_: torch.get_rng_state(),
        "manual_seed": torch.manual_seed,
    }
    rng = {
        "_get_cuda_rng_state": lambda *_, **__: torch.get_rng_state(),
        "_set_cuda_rng_state": lambda state, *_, **__: torch.set_rng_state(state),
    }
    with contextlib.ExitStack() as stack:
        for name, stand_in in cuda.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, stand_in))
        for name, stand_in in rng.items():
            stack.enter_context(mock.patch.object(mcore_random, name, stand_in))
        stack.enter_context(_CudaToCpu())
        _active.entered = True
        try:
            yield
        finally:
            _active.entered = False
