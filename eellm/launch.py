"""Start the ranks of a run, or join those that an outer launcher (torchrun, srun) started, and run the task in them.

Hydra runs once, in the parent or in rank 0; every other rank is handed the resolved YAML.
"""

from __future__ import annotations

import importlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from eellm.config.compose import from_yaml, to_yaml
from eellm.config.schema import Config
from eellm.errors import ConfigError, Problem, RankFailure, UserError
from eellm.lifetime import end_with_parent
from eellm.outer import OuterRank, outer_rank
from eellm.preemption import Preempted, heeded
from eellm.quiet import quiet_dependencies
from eellm.rundir import RunDirectory
from eellm.spawn import rank_failure, run_task, spawn
from eellm.tasks.context import TaskContext

if TYPE_CHECKING:
    from torch.distributed import Store

TASKS = "eellm.tasks"

_PREPARE_TIMEOUT = timedelta(hours=2)
"""How long ranks wait for rank 0 to tokenise a corpus."""
_GRACE = 15.0
"""Seconds in which a rank can end by itself after another one has failed."""


def launch(config: Config, run: RunDirectory, tasks: str = TASKS) -> dict[str, float]:
    """Run the config's task on all its ranks and return its final metrics.

    `tasks` is the package of the task modules, whose `run(context)` is called on every rank. Its module `before_ranks` has
    `prepare(context)`, called once before the ranks start, and the names of the tasks that run `WITHOUT_RANKS`. Raises what a
    rank raised where that is a UserError, Preempted where a signal asked the run to end, else RankFailure.
    """
    outer = outer_rank()
    _end_with_torchrun()
    config = with_data_parallel(config, outer)
    context = TaskContext(config, run.path)
    quiet_dependencies()
    with heeded(impatient=outer is None or outer.world_size == 1), recorded(run), _others_failures(outer):
        before_ranks = importlib.import_module(f"{tasks}.before_ranks")
        without_ranks = config.task.name in before_ranks.WITHOUT_RANKS
        if not without_ranks:
            check_devices(config, int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if outer else ranks_of(config))
        before_ranks.prepare(context)
        if without_ranks:
            metrics = run_task(context, tasks)
        elif outer is not None and outer.world_size > 1:
            store = _meeting_point()
            store.set("run", json.dumps([to_yaml(config), str(run.path), tasks]))
            with _ending_with_others(store, lambda problem: run.write_status("failed", problem)):
                metrics = run_task(context, tasks)
        elif outer is not None or ranks_of(config) == 1:
            metrics = run_task(context, tasks)
        else:
            metrics = spawn(context, tasks, ranks_of(config))
        run.write_metrics(metrics)
    return metrics


def follow() -> int:
    """What every outer rank but 0 does: wait for rank 0's config, run its task, return the exit status."""
    outer = outer_rank()
    assert outer is not None
    _end_with_torchrun()
    quiet_dependencies()
    try:
        with heeded(impatient=False):
            return _follow(outer)
    except Preempted as preempted:
        return preempted.exit_status


def _follow(outer: OuterRank) -> int:
    store = _meeting_point()
    message = store.get("run")
    if not message:
        store.add("stopped", 1)
        return 1
    text, path, tasks = json.loads(message)
    try:
        context = TaskContext(from_yaml(text), Path(path))
        with _ending_with_others(store):
            _prepare_once_a_host(context, tasks, outer, store)
            run_task(context, tasks)
    except Exception as error:
        sys.stderr.write(f"{_report_failure(store, outer.rank, error)}\n")
        return 1
    return 0


def _report_failure(store: Store, rank: int, error: Exception) -> str:
    """What to say of the exception that is being handled; the other ranks are told, unless one has failed before."""
    problem = f"rank {rank}: {error}" if isinstance(error, UserError) else rank_failure(rank)
    with suppress(RuntimeError):  # the launcher that held the store is gone
        store.compare_set("failure", "", problem)
    return problem


@contextmanager
def _ending_with_others(store: Store, end: Callable[[str], None] = lambda problem: None) -> Iterator[None]:
    """End this process some time after another outer rank has failed: an agent sees the ranks of its own machine only.

    `end` is called with the report, where the process still waits for the failed rank and has to be ended.
    """
    over = threading.Event()

    def watch() -> None:
        while not over.wait(1.0):
            try:
                if store.check(["failure"]):
                    break
            except RuntimeError:  # the store went away with who held it, which may be the end of a run that is done
                break
        if not over.wait(_GRACE):
            problem = _reported_failure(patience=0.0) or "the launcher went away"
            end(problem)
            sys.stderr.write(f"{problem}\n")
            sys.stderr.flush()
            os._exit(1)

    thread = threading.Thread(target=watch, daemon=True, name="other ranks")
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(timeout=5.0)


@contextmanager
def _others_failures(outer: OuterRank | None) -> Iterator[None]:
    """On rank 0: raise what another outer rank failed of, where this one only noticed that it went away."""
    try:
        yield
    except (Exception, Preempted) as error:
        if outer is None or outer.world_size == 1:
            raise
        own = isinstance(error, UserError)
        reported = None if own else _reported_failure(patience=0.0 if isinstance(error, Preempted) else 3.0)
        if reported is None:
            if isinstance(error, Exception):
                _report_failure(_meeting_point(), outer.rank, error)
            raise
        raise RankFailure(reported) from None


def _reported_failure(patience: float) -> str | None:
    """The first report of another rank, if one comes within `patience` seconds: it is written after connections close."""
    deadline = time.monotonic() + patience
    try:
        store = _meeting_point()
        while not store.check(["failure"]):
            if time.monotonic() > deadline:
                return None
            time.sleep(0.1)
        return store.get("failure").decode()
    except RuntimeError:  # the launcher that held the store is gone
        return None


def stop_followers() -> None:
    """Tell the other outer ranks that there is nothing to run; called by rank 0 when it cannot start."""
    outer = outer_rank()
    if outer is None or outer.world_size == 1:
        return
    store = _meeting_point()
    if store.check(["run"]):
        return
    store.set("run", "")
    deadline = time.monotonic() + 30
    # rank 0 may hold the store itself: leaving before the others have read would hide the message
    while store.add("stopped", 0) < outer.world_size - 1 and time.monotonic() < deadline:
        time.sleep(0.05)


def with_data_parallel(config: Config, outer: OuterRank | None) -> Config:
    """The config with `parallel.dp` as a number: 1 locally, what is left of the ranks under an outer launcher."""
    parallel = config.parallel
    if parallel.dp is not None:
        return config
    size = 1 if outer is None else outer.world_size // (parallel.tp * parallel.pp)
    return config.model_copy(update={"parallel": parallel.model_copy(update={"dp": size})})


def ranks_of(config: Config) -> int:
    return config.parallel.tp * config.parallel.pp * (config.parallel.dp or 1)


def check_devices(config: Config, local_ranks: int) -> None:
    """Raise ConfigError where the machine has fewer CUDA devices than ranks."""
    if config.device == "cpu":
        return
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if config.device == "cuda" and count == 0:
        raise ConfigError([Problem("device", "cuda", "there is no CUDA device on this machine", "device=auto or device=cpu")])
    if 0 < count < local_ranks:
        reason = f"{local_ranks} ranks on this machine, but {count} CUDA devices"
        raise ConfigError([Problem("device", config.device, reason, "device=cpu, or a smaller layout")])


@contextmanager
def recorded(run: RunDirectory) -> Iterator[None]:
    """Keep status.json true: running, then done, failed or preempted (with the name of the signal)."""
    run.write_status("running")
    try:
        yield
    except (Preempted, KeyboardInterrupt) as error:
        run.write_status("preempted", f"interrupted ({str(error) or 'SIGINT'})")
        raise
    except BaseException as error:
        run.write_status("failed", str(error) or type(error).__name__)
        raise
    else:
        run.write_status("done")


def _end_with_torchrun() -> None:
    """torchrun's agent watches its ranks; nobody watches the agent. (srun's does not die before its tasks.)"""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        end_with_parent(os.getppid())


def _meeting_point() -> Store:
    """The store that all outer ranks share, hosted by the launcher or by rank 0."""
    from torch.distributed import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    if "store" not in _MEETING_POINT:
        store, _, _ = next(iter(rendezvous("env://", timeout=_PREPARE_TIMEOUT)))
        _MEETING_POINT["store"] = PrefixStore("eellm", store)
    return _MEETING_POINT["store"]


_MEETING_POINT: dict[str, Store] = {}
"""Kept until the process ends: rank 0's end of it may be the server that the process group uses too."""


def _prepare_once_a_host(context: TaskContext, tasks: str, outer: OuterRank, store: Store) -> None:
    """Rank 0 has prepared its own host; elsewhere local rank 0 does, and its neighbours wait for it."""
    if outer.local_rank == 0:
        importlib.import_module(f"{tasks}.before_ranks").prepare(context)
        store.set(f"prepared/{socket.gethostname()}", "1")
    elif outer.rank != outer.local_rank:
        store.wait([f"prepared/{socket.gethostname()}"], _PREPARE_TIMEOUT)
