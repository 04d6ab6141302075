"""Start the ranks of a run, or join those that an outer launcher (torchrun, srun) started, and run the task in them.

Hydra runs once, in the parent or in rank 0; every other rank is handed the resolved YAML.
"""

from __future__ import annotations

import importlib
import json
import os
import pickle
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eellm.config.compose import from_yaml, to_yaml
from eellm.config.schema import Config
from eellm.errors import ConfigError, Problem, UserError
from eellm.outer import OuterRank, outer_rank
from eellm.quiet import quiet_dependencies
from eellm.rundir import RunDirectory
from eellm.tasks.context import TaskContext

if TYPE_CHECKING:
    from torch.distributed import Store

TASKS = "eellm.tasks"

_PREPARE_TIMEOUT = timedelta(hours=2)
"""How long ranks wait for rank 0 to tokenise a corpus."""


class RankFailure(Exception):
    """A rank failed by a fault of ours; the message holds its rank and its traceback."""


def launch(config: Config, run: RunDirectory, tasks: str = TASKS) -> dict[str, float]:
    """Run the config's task on all its ranks and return its final metrics.

    `tasks` is the package of the task modules: each has `prepare(context)`, called once before the ranks start, and
    `run(context)`, called on every rank. Raises what a rank raised where that is a UserError, else RankFailure.
    """
    outer = outer_rank()
    config = with_data_parallel(config, outer)
    context = TaskContext(config, run.path)
    quiet_dependencies()
    with recorded(run):
        module = importlib.import_module(f"{tasks}.{config.task.name}")
        without_ranks = getattr(module, "WITHOUT_RANKS", False)
        if not without_ranks:
            check_devices(config, int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if outer else ranks_of(config))
        module.prepare(context)
        if without_ranks:
            metrics = module.run(context)
        elif outer is not None and outer.world_size > 1:
            store = _meeting_point()
            store.set("run", json.dumps([to_yaml(config), str(run.path), tasks]))
            metrics = module.run(context)
        elif outer is not None or ranks_of(config) == 1:
            metrics = module.run(context)
        else:
            metrics = _spawn(context, tasks)
        run.write_metrics(metrics)
    return metrics


def follow() -> int:
    """What every outer rank but 0 does: wait for rank 0's config, run its task, return the exit status."""
    outer = outer_rank()
    assert outer is not None
    quiet_dependencies()
    store = _meeting_point()
    message = store.get("run")
    if not message:
        store.add("stopped", 1)
        return 1
    text, path, tasks = json.loads(message)
    try:
        context = TaskContext(from_yaml(text), Path(path))
        module = importlib.import_module(f"{tasks}.{context.config.task.name}")
        _prepare_once_a_host(module, context, outer, store)
        module.run(context)
    except UserError as error:
        sys.stderr.write(f"rank {outer.rank}: {error}\n")
        return 1
    return 0


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
    """Keep status.json true: running, then done, failed or preempted. SIGTERM counts as an interruption."""
    main_thread = threading.current_thread() is threading.main_thread()
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)} if main_thread else {}
    received = ["SIGINT"]

    def interrupt(number: int, _frame: object) -> None:
        received[0] = signal.Signals(number).name
        raise KeyboardInterrupt(received[0])

    if main_thread:
        signal.signal(signal.SIGTERM, interrupt)
    run.write_status("running")
    try:
        yield
    except (KeyboardInterrupt, SystemExit) as error:  # Lightning turns the one into the other
        name = str(error) if isinstance(error, KeyboardInterrupt) and str(error) else received[0]
        run.write_status("preempted", f"interrupted ({name})")
        raise
    except BaseException as error:
        run.write_status("failed", str(error) or type(error).__name__)
        raise
    else:
        run.write_status("done")
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


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


def _prepare_once_a_host(module: Any, context: TaskContext, outer: OuterRank, store: Store) -> None:
    """Rank 0 has prepared its own host; elsewhere local rank 0 does, and its neighbours wait for it."""
    if outer.local_rank == 0:
        module.prepare(context)
        store.set(f"prepared/{socket.gethostname()}", "1")
    elif outer.rank != outer.local_rank:
        store.wait([f"prepared/{socket.gethostname()}"], _PREPARE_TIMEOUT)


def _spawn(context: TaskContext, tasks: str) -> dict[str, float]:
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    world = ranks_of(context.config)
    quiet_elastic()
    with tempfile.TemporaryDirectory(prefix="eellm_ranks_") as reports, _threads_for(world):
        elastic = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=world,
            run_id=context.run_dir.name,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            max_restarts=0,
            monitor_interval=0.1,
            start_method="spawn",
        )
        try:
            results = elastic_launch(elastic, _rank)(to_yaml(context.config), str(context.run_dir), tasks, reports)
        except ChildFailedError as error:
            raise _first_failure(Path(reports), error.failures) from None
        except SignalException as error:
            raise KeyboardInterrupt(error.sigval.name) from None
    return results[0]


def _rank(text: str, path: str, tasks: str, reports: str) -> dict[str, float] | None:
    """One spawned rank. A failure goes to a file, for the parent to raise; the process just ends."""
    rank = int(os.environ["RANK"])
    quiet_dependencies()
    try:
        context = TaskContext(from_yaml(text), Path(path))
        metrics = importlib.import_module(f"{tasks}.{context.config.task.name}").run(context)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        raised = error if isinstance(error, UserError) else RankFailure(f"rank {rank} failed:\n{traceback.format_exc()}")
        (Path(reports) / f"{time.time():020.6f}_{rank}").write_bytes(pickle.dumps(raised))
        sys.exit(1)
    return metrics if rank == 0 else None


def _first_failure(reports: Path, failures: dict[int, Any]) -> Exception:
    """What the rank that failed first raised; the others usually fail only because it went away."""
    killed = {rank: failure for rank, failure in failures.items() if failure.exitcode < 0 and failure.exitcode != -signal.SIGTERM}
    written = sorted(reports.iterdir())
    if written and not killed:
        return pickle.loads(written[0].read_bytes())
    rank, failure = min((killed or failures).items(), key=lambda item: item[1].timestamp)
    how = f"killed by {failure.signal_name()}" if failure.exitcode < 0 else f"exit status {failure.exitcode}"
    return RankFailure(f"rank {rank} ended without a report ({how}); out of memory is the usual reason")


def quiet_elastic() -> None:
    """Elastic reports each failed and each ended child on stderr; the rank's own error is raised instead."""
    import logging

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
