"""A run's directory: the contract between runs and everything that reads them afterwards."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from eellm.data.cache import write_atomically
from eellm.errors import CheckpointError, WriteError, writing
from eellm.manifest import fault, listing

State = Literal["running", "done", "failed", "preempted"]

_STEP = re.compile(r"step_(\d+)")


def step_name(step: int) -> str:
    """Name of a checkpoint's folder."""
    return f"step_{step:07d}"


def step_of(checkpoint: Path) -> int:
    """Inverse of `step_name`."""
    return int(checkpoint.name.removeprefix("step_"))


@dataclass(frozen=True)
class RunDirectory:
    """Names of the files of a run. Nothing is made until it is written."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def overrides(self) -> Path:
        """One command-line override a line, as typed."""
        return self.path / "overrides.txt"

    @property
    def status_file(self) -> Path:
        return self.path / "status.json"

    @property
    def metrics(self) -> Path:
        """One JSON object a line: step, time, name -> value."""
        return self.path / "metrics.jsonl"

    @property
    def final_metrics(self) -> Path:
        return self.path / "metrics.json"

    @property
    def tokenizer(self) -> Path:
        """tokenizer.json, or where there is none SentencePiece's tokenizer.model."""
        model, own = self.path / "tokenizer.model", self.path / "tokenizer.json"
        return model if model.exists() and not own.exists() else own

    @property
    def corpus(self) -> Path:
        """Where the tokenised corpus lies in the cache, for the run's ranks."""
        return self.path / "corpus.json"

    @property
    def calibration(self) -> Path:
        """Certified exit thresholds, written by task=calibrate."""
        return self.path / "calibration.json"

    @property
    def timeline(self) -> Path:
        """When the passes of the last step happened, with debug.timeline=true."""
        return self.path / "timeline.json"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def tuning(self) -> Path:
        """What a run that tunes exits goes on with: exits and their optimizer, no model. Whole ones are among the checkpoints."""
        return self.path / "tuning"

    @property
    def lock(self) -> Path:
        """Held by the process that runs a sweep's job; left behind by it."""
        return self.path / ".lock"

    @classmethod
    def create(cls, wanted: Path, config_yaml: str, overrides: list[str], fingerprint: str) -> RunDirectory:
        """Make the directory of a new run; `_2`, `_3`... behind the name where another run has it already."""
        path, number = wanted, 1
        while (path / "status.json").exists():
            number += 1
            path = wanted.with_name(f"{wanted.name}_{number}")
        path.mkdir(parents=True, exist_ok=True)
        run = cls(path)
        run.describe(config_yaml, overrides, fingerprint)
        return run

    def describe(self, config_yaml: str, overrides: list[str], fingerprint: str) -> None:
        """Write config.yaml, add to overrides.txt what a resumed run has not been given before, and begin status.json."""
        write_atomically(self.config, config_yaml)
        before = self.overrides.read_text(encoding="utf-8") if self.overrides.exists() else ""
        new = [override for override in overrides if override not in before.splitlines()]
        write_atomically(self.overrides, before + "".join(f"{override}\n" for override in new))
        self._update_status({"fingerprint": fingerprint})
        self.write_status("running")

    def write_status(self, state: State, error: str | None = None) -> None:
        """`error` is what went wrong, for `failed` and `preempted`; where even that cannot be written it goes unsaid here,
        since the error at hand matters more. Raises WriteError for the other states."""
        now = time.time()
        started = {"started": now} if state == "running" else {}
        unwritable = contextlib.suppress(WriteError) if error is not None else contextlib.nullcontext()
        with unwritable:
            self._update_status({"state": state, "error": error, "updated": now, **started})

    def status(self) -> dict[str, object]:
        """state, error, started and updated (seconds since the epoch), fingerprint; empty where no run has written one."""
        try:
            status = json.loads(self.status_file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return status if isinstance(status, dict) else {}

    def keep_tokenizer(self, file: Path) -> None:
        """Copy a tokenizer's file into the run, which then needs no other."""
        shutil.copyfile(file, self.path / f"tokenizer{file.suffix}")

    def keep_chat_template(self, source: RunDirectory) -> None:
        """Copy what lies beside another run's tokenizer and turns messages into text, if anything does."""
        for name in ("chat_template.jinja", "tokenizer_config.json"):
            if (source.path / name).is_file():
                shutil.copyfile(source.path / name, self.path / name)

    def note_backbone(self, content: str) -> None:
        """Put into status.json the hash of what a run that tunes exits has left as it was."""
        self._update_status({"backbone": content})

    def write_metrics(self, metrics: dict[str, float]) -> None:
        """Write metrics.json: the run's final scalars."""
        write_atomically(self.final_metrics, json.dumps(metrics, indent=2) + "\n")

    def final_scalars(self) -> dict[str, float] | None:
        """What metrics.json says; None where it cannot be read."""
        try:
            metrics = json.loads(self.final_metrics.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return metrics if isinstance(metrics, dict) else None

    def clear(self) -> None:
        """Remove everything but the lock. Raises WriteError."""
        with writing(self.path):
            for entry in self.path.iterdir():
                if entry.is_dir() and not entry.is_symlink():
                    shutil.rmtree(entry)
                elif entry != self.lock:
                    entry.unlink()

    def steps(self) -> list[Path]:
        """Checkpoint folders, oldest first. A checkpoint has its final name only once it is whole."""
        return steps_in(self.checkpoints)

    def resumable_steps(self) -> list[Path]:
        """Folders that hold all that the run goes on with, oldest first."""
        return steps_in(self.tuning if self.tuning.is_dir() else self.checkpoints)

    def _update_status(self, facts: dict[str, object]) -> None:
        write_atomically(self.status_file, json.dumps({**self.status(), **facts}, indent=2) + "\n")


def steps_in(folder: Path) -> list[Path]:
    """Checkpoints of a folder, oldest first."""
    folders = folder.glob("step_*") if folder.is_dir() else []
    return sorted((path for path in folders if _STEP.fullmatch(path.name)), key=step_of)


def locate(given: str) -> tuple[RunDirectory, Path | None]:
    """The run that a path names, and its newest checkpoint, or the one that the path itself names.

    The path may be a run directory, its checkpoints/ folder or one step folder. Raises CheckpointError where there is no
    run; a run without any checkpoint gives None. Whether the checkpoint is whole is `whole_checkpoint`'s business.
    """
    path = Path(given).expanduser()
    if not path.is_dir():
        what = "it is a file" if path.exists() else "there is no such directory"
        raise CheckpointError(f"{given}: {what}. Give a run directory, e.g. outputs/train/default/<time>.")
    step = path if _STEP.fullmatch(path.name) else None
    root = path.parent if step is not None else path
    run = RunDirectory(root.parent if root.name in ("checkpoints", "tuning") else root)
    if not run.config.is_file():
        raise CheckpointError(f"{given}: not a run directory: looked for {run.config}, found {listing(run.path)}.")
    steps = run.steps()
    return run, step or (steps[-1] if steps else None)


def whole_checkpoint(key: str, given: str) -> tuple[RunDirectory, Path]:
    """The run and the checkpoint that `key=given` names (`checkpoint` or `resume`; see `locate`), with all its files.

    Raises CheckpointError saying what was looked for and found, and which older checkpoint is whole.
    """
    run, step = locate(given)
    folder = run.tuning if key == "resume" and run.tuning.is_dir() else run.checkpoints
    if step is None or step.parent.name != folder.name:
        step = steps_in(folder)[-1] if steps_in(folder) else None
    if step is None:
        found = listing(folder) if folder.is_dir() else "nothing"
        raise CheckpointError(f"{key}={given}: the run has no checkpoint: looked for {folder}/step_*, found {found}.")
    wrong = fault(step)
    if wrong is None:
        return run, step
    older = [other for other in steps_in(folder) if step_of(other) < step_of(step) and fault(other) is None]
    fix = f" The newest whole checkpoint before it: {key}={older[-1]}" if older else " No older checkpoint is whole."
    raise CheckpointError(f"{key}={given}: {wrong}.{fix}")


def unfinished(siblings: Path, fingerprint: str) -> tuple[RunDirectory | None, str]:
    """The newest run in a folder that has this fingerprint, has a checkpoint and is not done; and what was found instead."""
    runs = [RunDirectory(path.parent) for path in siblings.glob("*/status.json")]
    passed = {"of other values": 0, "done": 0, "without a checkpoint": 0}
    resumable = []
    for run in runs:
        status = run.status()
        if status.get("fingerprint") != fingerprint:
            passed["of other values"] += 1
        elif status.get("state") == "done":
            passed["done"] += 1
        elif not run.resumable_steps():
            passed["without a checkpoint"] += 1
        else:
            resumable.append(run)
    found = ", ".join(f"{count} {what}" for what, count in passed.items() if count)
    newest = max(resumable, key=lambda run: float(str(run.status().get("started", 0))), default=None)
    return newest, f"{len(runs)} runs in {siblings}" + (f" ({found})" if found else "")
