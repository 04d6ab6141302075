"""The command line: compose the config with Hydra, check it, make the run directory, start the task.

`python run.py --help` lists the groups. Hydra composes once, here; nothing heavy is imported before a task starts.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from eellm.config.commandline import as_typed, composing_errors, explained, forced
from eellm.errors import ConfigError, Problem, UserError, WriteError
from eellm.outer import outer_rank
from eellm.preemption import Preempted


class Shown(Exception):
    """A job has failed and its error has been shown."""


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def job(composed: DictConfig) -> float | None:
    """One run; in a sweep, one of several. Returns the objective's value."""
    many = HydraConfig.get().mode == RunMode.MULTIRUN
    try:
        return start(composed, HydraConfig.get(), many)
    except Exception as error:
        show(error)
        if many:
            raise Shown from error  # Hydra goes on with the next job
        from eellm.launch import stop_followers

        stop_followers()
        sys.exit(1)


def start(composed: DictConfig, hydra_config: DictConfig, many: bool) -> float | None:
    from eellm.config.compose import plain, validated
    from eellm.launch import launch
    from eellm.resume import open_run

    fresh = Path(hydra_config.runtime.output_dir)
    overrides = [as_typed(override) for override in hydra_config.overrides.task]
    try:
        outer = outer_rank()
        if many and outer is not None:
            fix = "start one run per launch, or a sweep without torchrun"
            raise ConfigError([Problem("hydra.mode", "MULTIRUN", "a sweep cannot run under an outer launcher", fix)])
        config = validated(plain(composed), overrides, outer.world_size if outer else None)
        config, run = open_run(config, fresh, overrides)
    finally:
        remove_if_empty(fresh)
    return launch(config, run).get(config.objective)


def remove_if_empty(folder: Path) -> None:
    """Hydra makes the folder of a run before anything is checked."""
    for empty in (folder, *folder.parents[:3]):
        if not empty.is_dir() or any(empty.iterdir()):
            return
        empty.rmdir()


def show(error: BaseException) -> None:
    """A user's mistake as its message, a fault of ours with its traceback."""
    from eellm.spawn import RankFailure

    if isinstance(error, UserError | RankFailure):
        print(error, file=sys.stderr)
    else:
        traceback.print_exception(error)


def main() -> None:
    outer = outer_rank()
    if outer is not None and outer.rank > 0:
        from eellm.launch import follow

        sys.exit(follow())
    sys.argv[1:] = forced(sys.argv[1:])
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors come to us, who show them more plainly
    try:
        job()
    except Shown:
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except Preempted as preempted:
        print(f"interrupted ({preempted})", file=sys.stderr)
        sys.exit(preempted.exit_status)
    except (*composing_errors(), OSError) as error:  # of the latter, Hydra meets the first: it makes the run's folder
        from eellm.launch import stop_followers

        show(explained(error) if isinstance(error, composing_errors()) else WriteError.of(error.filename, error))
        stop_followers()
        sys.exit(1)


if __name__ == "__main__":
    main()
