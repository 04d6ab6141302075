"""Many runs as one pandas frame, from a folder of run directories or from a wandb project; and what each of them has recorded.

A run's own columns are its settings that differ between the runs loaded, under their dotted names, and its final metrics. Only
metrics have a slash in their names, so a frame says itself which of its columns are settings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pandas as pd

from eellm.analysis.run_folder import Run, RunFiles, read_run, run_folders
from eellm.analysis.wandb_project import SCHEME, WandbFiles, project_runs
from eellm.errors import RunError
from eellm.metrics.names import STEP, TIME
from eellm.metrics.rows import is_number
from eellm.metrics.tables import Cell

Source = str | Path
RUN_COLUMNS = ("run", "name", "study", "task", "status", "error", "started", "seconds")
OWN_COLUMNS = {"name": "name", "study.name": "study", "task.name": "task"}
"""Settings that are columns of every frame, whether they differ or not."""


def load_runs(source: Source | Sequence[Source], settings: Sequence[str] = ()) -> pd.DataFrame:
    """One row a run of all run directories in a folder (or several), or of `wandb://entity/project`.

    Columns: `run` (its path, also for the other functions here), `name`, `study`, `task`, `status` (running, done, failed,
    preempted), `error`, `started` (UTC), `seconds` (of a resumed run its last part, missing while it runs); every setting that
    differs between the runs, dotted, lists as text; and final metrics, missing in runs that have not ended. What all runs share
    is in `frame.attrs["shared"]`, runs that cannot be read are in `frame.attrs["broken"]` as (path, reason).

    `settings`: those that are columns whether they differ or not, e.g. `seed` where it may have been run with one.

    Raises RunError where a source does not exist or has no run.
    """
    sources = [source] if isinstance(source, str | Path) else list(source)
    runs: list[Run] = []
    broken: list[tuple[str, str]] = []
    for each in sources:
        found, failed = project_runs(str(each)) if _is_wandb(each) else _folder_runs(Path(each).expanduser())
        runs += found
        broken += failed
    shared, varying = _compared([run.config for run in runs])
    frame = pd.DataFrame([_own(run) for run in runs], columns=list(RUN_COLUMNS))
    frame["started"] = pd.to_datetime(frame["started"].astype(float), unit="s", utc=True)
    columns = [key for key in dict.fromkeys([*varying, *settings]) if key not in OWN_COLUMNS]
    configs = pd.DataFrame({key: [run.config.get(key) for run in runs] for key in columns}, index=frame.index)
    metrics = pd.DataFrame([run.metrics for run in runs], index=frame.index)
    frame = pd.concat([frame, configs, metrics], axis=1)
    frame.attrs = {"shared": shared, "broken": broken}
    return frame


def settings_of(runs: pd.DataFrame) -> list[str]:
    """Columns of a frame of runs that are settings (or were added by hand): all but a run's own and its metrics."""
    return [column for column in map(str, runs) if column not in RUN_COLUMNS and "/" not in column]


def metric_history(runs: pd.DataFrame, names: str | Sequence[str] = "*") -> pd.DataFrame:
    """Logged metrics over time, one row a value: `run`, `name`, the settings, `step`, `seconds` since the run's first row (a
    break before it was resumed included), `metric`, `value`.

    `names`: of metrics, `*` stands for anything (`val/loss/*`).
    """
    wanted = [names] if isinstance(names, str) else list(names)

    def read(files: RunFiles | WandbFiles) -> Iterable[dict[str, Any]]:
        rows = files.history()
        for row in rows:
            when = {STEP: int(row[STEP]), "seconds": row[TIME] - rows[0][TIME]}
            for metric, value in row.items():
                if metric not in (STEP, TIME) and any(fnmatchcase(metric, name) for name in wanted):
                    yield {**when, "metric": metric, "value": value}

    return gather(runs, read, [STEP, "seconds", "metric", "value"])


def run_table(runs: pd.DataFrame, name: str, texts: Sequence[str] = (), numbers: Sequence[str] = ()) -> pd.DataFrame:
    """Rows of every run's `<name>.csv` (`speed_quality`, `trade_off`, `exits_untuned`, `benchmark`, `lm_eval`...), behind
    `run`, `name` and the settings. Runs without the table have no rows.

    `texts`: columns without which a table cannot be read; `numbers`: those that hold numbers or nothing, where they are there.
    """

    def read(files: RunFiles | WandbFiles) -> list[dict[str, Cell]]:
        rows = files.table(name)
        for row in rows:
            wrong = [column for column in texts if not isinstance(row.get(column), str)]
            wrong += [column for column in numbers if row.get(column) is not None and not is_number(row[column])]
            if wrong:
                raise ValueError(f"{name}.csv: {wrong[0]} is {row.get(wrong[0])!r:.40}")
        return rows

    return gather(runs, read)


def speed_quality(runs: pd.DataFrame) -> pd.DataFrame:
    """Speed against quality of every run, decoding and threshold: the rows of speed_quality.csv (its columns are explained in
    `eellm/benchmark/speed_quality.py`), behind `run`, `name` and the settings."""
    return run_table(runs, "speed_quality", ["decoding"], ["tokens_per_second", "speedup", "agreement", "mean_layers"])


def gather(
    runs: pd.DataFrame, read: Callable[[RunFiles | WandbFiles], Iterable[Mapping[str, Any]]], columns: Sequence[str] = ()
) -> pd.DataFrame:
    """What `read` finds in each run, row by row, behind `run`, `name` and the settings.

    Runs that cannot be read are added to `attrs["broken"]` as (path, reason). `columns`: those there are without any row, too.
    """
    labels = ["run", "name", *settings_of(runs)]
    rows: list[dict[str, Any]] = []
    broken: list[tuple[str, str]] = []
    for label in records(runs[labels]):
        try:
            found = list(read(_files(label["run"])))
        except (OSError, ValueError) as error:
            broken.append((label["run"], reason(error)))
        else:
            rows += [{**label, **row} for row in found]
    frame = pd.DataFrame(rows) if rows else pd.DataFrame(columns=[*labels, *columns])
    frame.attrs = {**runs.attrs, "broken": [*runs.attrs.get("broken", []), *broken]}
    return frame


def records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """One dict a row; all columns have texts for names here."""
    return [{str(name): value for name, value in row.items()} for row in frame.to_dict("records")]


def reason(error: Exception) -> str:
    """Why a run cannot be read, in one line."""
    return f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename else str(error)


def _is_wandb(source: Source) -> bool:
    return isinstance(source, str) and source.startswith(SCHEME)


def _files(run: str) -> RunFiles | WandbFiles:
    return WandbFiles(run) if _is_wandb(run) else RunFiles(Path(run))


def _folder_runs(folder: Path) -> tuple[list[Run], list[tuple[str, str]]]:
    if not folder.is_dir():
        raise RunError(f"{folder}: there is no such folder. Give a run directory or a folder of them, e.g. outputs or multirun.")
    runs, broken = [], []
    for path in run_folders(folder):
        try:
            runs.append(read_run(path))
        except (OSError, ValueError) as error:
            broken.append((str(path), reason(error)))
    if not runs and not broken:
        raise RunError(f"{folder}: no run directory in it (a folder with status.json). Runs are written to outputs and multirun.")
    return runs, broken


def _compared(configs: Sequence[Mapping[str, Cell]]) -> tuple[dict[str, Cell], list[str]]:
    """Settings that are equal in all runs, and the names of the others, but for OWN_COLUMNS. null and none at all are equal."""
    shared: dict[str, Cell] = {}
    varying = []
    for key in dict.fromkeys(key for config in configs for key in config):
        first = configs[0].get(key)
        if all(_same(config.get(key), first) for config in configs):
            shared[key] = first
        elif key not in OWN_COLUMNS:
            varying.append(key)
    return shared, varying


def _same(one: Cell, other: Cell) -> bool:
    """1 and 1.0 are the same, 1 and true are not."""
    return one == other and isinstance(one, bool) == isinstance(other, bool)


def _own(run: Run) -> dict[str, object]:
    named = {column: run.config.get(key) for key, column in OWN_COLUMNS.items()}
    return {"run": run.path, **named, "status": run.status, "error": run.error, "started": run.started, "seconds": run.seconds}
