"""The runs that a page compares: what they are called on it, and which of them its figures show."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from eellm.analysis import load_runs, settings_of
from eellm.errors import RunError
from eellm.metrics.names import FINAL, VAL_LOSS
from eellm.report.number_text import MISSING

SEED = "seed"
NUMBER = "number"
"""Column of `numbered` frames: what a run is called on the page."""
DEPTH = "model.num_layers"
MOST_LINES = 8
"""Curves that one can tell apart on a figure."""
LONGEST_LABEL, MOST_NAMED = 40, 3
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
        runs = loaded[loaded["task"] != "report"].reset_index(drop=True)
        shared, broken = loaded.attrs["shared"], loaded.attrs["broken"]
        if runs.empty and not broken:
            raise RunError(f"{sources}: there is no run in it but of task=report.")
        runs.insert(0, NUMBER, range(1, len(runs) + 1))
        # pandas copies a frame's attributes with all that is made of it: only what exit_table looks for stays
        runs.attrs = {"shared": {name: value for name, value in shared.items() if name == DEPTH}}
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
        return [_line(run, settings) for run in runs.to_dict("records")], "Each line is a run."
    others = [name for name in settings if name != SEED]
    texts = [" ".join(value_text(run[name]) for name in others) for run in runs.to_dict("records")]
    groups = [group for _, group in runs.groupby(texts, sort=False)]
    if 1 < len(groups) <= MOST_LINES:
        found = [Line(_described(group.iloc[0].to_dict(), others), tuple(group["run"])) for group in groups]
        return found, "Each line is the mean of the runs with one setting."
    known = runs.sort_values(QUALITY) if QUALITY in runs else runs
    best = [_line(run, settings) for run in known.head(MOST_LINES).to_dict("records")]
    which = "with the lowest final validation loss" if QUALITY in runs else "first found"
    return best, f"The {MOST_LINES} runs {which}; the grey band spans all {len(runs)}."


def short_name(name: str) -> str:
    """The last part of a dotted name."""
    return name.rpartition(".")[2]


def value_text(value: Any) -> str:
    """A setting as it stands in a table."""
    if value is None or (isinstance(value, float) and value != value):
        return MISSING
    if isinstance(value, bool):
        return "true" if value else "false"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _line(run: dict[Any, Any], settings: Sequence[str]) -> Line:
    return Line(f"{run[NUMBER]}: {_described(run, settings)}", (run["run"],))


def _described(run: dict[Any, Any], settings: Sequence[str]) -> str:
    """The settings that set a run apart where there are few, or else its folder."""
    if not 0 < len(settings) <= MOST_NAMED:
        return Path(run["run"]).name
    text = ", ".join(f"{short_name(name)}={value_text(run[name])}" for name in settings)
    return text if len(text) <= LONGEST_LABEL else text[: LONGEST_LABEL - 1] + "\N{HORIZONTAL ELLIPSIS}"
