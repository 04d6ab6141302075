"""The processes that megatron-core starts to write a checkpoint."""

from __future__ import annotations

import errno
import os
import pickle
import queue
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from megatron.core.dist_checkpointing.strategies import filesystem_async

from eellm.lifetime import end_with_parent
from eellm.preemption import SIGNALS


@contextmanager
def bound_children() -> Iterator[None]:
    """Processes started inside end with this one, and are spared the signals that ask it to end: they have its checkpoint.

    A forked child that outlived its rank would hold the rank's sockets, and neither its peers nor its parent would see it die.
    """
    global _starting
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # inherited; a signal that arrives meanwhile waits
    _starting = os.getpid()
    try:
        filesystem_async._results_queue = _Results()  # a new one: what a failed write may have left is not this one's
        yield
    finally:
        _starting = 0
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


_starting = 0
"""The process that is starting writers."""


def _after_fork() -> None:
    if _starting:
        end_with_parent(os.getppid())


os.register_at_fork(after_in_child=_after_fork)


class _Results:
    """Hands a writer's results to its parent through a file that both have open: the two methods of a queue that megatron-core
    asks for. Its own queue lives in a process that it starts, which takes seconds and does not end with this one."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115

    def put(self, results: Any) -> None:
        data = pickle.dumps(results)
        self._empty()
        if self._file.write(data) != len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), tempfile.gettempdir())

    def get_nowait(self) -> Any:
        """Once the writer has ended. Raises queue.Empty where it has left nothing."""
        self._file.seek(0)
        data = self._file.read()
        if not data:
            raise queue.Empty
        self._empty()
        return pickle.loads(data)

    def _empty(self) -> None:
        self._file.seek(0)
        self._file.truncate()
