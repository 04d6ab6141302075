"""Errors that are the user's to fix: shown without a traceback, with what to do about them."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path


class UserError(Exception):
    """Base class: `run.py` prints the message and ends with status 1, without a traceback."""


@dataclass(frozen=True)
class Problem:
    """One thing wrong with a config: where, what was given, why it cannot be, what would be right."""

    path: str
    value: object
    reason: str
    fix: str

    def __str__(self) -> str:
        return f"{self.path}={as_typed(self.value)}: {self.reason}\n    fix: {self.fix}"


def as_typed(value: object) -> str:
    """A value as it is written on the command line: null, true, [1,2]."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return "[" + ",".join(map(as_typed, value)) + "]" if isinstance(value, list) else str(value)


class ConfigError(UserError):
    """All problems of a config at once."""

    def __init__(self, problems: list[Problem]):
        self.problems = problems
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        super().__init__("\n  ".join([f"{count} in the configuration:", *map(str, problems)]))

    def __reduce__(self):
        return ConfigError, (self.problems,)


class CheckpointError(UserError):
    """A checkpoint is missing, partial or of another model; says what was looked for and found."""


class DataError(UserError):
    """A corpus or tokenizer cannot be read or is not what it should be."""


class RunError(UserError):
    """There are no runs where some are looked for, or none that can be compared as asked."""


class ConversionError(UserError):
    """A model cannot be converted: names the file, tensor or field, what it is and what was looked for."""


class NonFiniteError(UserError):
    """Training met NaN or infinity; names the step, the head or the parameters, and their pipeline stage."""


class WriteError(UserError):
    """A file cannot be written: names it and the system's reason (no space left, read-only, not a directory)."""

    @classmethod
    def of(cls, path: str | Path, error: OSError) -> WriteError:
        return cls(f"cannot write {path}: {error.strerror or error}.")


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Turn the system's refusal to write `path` into a WriteError."""
    try:
        yield
    except OSError as error:
        raise WriteError.of(path, error) from error


class RankFailure(Exception):
    """A rank failed by a fault of ours; the message holds its rank and its traceback."""


class JobFailed(Exception):
    """A job of a sweep has failed, and its error has been shown: for sweepers that count failures by what is raised."""


def shown_as(error: BaseException) -> str:
    """What a user is shown: a mistake of theirs as its message, a fault of ours with its traceback."""
    if isinstance(error, UserError | RankFailure):
        return str(error)
    return "".join(traceback.format_exception(error)).rstrip()


class MissingExtra(UserError):
    """An optional package is needed; names the extra that installs it."""

    def __init__(self, package: str, extra: str, purpose: str):
        self.args_ = (package, extra, purpose)
        super().__init__(f"{purpose} needs {package}, which is not installed. Install it with: pip install 'eellm[{extra}]'")

    def __reduce__(self):
        return MissingExtra, self.args_
