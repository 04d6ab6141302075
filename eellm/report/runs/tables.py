"""The tables of a page of many runs. They are sorted by a click on a column's head."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import pandas as pd

from eellm.drawing.number_text import MISSING, fixed, percent, perplexity, threshold
from eellm.metrics import names
from eellm.report.page_tables import dotted, table
from eellm.report.runs.compared import NUMBER, value_text, varying

HEADLINES = (
    names.VAL_LOSS, names.EVAL_LOSS, names.GENERATE_SPEEDUP, names.GENERATE_AGREEMENT, names.GENERATE_MEAN_LAYERS,
    names.CALIBRATE_RISK, names.CALIBRATE_MEAN_LAYERS, names.TOKENS_PER_SECOND, names.STEP_TIME,
)  # fmt: skip
"""Families of metrics in the table of what differs, in its order; the others stand in the table below it."""
MOST_HEADS = 5
"""Heads of a family that stand in the table of what differs; with more, only the final one does."""
MOST_COLUMNS = 10
FOLDED_FROM = 25
"""Rows from which on a table begins folded."""


def runs_table(runs: pd.DataFrame, folder: Path) -> str:
    """What differs between runs and how they ended. `folder`: where the page lies; runs' own pages are linked from there."""
    settings, metrics = varying(runs), headlines(runs)
    columns = ["run", "state", *map(breakable, settings), *map(breakable, metrics), "seconds"]
    rows = []
    for run in runs.to_dict("records"):
        cells = [run_cell(run, folder), escape(str(run["status"])), *(breakable(value_text(run[name])) for name in settings)]
        cells += [number(run[name]) for name in metrics] + [number(run["seconds"], 0)]
        rows.append(row_of(cells, "" if run["status"] == "done" else "unfinished"))
    return sortable(columns, rows)


def metrics_table(runs: pd.DataFrame) -> str:
    """All final metrics that the table of what differs leaves out, in tables that fit on paper."""
    shown = headlines(runs)
    left = [name for name in metric_columns(runs) if name not in shown]
    if not left:
        return ""
    content = ""
    for some in (left[start : start + MOST_COLUMNS] for start in range(0, len(left), MOST_COLUMNS)):
        rows = [row_of([str(run[NUMBER]), *(number(run[name]) for name in some)]) for run in runs.to_dict("records")]
        content += sortable(["run", *map(breakable, some)], rows)
    return f"<details><summary>All other final metrics</summary>{content}</details>"


def failures_table(runs: pd.DataFrame, broken: Sequence[tuple[str, str]]) -> str:
    """Runs that did not end as they should, and what in the folder is no readable run, as (path, reason)."""
    failed = runs[runs["status"].isin(["failed", "preempted"])]
    rows = [
        row_of([f"{run[NUMBER]}", escape(run["status"]), f"<code>{escape(run['run'])}</code>", escape(str(run["error"] or ""))])
        for run in failed.to_dict("records")
    ]
    rows += [row_of([MISSING, "not readable", f"<code>{escape(path)}</code>", escape(why)]) for path, why in broken]
    return table(["run", "state", "directory", "reason"], rows, "texts") if rows else ""


def exits_table(exits: pd.DataFrame, numbers: Mapping[str, int]) -> str:
    """Every head of every run. `exits`: of `eellm.analysis.exit_table`; `numbers`: of runs, by their paths."""
    columns = ["run", "head", "after layer", "loss", "perplexity", "accuracy", "agreement with final", "calibration error", "on"]
    rows = []
    for row in exits.to_dict("records"):
        cells = [str(numbers[row["run"]]), dotted(str(row["head"])), number(row["layer"], 0), number(row["loss"])]
        cells += [_present(row["perplexity"], perplexity), _present(row["accuracy"], _percent)]
        cells += [_present(row["agreement"], _percent), number(row["calibration_error"]), str(row["measured"])]
        rows.append(row_of(cells))
    return folded(f"{len(rows)} heads", sortable(columns, rows), len(rows)) if rows else ""


def speed_table(rows: pd.DataFrame, numbers: Mapping[str, int]) -> str:
    """Rows of speed_quality.csv of any runs. `numbers`: of runs, by their paths."""
    columns = ["run", "decoding", "threshold", "tokens/s", "speedup", "same as full depth", "mean layers"]
    found = []
    for row in rows.to_dict("records"):
        limit = row.get("threshold")
        cells = [str(numbers[row["run"]]), escape(str(row["decoding"])), MISSING if _is_missing(limit) else threshold(limit)]
        cells += [number(row.get("tokens_per_second"), 1), number(row.get("speedup"), 2)]
        cells += [_present(row.get("agreement"), _percent), number(row.get("mean_layers"), 2)]
        found.append(row_of(cells))
    return sortable(columns, found)


def folded(summary: str, content: str, rows: int) -> str:
    """Long tables begin folded."""
    return f"<details><summary>{escape(summary)}</summary>{content}</details>" if rows >= FOLDED_FROM else content


def sortable(columns: Sequence[str], rows: Sequence[str]) -> str:
    return table(columns, rows, "sortable")


def row_of(cells: Sequence[str], kind: str = "") -> str:
    attribute = f' class="{kind}"' if kind else ""
    return f"<tr{attribute}>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"


def run_cell(run: Mapping[Any, Any], folder: Path) -> str:
    """A run's number and folder, linked to its own page where it has one."""
    path = Path(run["run"])
    name = f"{run[NUMBER]} <small>{escape(path.name)}</small>"
    if not (path / "report.html").is_file():
        return name
    return f'<a href="{escape(Path(os.path.relpath(path / "report.html", folder)).as_posix())}">{name}</a>'


def breakable(name: str) -> str:
    """A name or a list of values that may be broken between its parts, but not within a number."""
    return re.sub(r"([/_,]|\.(?!\d))", r"\1<wbr>", escape(name))


def metric_columns(runs: pd.DataFrame) -> list[str]:
    """Final metrics that any of the runs has."""
    return [name for name in map(str, runs) if "/" in name and runs[name].notna().any()]


def headlines(runs: pd.DataFrame) -> list[str]:
    """Final metrics of the table of what differs."""
    found: list[str] = []
    there = metric_columns(runs)
    for family in HEADLINES:
        heads = names.heads_in(family, there) if "{head}" in family else []
        if "{head}" in family:
            found += [family.format(head=head) for head in heads if len(heads) <= MOST_HEADS or head == names.FINAL]
        elif family in there:
            found.append(family)
    return found


def number(value: Any, digits: int | None = None) -> str:
    """With `digits` decimals, or fewer the larger it is."""
    if _is_missing(value):
        return MISSING
    return fixed(value, digits if digits is not None else 3 if abs(value) < 100 else 1 if abs(value) < 10_000 else 0)


def _percent(value: Any) -> str:
    return percent(value, 1)


def _present(value: Any, text: Any) -> str:
    return MISSING if _is_missing(value) else text(value)


def _is_missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))
