"""The command line: compose the config with Hydra, check it, make the run directory, start the task.

`python run.py --help` lists the groups. Hydra composes once, here; nothing heavy is imported before a task starts.
"""

from __future__ import annotations

import os
import signal
import sys
from concurrent.futures import BrokenExecutor
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from eellm.config.commandline import CONF, as_typed, composing_errors, explained, forced
from eellm.errors import JobFailed, UserError, WriteError, shown_as
from eellm.outer import outer_rank
from eellm.preemption import Preempted


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
def job(composed: DictConfig) -> Any:
    """One run; in a sweep, one of several, which returns the objective's value."""
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        from eellm.sweep.job import sweep_job

        return sweep_job(composed, HydraConfig.get())
    try:
        start(composed, HydraConfig.get())
    except Exception as error:
        show(error)
        from eellm.launch import stop_followers

        stop_followers()
        sys.exit(1)


def start(composed: DictConfig, hydra_config: DictConfig) -> None:
    from eellm.config.compose import plain, validated
    from eellm.launch import launch
    from eellm.resume import open_run

    fresh = Path(hydra_config.runtime.output_dir)
    overrides = [as_typed(override) for override in hydra_config.overrides.task]
    try:
        outer = outer_rank()
        config = validated(plain(composed), overrides, outer.world_size if outer else None)
        config, run = open_run(config, fresh, overrides)
    finally:
        remove_if_empty(fresh)
    launch(config, run)


def remove_if_empty(folder: Path) -> None:
    """Hydra makes the folder of a run before anything is checked."""
    for empty in (folder, *folder.parents[:3]):
        if not empty.is_dir() or any(empty.iterdir()):
            return
        empty.rmdir()


def show(error: BaseException) -> None:
    print(shown_as(error), file=sys.stderr)


def main() -> None:
    outer = outer_rank()
    if outer is not None and outer.rank > 0:
        from eellm.launch import follow

        sys.exit(follow())
    sys.argv[1:] = forced(sys.argv[1:])
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors come to us, who show them more plainly
    sys.exit(max(command(), sum_up()))


def command() -> int:
    """Do what is asked for. The exit status, 0 where it depends on how the jobs of a sweep have ended."""
    try:
        job()
    except JobFailed:
        pass
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except Preempted as preempted:
        print(f"interrupted ({preempted})", file=sys.stderr)
        return preempted.exit_status
    except (*composing_errors(), OSError) as error:  # of the latter, Hydra meets the first: it makes the run's folder
        from eellm.launch import stop_followers

        show(explained(error) if isinstance(error, composing_errors()) else WriteError.of(error.filename, error))
        stop_followers()
        return 1
    except BrokenExecutor as error:  # a launcher's worker was killed
        show(UserError(str(error)))
        return 1
    return 0


def sum_up() -> int:
    """After a sweep: say how its jobs have ended. The exit status."""
    from eellm.sweep import ledger

    sweep = ledger.CURRENT
    if sweep is None or sweep.sweep is None:
        return 0
    entries = sweep.close()
    print(ledger.summary(entries, sweep.sweep))
    return int(any(not entry.has_result for entry in entries))


if __name__ == "__main__":
    main()
