"""Which directory a run writes to: a new one, or that of the run it continues."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from eellm.config.compose import to_yaml
from eellm.config.fingerprint import weights_fingerprint
from eellm.config.request import BEGINS_WITH_A_MODEL
from eellm.config.schema import Config
from eellm.manifest import fault
from eellm.rundir import RunDirectory, unfinished, whole_checkpoint


def open_run(config: Config, fresh: Path, overrides: list[str]) -> tuple[Config, RunDirectory]:
    """Make the run's directory, or open the one that `resume` names.

    `fresh` is where a new run goes; `resume=auto` looks beside it for the newest
    unfinished run with the same fingerprint. In the returned config `resume` is a path, or None for a new run.
    Raises CheckpointError where there is nothing whole to resume from.
    """
    if config.resume == "auto":
        found, looked_at = unfinished(fresh.parent, weights_fingerprint(config))
        how = "starting a new run" if found is None else f"going on with {found.path}"
        said = f"resume=auto: looked for an unfinished run of these values among {looked_at}: {how}"
        Console(highlight=False, markup=False).print(said, soft_wrap=True)
        config = config.model_copy(update={"resume": None if found is None else str(found.path)})
    if config.resume is None:
        return config, RunDirectory.create(fresh, to_yaml(config), overrides, weights_fingerprint(config))
    run, _ = whole_checkpoint("resume", config.resume)
    run.describe(to_yaml(config), overrides, weights_fingerprint(config))
    return config, run


def open_job(config: Config, run: RunDirectory, overrides: list[str]) -> Config:
    """Make the folder of a sweep's job ready, whatever an earlier attempt has left in it.

    The run goes on with the newest whole checkpoint in it; where there is none, or the task keeps no state to go on with,
    what lies there is removed. In the returned config `resume` is that checkpoint, or None; config.yaml does not tell the two
    apart, since the job is the same.
    """
    steps = run.resumable_steps() if config.task.name in BEGINS_WITH_A_MODEL else []
    whole = next((step for step in reversed(steps) if fault(step) is None), None)
    if whole is None:
        run.clear()
    config = config.model_copy(update={"resume": None})
    run.describe(to_yaml(config), overrides, weights_fingerprint(config))
    return config if whole is None else config.model_copy(update={"resume": str(whole)})
