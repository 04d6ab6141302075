"""Functions that run on several ranks: on freshly forked processes, in a process group of their own.

`run(world_size, function, *args)` calls a top-level function on every rank with its rank and the arguments and returns the
list of results. A rank that raises fails the test with its traceback, one that dies with its exit code, one that hangs for
`TIMEOUT` seconds with its stack.
"""

from __future__ import annotations

import datetime
import faulthandler
import os
import queue
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from eellm.config.compose import compose
from eellm.config.schema import Config
from tests.forking import CONTEXT, fork

TIMEOUT = 110


class RankFailed(AssertionError):
    """At least one rank raised, died or hung; the message says of each how."""


def run(world_size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    with tempfile.TemporaryDirectory() as stacks:
        return Ranks(world_size, Path(stacks), function, args).results()


def composed(overrides: list[str]) -> Config:
    """`compose` on a rank: one composes for all, since it takes a third of a second of a core that they share."""
    box = [compose(overrides) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(box)
    assert box[0] is not None
    return box[0]


class Ranks:
    """Processes that call a function each and stay until their results have been read."""

    def __init__(self, world_size: int, stacks: Path, function: Callable[..., Any], args: tuple):
        # held here: a port that is found free first and listened at later may be somebody else's by then
        self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.outbox = CONTEXT.Queue()
        self.done = CONTEXT.Event()
        self.stacks = [stacks / f"rank_{rank}" for rank in range(world_size)]
        self.processes = [
            fork(_rank, rank, world_size, self.store.port, stack, self.outbox, self.done, function, args)
            for rank, stack in enumerate(self.stacks)
        ]

    def results(self) -> list[Any]:
        try:
            return self._results()
        finally:
            self.done.set()
            for process in self.processes:
                process.join(5.0)
                process.kill()

    def _results(self) -> list[Any]:
        results: dict[int, Any] = {}
        failures: dict[int, str] = {}
        while len(results) + len(failures) < len(self.processes):
            try:
                # once a rank failed, the others only wait for it
                rank, succeeded, value = self._answer({*results, *failures}, timeout=10 if failures else TIMEOUT)
            except queue.Empty:
                silent = self._silence(set(range(len(self.processes))) - set(results) - set(failures))
                raise RankFailed("\n".join([*failures.values(), silent])) from None
            (results if succeeded else failures)[rank] = value
        if failures:
            raise RankFailed("\n".join(f"rank {rank}:\n{text}" for rank, text in sorted(failures.items())))
        return [results[rank] for rank in range(len(self.processes))]

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


def _rank(
    rank: int, world_size: int, port: int, stack: Path, outbox: Any, done: Any, function: Callable[..., Any], args: tuple
) -> None:
    from eellm.mcore.groups import destroy_groups  # megatron-core is for the ranks, not for the process of the tests

    os.environ["OMP_NUM_THREADS"] = "1"  # of what a rank starts itself
    torch.set_num_threads(1)
    with stack.open("w") as file:
        faulthandler.register(signal.SIGUSR2, file=file, all_threads=True)
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
            done.wait()  # tensors are read from the process that sends them
