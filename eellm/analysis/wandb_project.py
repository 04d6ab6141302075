"""Runs of a wandb project, in the form of run directories. What a run has logged is read through wandb's public API."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from eellm.analysis.run_folder import Run, flatten
from eellm.errors import RunError
from eellm.metrics.names import STEP, TIME
from eellm.metrics.rows import NON_FINITE, Row, is_number
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
            except ValueError as error:
                broken.append((path, str(error)))
    except (wandb.errors.Error, OSError, ValueError) as error:  # wandb calls an unknown project a ValueError
        raise RunError(f"{source}: wandb cannot list its runs: {error}") from error
    if not runs and not broken:
        raise RunError(f"{source}: the project has no runs. Offline runs are uploaded by `wandb sync`.")
    return runs, broken


@dataclass(frozen=True)
class WandbFiles:
    """What `RunFiles` reads from a run directory. `path`: `wandb://entity/project/id`. What cannot be fetched, or is not what
    a run logs, is a ValueError."""

    path: str

    def history(self) -> list[Row]:
        with _fetching(self.path):
            rows = [row for row in self._run().scan_history() if row.get(STEP) is not None]
        for row in rows:
            if not is_number(row[STEP]) or not is_number(row.get("_timestamp")):
                raise ValueError(f"a row has {STEP}={row[STEP]!r:.40} and _timestamp={row.get('_timestamp')!r:.40}, not numbers")
        return [{**_numbers(row), STEP: row[STEP], TIME: row["_timestamp"]} for row in rows]

    def table(self, name: str) -> list[dict[str, Cell]]:
        """The table as it was last logged; [] where it never was."""
        with _fetching(self.path), tempfile.TemporaryDirectory() as folder:
            run = self._run()
            logged = run.summary_metrics.get(f"tables/{name}")
            if not logged:
                return []
            if not isinstance(logged, Mapping) or not isinstance(logged.get("path"), str):
                raise ValueError(f"tables/{name} is {logged!r:.60}, not a table")
            with run.file(logged["path"]).download(root=folder) as file:
                content = json.load(file)
        columns, data = (content.get(part) if isinstance(content, dict) else None for part in ("columns", "data"))
        if not isinstance(columns, list) or not isinstance(data, list) or not all(isinstance(row, list) for row in data):
            raise ValueError(f"{logged['path']} holds no table")
        if any(len(row) != len(columns) for row in data):
            raise ValueError(f"{logged['path']}: a row has not one cell a column")
        return [dict(zip(map(str, columns), row, strict=True)) for row in data]

    def generations(self) -> list[dict[str, Any]]:
        """They stay in the run directory."""
        return []

    def _run(self) -> Any:
        import wandb

        return wandb.Api().run(self.path.removeprefix(SCHEME))


@contextmanager
def _fetching(path: str) -> Iterator[None]:
    """Turns wandb's own errors into the ValueError that all readers raise."""
    import wandb

    try:
        yield
    except wandb.errors.Error as error:
        raise ValueError(f"{path}: wandb cannot fetch it: {error}") from error


def _run(path: str, run: Any) -> Run:
    summary = run.summary_metrics
    for name, value in (("summary", summary), ("config", run.config)):
        if not isinstance(value, Mapping):
            raise ValueError(f"its {name} is {value!r:.40}, not an object")
    if not isinstance(run.created_at, str):
        raise ValueError(f"created_at is {run.created_at!r:.40}, not a time")
    seconds = summary.get("_runtime")
    if seconds is not None and not is_number(seconds):
        raise ValueError(f"_runtime is {seconds!r:.40}, not a number")
    config = {key: value for key, value in run.config.items() if not key.startswith("_")}
    return Run(
        path=path,
        config=dict(flatten(config)),
        status=str(summary.get("status") or STATES.get(run.state, run.state)),
        started=datetime.fromisoformat(run.created_at).timestamp(),
        seconds=seconds,
        metrics=_numbers(summary),
    )


def _numbers(values: Mapping[str, Any]) -> Row:
    """The metrics among what a run has logged: not its pictures, tables and charts, nor what wandb adds or keeps itself."""
    read = {key: NON_FINITE.get(value, value) if isinstance(value, str) else value for key, value in values.items()}
    return {key: float(value) for key, value in read.items() if "/" in key and not key.startswith("_") and is_number(value)}
