"""How each job of a sweep has ended, gathered from the processes that ran them, and what the command says at its end."""

from __future__ import annotations

import json
import os
import shutil
import textwrap
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, open_dict, read_write

from eellm.config.commandline import as_typed, parse_override
from eellm.data.cache import write_atomically

State = Literal["running", "done", "skipped", "failed", "preempted"]

WIDTH = 100
SHOWN = 10
"""Jobs without a result that the summary lists."""

_WORDS = {
    "done": "done",
    "skipped": "skipped (done before)",
    "failed": "failed",
    "preempted": "interrupted",
    "running": "without an end (killed, or still running elsewhere)",
}


@dataclass(frozen=True)
class Entry:
    """A job: its number in this sweep, its overrides, where its run lies (None: its config was refused), how it ended."""

    number: int
    overrides: list[str]
    state: State = "running"
    folder: str | None = None
    error: str | None = None

    @property
    def has_result(self) -> bool:
        return self.state in ("done", "skipped")


class Ledger(Callback):
    """Hydra's callback around a sweep (`hydra.callbacks` in conf/hydra/default.yaml); launchers carry it to their workers.

    `CURRENT` is the one of the sweep that this process runs, or runs a job of.
    """

    def __init__(self) -> None:
        self.sweep: Path | None = None
        """The study's folder."""
        self.folder: Path | None = None
        """Entries of this sweep, a file each; gone when the sweep has been summed up."""

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Called by Hydra in the command's own process, before its sweeper is made."""
        global CURRENT
        leave_out_what_is_typed(config)
        self.sweep = Path(str(config.hydra.sweep.dir)).absolute()
        self.folder = self.sweep / f".sweep_{time.time_ns()}_{os.getpid()}"
        CURRENT = self

    def on_job_start(self, config: DictConfig, **_: Any) -> None:
        """Called by Hydra in whichever process runs the job."""
        global CURRENT
        CURRENT = self

    def note(self, entry: Entry) -> None:
        """Raises WriteError."""
        if self.folder is not None:
            write_atomically(self.folder / f"{entry.number}.json", json.dumps(asdict(entry)))

    def entries(self) -> list[Entry]:
        files = [] if self.folder is None else self.folder.glob("*.json")
        entries = [Entry(**json.loads(file.read_text(encoding="utf-8"))) for file in files if not file.name.startswith(".")]
        return sorted(entries, key=lambda entry: entry.number)

    def close(self) -> list[Entry]:
        """The entries, whose files are removed: runs and their status.json say the same to whoever looks later."""
        entries = self.entries()
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)
        return entries


CURRENT: Ledger | None = None
"""Hydra runs one job at a time in a process, and hands a job nothing by which it could find the sweep that it is part of."""


def leave_out_what_is_typed(config: DictConfig) -> None:
    """Take those keys out of a study's parameters that the command line sets: Hydra would run their values with one and the
    same result, since `run.py` hands it `key=value` as `++key=value`, another key to its sweepers."""
    params = config.hydra.sweeper.get("params")
    typed = [parse_override(as_typed(override)) for override in config.hydra.overrides.task]
    named = {override.key for override in typed if override is not None}
    with read_write(config), open_dict(config):
        for key in named & set(params or ()):
            del params[key]


def summary(entries: list[Entry], sweep: Path) -> str:
    """How many jobs ended how, and the folders and errors of those without a result, in lines of 100 columns."""
    counts = {state: sum(entry.state == state for entry in entries) for state in _WORDS}
    said = ", ".join(f"{counts[state]} {words}" for state, words in _WORDS.items() if counts[state])
    lines = [f"{len(entries)} {'job' if len(entries) == 1 else 'jobs'} in {_relative(sweep)}: {said or 'none was started'}"]
    lacking = [entry for entry in entries if not entry.has_result]
    varied = _varied(entries)
    for entry in lacking[:SHOWN]:
        where = "refused" if entry.folder is None else _relative(Path(entry.folder))
        what = " ".join(override for override in entry.overrides if override in varied)
        lines += _wrapped(f"job {entry.number}, {where}: {what}".rstrip(": "), "  ", 1)
        lines += _wrapped(entry.error or "", "    ", 2)
    if len(lacking) > SHOWN:
        lines.append(f"  ... and {len(lacking) - SHOWN} more; status.json in each folder says why")
    if lacking:
        lines.append("The same command skips what is done and runs these again, from their last checkpoint if any.")
    return "\n".join(lines)


def _varied(entries: list[Entry]) -> set[str]:
    """Overrides that not all jobs share; of a single job all of them."""
    counts = Counter(override for entry in entries for override in set(entry.overrides))
    return {override for override, count in counts.items() if count < len(entries) or len(entries) == 1}


def _relative(path: Path) -> str:
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)


def _wrapped(text: str, indent: str, max_lines: int) -> list[str]:
    return textwrap.wrap(
        text,
        WIDTH,
        initial_indent=indent,
        subsequent_indent=indent,
        max_lines=max_lines,
        placeholder=" ...",
        break_on_hyphens=False,
    )
