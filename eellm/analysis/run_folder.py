"""One run as analysis reads it, from its directory: settings, how it ended, final metrics, and its tables when asked."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from eellm.errors import as_typed
from eellm.metrics.generations import read_generations
from eellm.metrics.rows import Row, decode_values, is_number, read_rows
from eellm.metrics.tables import Cell, read_table
from eellm.rundir import RunDirectory

MARKS = ("status.json", "metrics.jsonl")
"""What a folder has that a run has written into."""
LAST_TIME = 9.2e9
"""Nanoseconds in 64 bits end in 2262."""


@dataclass(frozen=True)
class Run:
    """What `load_runs` makes a row of.

    `config`: dotted key -> value, lists as typed on the command line. `started`: seconds since the epoch; `seconds`: from
    there to the end, so of a resumed run its last part; None while it runs. `metrics`: the final ones, empty before the end.
    """

    path: str
    config: dict[str, Cell]
    status: str
    error: str | None = None
    started: float | None = None
    seconds: float | None = None
    metrics: dict[str, float] = field(default_factory=dict)


def run_folders(source: Path) -> Iterator[Path]:
    """Run directories in a folder, itself included, in order of their paths; none is looked for inside another."""
    for folder, children, files in os.walk(source):
        if any(mark in files for mark in MARKS):
            children.clear()
            yield Path(folder)
        children[:] = sorted(child for child in children if not child.startswith("."))


def read_run(path: Path) -> Run:
    """Raises OSError or ValueError, naming the file and what is wrong, where one is missing, cut or not what it should be."""
    folder = RunDirectory(path)
    status = _read_json(folder.status_file)
    if not isinstance(status.get("state"), str):
        raise ValueError("status.json does not say in which state the run is")
    if not isinstance(status.get("error"), str | None):
        raise ValueError(f"status.json: error is {status['error']!r:.40}, not a text")
    started, updated = (_time(status, key) for key in ("started", "updated"))
    return Run(
        path=str(path),
        config=_read_config(folder.config),
        status=status["state"],
        error=status.get("error"),
        started=started,
        seconds=None if started is None or updated is None or status["state"] == "running" else updated - started,
        metrics=_read_metrics(folder.final_metrics) if folder.final_metrics.exists() else {},
    )


@dataclass(frozen=True)
class RunFiles:
    """The larger files of a run directory; what is not there is empty."""

    path: Path

    def history(self) -> list[Row]:
        return read_rows(RunDirectory(self.path).metrics)

    def table(self, name: str) -> list[dict[str, Cell]]:
        return read_table(self.path / f"{name}.csv")

    def generations(self) -> list[dict[str, Any]]:
        return read_generations(self.path / "generations.jsonl")


def flatten(node: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Cell]]:
    """Dotted key and value of every leaf."""
    for key, value in node.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", as_typed(value) if isinstance(value, list) else value


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file.name} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file.name} holds a {type(content).__name__}, not an object")
    return content


def _read_metrics(file: Path) -> dict[str, float]:
    content = _read_json(file)
    try:
        return decode_values(content)
    except ValueError as error:
        raise ValueError(f"{file.name}: {error}") from error


def _time(status: Mapping[str, Any], key: str) -> float | None:
    """Seconds since the epoch, as far as pandas can count them."""
    if key not in status:
        return None
    if not is_number(status[key]) or not 0 <= status[key] < LAST_TIME:
        raise ValueError(f"status.json: {key} is {status[key]!r:.40}, not a time in seconds")
    return float(status[key])


def _read_config(file: Path) -> dict[str, Cell]:
    try:
        text = file.read_text(encoding="utf-8")
        return {key: value for block in _blocks(text) for key, value in _settings(block)}
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{file.name} is not a mapping in YAML: {' '.join(str(error).split())}") from error


def _blocks(text: str) -> Iterator[str]:
    """The text cut in front of every line that begins a key at the left edge."""
    block: list[str] = []
    for line in text.splitlines(keepends=True):
        if block and not line.startswith((" ", "-", "#", "\n", "}", "]")):
            yield "".join(block)
            block = []
        block.append(line)
    yield "".join(block)


# The runs of a sweep differ in a few values; parsing each file whole takes most of the time that loading a thousand may take.
@lru_cache(maxsize=4096)
def _settings(block: str) -> tuple[tuple[str, Cell], ...]:
    content = yaml.load(block, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    if not isinstance(content, dict):
        raise ValueError(f"found {content!r:.60}")
    return tuple(flatten(content))
