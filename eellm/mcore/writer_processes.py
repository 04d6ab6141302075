"""The processes that megatron-core starts to write a checkpoint."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.managers import SyncManager

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
        _start_results_queue()
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


def _start_results_queue() -> None:
    """The queue that megatron-core would make itself, in a process of its own, which does not end with this one."""
    if filesystem_async._results_queue is None:
        manager = SyncManager(ctx=multiprocessing.get_context("spawn"))
        manager.start(end_with_parent, (os.getpid(),))
        filesystem_async._results_queue = manager.Queue()
