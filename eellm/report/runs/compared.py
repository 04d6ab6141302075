"""The runs that a page compares: what they are called on it, and which of them its figures show."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from eellm.analysis import load_runs, settings_of
from eellm.drawing.number_text import MISSING
from eellm.errors import RunError
from eellm.metrics.names import FINAL, VAL_LOSS

SEED = "seed"
NUMBER = "number"
"""Column of `numbered` frames: what a run is called on the page."""
DEPTH = "model.num_layers"
MOST_LINES = 8
"""Curves that one can tell apart on a figure."""
LONGEST_LABEL, MOST_NAMED = 60, 3
SHORT = "short names"
"""Attribute of `Compared.runs`: what its settings are called in labels."""
QUALITY = VAL_LOSS.format(head=FINAL)


@dataclass(frozen=True)
class Line:
    """One curve of the figures: a run, or the runs of one setting, whose mean is drawn. `runs`: their paths."""

    label: str
    runs: tuple[str, ...]


@dataclass(frozen=True)
class Compared:
    """`runs`: the frame of `load_runs` without the runs of task=report, each with its `number` on the page. `shared`: settings
    that are the same in all of them; `broken`: what cannot be read, as (path, reason)."""

    runs: pd.DataFrame
    shared: dict[str, Any]
    broken: list[tuple[str, str]]

    @classmethod
    def load(cls, sources: str | Sequence[str]) -> Compared:
        """Raises RunError where there is no run."""
        loaded = load_runs(sources)
        runs = _sorted(loaded[loaded["task"] != "report"])
        shared, broken = loaded.attrs["shared"], loaded.attrs["broken"]
        if runs.empty and not broken:
            raise RunError(f"{sources}: there is no run in it but of task=report.")
        runs.insert(0, NUMBER, range(1, len(runs) + 1))
        # pandas copies a frame's attributes with all that is made of it: only what exit_table looks for stays
        shorts = short_names(varying(runs), [*shared, *settings_of(loaded)])
        runs.attrs = {"shared": {name: value for name, value in shared.items() if name == DEPTH}, SHORT: shorts}
        return cls(runs, shared, broken)


def varying(runs: pd.DataFrame) -> list[str]:
    """Settings in which these runs differ, which may be a part of those loaded."""
    settings = [name for name in settings_of(runs) if name != NUMBER]
    return [name for name in settings if runs[name].map(value_text).nunique() > 1]


def lines(runs: pd.DataFrame) -> tuple[list[Line], str]:
    """What figures show of these runs, and in words what that is: every run, or the mean over seeds of every setting, or where
    there are too many of both the runs with the lowest validation loss."""
    settings = varying(runs)
    if len(runs) <= MOST_LINES:
        return [_line(run, settings, runs) for run in runs.to_dict("records")], "Each line is a run."
    others = [name for name in settings if name != SEED]
    texts = [" ".join(value_text(run[name]) for name in others) for run in runs.to_dict("records")]
    groups = [group for _, group in runs.groupby(texts, sort=False)]
    if 1 < len(groups) <= MOST_LINES:
        found = [Line(described(group.iloc[0].to_dict(), others, runs), tuple(group["run"])) for group in groups]
        return found, "Each line is the mean of the runs with one setting."
    known = runs.sort_values(QUALITY) if QUALITY in runs else runs
    best = [_line(run, settings, runs) for run in known.head(MOST_LINES).to_dict("records")]
    which = "with the lowest final validation loss" if QUALITY in runs else "first found"
    return best, f"The {MOST_LINES} runs {which}; the grey band spans all {len(runs)}."


def short_names(settings: Sequence[str], keys: Sequence[str]) -> dict[str, str]:
    """Of every setting the shortest end of its dotted name that no other of a run's keys has: two parts or more, since the last
    alone (`values`, `weight`) does not say of what."""
    ends = Counter(end for key in set(keys) for end in _ends(key))
    return {name: next((end for end in _ends(name) if ends[end] == 1), name) for name in settings}


def _ends(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[-count:]) for count in range(min(2, len(parts)), len(parts) + 1)]


def natural(value: Any) -> tuple[Any, ...]:
    """Sort key of settings: missing ones, numbers, then texts, in which numbers count as such."""
    if value is None or value != value:
        return (0,)
    if isinstance(value, int | float):
        return (1, float(value))
    parts = re.split(r"(\d+(?:\.\d+)?)", str(value).rstrip("]"))  # [2] stands before [2,4]
    return (2, [(index % 2, float(part) if index % 2 else 0.0, "" if index % 2 else part) for index, part in enumerate(parts)])


def _sorted(runs: pd.DataFrame) -> pd.DataFrame:
    """By their settings, the seed last of them."""
    settings = sorted(varying(runs), key=lambda name: name == SEED)
    keys = [tuple(natural(run[name]) for name in settings) for run in runs.to_dict("records")]
    return runs.iloc[sorted(range(len(runs)), key=keys.__getitem__)].reset_index(drop=True)


def value_text(value: Any) -> str:
    """A setting as it stands in a table."""
    if value is None or (isinstance(value, float) and value != value):
        return MISSING
    if isinstance(value, bool):
        return "true" if value else "false"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _line(run: dict[Any, Any], settings: Sequence[str], runs: pd.DataFrame) -> Line:
    return Line(f"{run[NUMBER]}: {described(run, settings, runs)}", (run["run"],))


def described(run: dict[Any, Any], settings: Sequence[str], runs: pd.DataFrame) -> str:
    """The settings that set a run apart where there are few, or else its folder. `runs`: those of the page."""
    if not 0 < len(settings) <= MOST_NAMED:
        return Path(run["run"]).name
    shorts = runs.attrs.get(SHORT, {})
    text = ", ".join(f"{shorts.get(name, name)}={value_text(run[name])}" for name in settings)
    return text if len(text) <= LONGEST_LABEL else text[: LONGEST_LABEL - 1] + "\N{HORIZONTAL ELLIPSIS}"
