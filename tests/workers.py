"""One group of forked processes per world size, reused by all tests.

`run(world_size, function, *args)` calls a top-level function on every rank with its rank and the arguments, in a fresh
process group, and returns the list of results. A rank that raises fails the test with its traceback, one that dies with its
exit code, one that hangs for `TIMEOUT` seconds with its stack; the group is then replaced.
"""

from __future__ import annotations

import atexit
import datetime
import faulthandler
import gc
import os
import queue
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch.distributed as dist

from tests.forking import CONTEXT, fork

TIMEOUT = 110

MAX_THREADS = 150
"""A worker with more is replaced: gloo's threads outlive their groups, and hundreds of them that poll slow everything down."""


class RankFailed(AssertionError):
    """At least one rank raised or hung; the message holds their tracebacks."""


def _serve(rank: int, world_size: int, stack_file: str, inbox: Any, outbox: Any) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch

    from eellm.mcore.groups import destroy_groups

    torch.set_num_threads(1)
    stacks = open(stack_file, "w")  # noqa: SIM115
    while True:
        faulthandler.register(signal.SIGUSR2, file=stacks, all_threads=True)  # a task may have handled it otherwise
        work = inbox.get()
        if work is None:
            return
        port, function, args = work
        try:
            store = dist.TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False)
            dist.init_process_group(
                "gloo", store=store, rank=rank, world_size=world_size, timeout=datetime.timedelta(seconds=TIMEOUT)
            )
            dist.barrier()  # who is done at once must not leave before the others have connected to it
            outbox.put((rank, True, function(rank, *args)))
        except BaseException:
            outbox.put((rank, False, traceback.format_exc()))
        finally:
            destroy_groups()
            gc.collect()  # gloo's threads poll until their group is gone, and a trainer's cycles would hold it


class Workers:
    """`world_size` processes waiting for work."""

    def __init__(self, world_size: int):
        self.world_size = world_size
        self.outbox = CONTEXT.Queue()
        self.inboxes = [CONTEXT.Queue() for _ in range(world_size)]
        folder = tempfile.mkdtemp()
        self.stacks = [Path(folder) / f"rank_{rank}" for rank in range(world_size)]
        self.processes = [
            fork(_serve, rank, world_size, str(self.stacks[rank]), inbox, self.outbox) for rank, inbox in enumerate(self.inboxes)
        ]

    def run(self, function: Callable[..., Any], args: tuple) -> list[Any]:
        # held here: a port that is found free first and listened at later may be somebody else's by then
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        for inbox in self.inboxes:
            inbox.put((store.port, function, args))
        results: dict[int, Any] = {}
        failures: dict[int, str] = {}
        while len(results) + len(failures) < self.world_size:
            try:
                # once a rank failed, the others only wait for it
                rank, succeeded, value = self._answer({*results, *failures}, timeout=10 if failures else TIMEOUT)
            except queue.Empty:
                silent = self._silence(set(range(self.world_size)) - set(results) - set(failures))
                self.stop()
                raise RankFailed("\n".join([*failures.values(), silent])) from None
            (results if succeeded else failures)[rank] = value
        if failures:
            raise RankFailed("\n".join(f"rank {rank}:\n{text}" for rank, text in sorted(failures.items())))
        if max(psutil.Process(process.pid).num_threads() for process in self.processes) > MAX_THREADS:
            self.stop(patience=5.0)
        return [results[rank] for rank in range(self.world_size)]

    def _answer(self, answered: set[int], timeout: float) -> tuple[int, bool, Any]:
        """The next rank's answer. Raises queue.Empty after the time, or at once where a rank that owes one has died."""
        deadline = time.monotonic() + timeout
        while True:
            died = any(not process.is_alive() for rank, process in enumerate(self.processes) if rank not in answered)
            try:
                return self.outbox.get(timeout=0.5)  # what a rank sent before it died is still there
            except queue.Empty:
                if died or time.monotonic() > deadline:
                    raise

    def _silence(self, ranks: set[int]) -> str:
        """What became of ranks that do not answer: where they hang, or how they ended."""
        hung = [rank for rank in ranks if self.processes[rank].is_alive()]
        for rank in hung:
            os.kill(self.processes[rank].pid, signal.SIGUSR2)
        time.sleep(1)
        said = {rank: f"hung:\n{self.stacks[rank].read_text()}" for rank in hung if self.stacks[rank].exists()}
        said |= {rank: "was still starting" for rank in hung if rank not in said}
        return "\n".join(
            f"rank {rank} {said.get(rank, f'died with exit code {self.processes[rank].exitcode}')}" for rank in sorted(ranks)
        )

    def stop(self, patience: float = 0.0) -> None:
        """Ranks are no daemons, since saving a checkpoint starts processes; an idle rank ends by itself when told to."""
        for inbox in self.inboxes:
            inbox.put(None)
        for process in self.processes:
            process.join(patience)
            process.kill()
        if _GROUPS.get(self.world_size) is self:
            del _GROUPS[self.world_size]


_GROUPS: dict[int, Workers] = {}


def run(world_size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    if world_size not in _GROUPS:
        _GROUPS[world_size] = Workers(world_size)
    return _GROUPS[world_size].run(function, args)


@atexit.register
def _stop_all() -> None:
    for workers in list(_GROUPS.values()):
        workers.stop(patience=5.0)
