"""Rules on what task=report is asked."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from eellm.config.schema import ReportConfig, TaskConfig
from eellm.errors import Problem

Problems = Iterator[Problem]

EXAMPLE = "report.runs=outputs or report.runs=multirun/<study>"


def runs_are_there(task: TaskConfig, report: ReportConfig) -> Problems:
    if task.name != "report":
        return
    if not report.runs:
        yield Problem("report.runs", report.runs, "task=report compares the runs of a folder", EXAMPLE)
        return
    for source in [report.runs] if isinstance(report.runs, str) else report.runs:
        if not source.startswith("wandb://") and not Path(source).expanduser().is_dir():
            yield Problem("report.runs", source, "there is no such folder", EXAMPLE)


def the_page_can_be_written(task: TaskConfig, report: ReportConfig) -> Problems:
    if task.name != "report" or report.output is None:
        return
    output = Path(report.output).expanduser()
    if output.is_dir():
        yield Problem("report.output", report.output, "is a folder", f"report.output={output / 'report.html'}")
    elif not output.parent.is_dir():
        yield Problem("report.output", report.output, f"there is no folder {output.parent}", "make it first, or name another")


RULES = (runs_are_there, the_page_can_be_written)
