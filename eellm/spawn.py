"""The ranks that a run starts for itself, on this machine, by torch's elastic agent in this process."""

from __future__ import annotations

import gc
import importlib
import logging
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from eellm.config.compose import from_yaml, to_yaml
from eellm.errors import RankFailure, UserError
from eellm.lifetime import end_with_parent
from eellm.preemption import SIGNALS, Preempted, deferred, heeded, requested
from eellm.quiet import quiet_dependencies
from eellm.tasks.context import TaskContext

_WELL_ENDED = (None, 0, *(128 + number for number in SIGNALS))
"""Exit codes of ranks that still run, are done, or have ended as they were asked to."""
_GRACE = 3.0
"""Seconds in which the other ranks can end by themselves."""

Ranks = Callable[[], list[BaseProcess]]


def spawn(context: TaskContext, tasks: str, world_size: int) -> dict[str, float]:
    """Run a task on ranks of their own and return rank 0's metrics.

    Raises what the first failing rank raised where that is a UserError, Preempted where the ranks were asked to end, else
    RankFailure. A first signal is passed on to the ranks, a second one kills them.
    """
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    quiet_elastic()
    ranks = _ranks_from_now_on()
    with (
        tempfile.TemporaryDirectory(prefix="eellm_ranks_") as reports,
        _threads_for(world_size),
        _no_survivors(ranks),
        deferred(partial(_pass_on, ranks)),
    ):
        elastic = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=world_size,
            run_id=context.run_dir.name,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            max_restarts=0,
            monitor_interval=0.1,
            start_method="spawn",
            signals_to_handle="SIGHUP,SIGQUIT",  # the others are eellm.preemption's
        )
        arguments = (to_yaml(context.config), str(context.run_dir), tasks, reports, os.getpid())
        try:
            results = elastic_launch(elastic, _rank)(*arguments)
        except ChildFailedError as error:
            raise _first_failure(Path(reports), error.failures) from None
    return results[0]


def _ranks_from_now_on() -> Ranks:
    """What lists the ranks: children of this process that run and are none of those that it has now, which are its caller's."""
    others = set(multiprocessing.active_children())
    return lambda: [child for child in multiprocessing.active_children() if child not in others]


def _pass_on(ranks: Ranks, number: int, again: bool) -> None:
    for rank in ranks():
        if rank.pid is not None and rank.is_alive():
            os.kill(rank.pid, signal.SIGKILL if again else number)


@contextmanager
def _no_survivors(ranks: Ranks) -> Iterator[None]:
    """Kill the ranks that outlive a failed one: they may wait for it in a collective, where no signal handler is run."""
    over = threading.Event()

    def watch() -> None:
        seen: set[BaseProcess] = set()
        while not over.wait(0.2):
            seen.update(ranks())
            if any(rank.exitcode not in _WELL_ENDED for rank in seen):
                over.wait(_GRACE)
                for rank in ranks():
                    rank.kill()
                return

    thread = threading.Thread(target=watch, daemon=True, name="survivors")
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _rank(text: str, path: str, tasks: str, reports: str, parent: int) -> dict[str, float] | None:
    """One spawned rank. A failure goes to a file, for the parent to raise; the process just ends."""
    end_with_parent(parent)
    rank = int(os.environ["RANK"])
    quiet_dependencies()
    try:
        with heeded(impatient=False):
            metrics = run_task(TaskContext(from_yaml(text), Path(path)), tasks)
    except (Exception, Preempted) as error:
        ours = isinstance(error, UserError | Preempted)
        raised = error if ours else RankFailure(rank_failure(rank))
        (Path(reports) / f"{time.time():020.6f}_{rank}").write_bytes(pickle.dumps(raised))
        sys.exit(error.exit_status if isinstance(error, Preempted) else 1)
    return metrics if rank == 0 else None


def run_task(context: TaskContext, tasks: str) -> dict[str, float]:
    """Run the context's task in this process, as one of its ranks; returns its metrics."""
    name = f"{tasks}.{context.config.task.name}"
    if name not in sys.modules:
        # a million objects come with torch, megatron-core and Lightning, and stay: the collector is kept from them
        gc.disable()
        try:
            importlib.import_module(name)
        finally:
            gc.enable()
        gc.freeze()
    return sys.modules[name].run(context)


def rank_failure(rank: int) -> str:
    """What to say of the exception that is being handled on a rank."""
    return f"rank {rank} failed:\n{traceback.format_exc()}"


def _first_failure(reports: Path, failures: dict[int, Any]) -> BaseException:
    """What the rank that failed first raised; the others usually fail only because it went away."""
    raised = [pickle.loads(path.read_bytes()) for path in sorted(reports.iterdir())]
    # asked to end, ranks that are gone make others fail; and a rank that is still starting up just dies of the signal
    if requested() and (not raised or any(isinstance(error, Preempted) for error in raised)):
        return Preempted(requested())
    killed = {rank: failure for rank, failure in failures.items() if failure.exitcode < 0 and failure.exitcode != -signal.SIGTERM}
    if raised and not killed:
        return raised[0]
    rank, failure = min((killed or failures).items(), key=lambda item: item[1].timestamp)
    how = f"killed by {failure.signal_name()}" if failure.exitcode < 0 else f"exit status {failure.exitcode}"
    return RankFailure(f"rank {rank} ended without a report ({how}); out of memory is the usual reason")


def quiet_elastic() -> None:
    """Elastic reports each failed and each ended child on stderr; the rank's own error is raised instead."""
    for name in list(logging.root.manager.loggerDict):
        if name.startswith(("torch.distributed.elastic", "torch.multiprocessing")):
            logging.getLogger(name).setLevel(logging.CRITICAL)  # each has a level of its own


@contextmanager
def _threads_for(ranks: int) -> Iterator[None]:
    """Share the cores out between ranks, unless the user has said how many threads each gets."""
    if "OMP_NUM_THREADS" in os.environ:
        yield
        return
    os.environ["OMP_NUM_THREADS"] = str(max(1, len(os.sched_getaffinity(0)) // ranks))
    try:
        yield
    finally:
        del os.environ["OMP_NUM_THREADS"]
