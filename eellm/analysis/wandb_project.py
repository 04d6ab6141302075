"""Runs of a wandb project, in the form of run directories. What a run has logged is read through wandb's public API."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from eellm.analysis.run_folder import Run, flatten
from eellm.errors import RunError
from eellm.metrics.names import STEP, TIME
from eellm.metrics.rows import NON_FINITE, Row
from eellm.metrics.tables import Cell

SCHEME = "wandb://"
STATES = {"finished": "done", "crashed": "failed", "killed": "preempted"}
"""What wandb says of a run that has not said it itself."""


def project_runs(source: str) -> tuple[list[Run], list[tuple[str, str]]]:
    """All runs of `wandb://entity/project`, and those that cannot be read as (path, reason). Raises RunError without any."""
    entity, _, project = source.removeprefix(SCHEME).partition("/")
    if not entity or not project or "/" in project:
        raise RunError(f"{source}: give a project as {SCHEME}entity/project.")
    import wandb

    runs, broken = [], []
    try:
        for run in wandb.Api().runs(f"{entity}/{project}", per_page=1000, lazy=False):
            path = f"{source}/{run.id}"
            try:
                runs.append(_run(path, run))
            except (ValueError, TypeError, AttributeError) as error:
                broken.append((path, str(error)))
    except (wandb.errors.Error, ValueError) as error:  # wandb calls an unknown project a ValueError
        raise RunError(f"{source}: wandb cannot list its runs: {error}") from error
    if not runs and not broken:
        raise RunError(f"{source}: the project has no runs. Offline runs are uploaded by `wandb sync`.")
    return runs, broken


@dataclass(frozen=True)
class WandbFiles:
    """What `RunFiles` reads from a run directory. `path`: `wandb://entity/project/id`."""

    path: str

    def history(self) -> list[Row]:
        rows = self._run().scan_history()
        return [{**_numbers(row), STEP: row[STEP], TIME: row["_timestamp"]} for row in rows if row.get(STEP) is not None]

    def table(self, name: str) -> list[dict[str, Cell]]:
        """The table as it was last logged; [] where it never was."""
        run = self._run()
        logged = run.summary_metrics.get(f"tables/{name}")
        if not logged:
            return []
        with tempfile.TemporaryDirectory() as folder, run.file(logged["path"]).download(root=folder) as file:
            content = json.load(file)
        return [dict(zip(content["columns"], row, strict=True)) for row in content["data"]]

    def generations(self) -> list[dict[str, Any]]:
        """They stay in the run directory."""
        return []

    def _run(self) -> Any:
        import wandb

        return wandb.Api().run(self.path.removeprefix(SCHEME))


def _run(path: str, run: Any) -> Run:
    summary = run.summary_metrics
    config = {key: value for key, value in run.config.items() if not key.startswith("_")}
    return Run(
        path=path,
        config=dict(flatten(config)),
        status=str(summary.get("status") or STATES.get(run.state, run.state)),
        started=datetime.fromisoformat(run.created_at).timestamp(),
        seconds=summary.get("_runtime"),
        metrics=_numbers(summary),
    )


def _numbers(values: Mapping[str, Any]) -> Row:
    """The metrics among what a run has logged: not its pictures, tables and charts, nor what wandb adds or keeps itself."""
    read = {key: NON_FINITE.get(value, value) if isinstance(value, str) else value for key, value in values.items()}
    return {
        key: float(value)
        for key, value in read.items()
        if "/" in key and not key.startswith("_") and isinstance(value, (int, float)) and not isinstance(value, bool)
    }
