"""Programs as CSV: a row for each rank, a cell for each action.

`F3` is the forward pass of microbatch 3, `F3.1` of the rank's second chunk; the letters are those of `Kind`. Sends and
receives (`SF3`, `RF3`, `SB3`, `RB3`) may be left out: they follow from the computation. Empty cells say nothing, so columns
may be used as time.
"""

from __future__ import annotations

import csv
import re
from pathlib import Path

from eellm.errors import writing
from eellm.schedule.program import Action, Kind, Program, ScheduleError

_CELL = re.compile(r"(F|N|B|W|SF|RF|SB|RB)(\d+)(?:\.(\d+))?")


def write_csv(program: Program, path: Path) -> None:
    with writing(path), path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([str(action) for action in actions] for actions in program.ranks)


def read_csv(path: Path) -> Program:
    """Raises ScheduleError, with line and cell, for what is no program; the invariants are the caller's business."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = [row for row in csv.reader(file) if any(cell.strip() for cell in row)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ScheduleError(f"cannot read {path}: {error}") from None
    if not rows:
        raise ScheduleError(f"{path} is empty")
    ranks = tuple(
        tuple(_action(cell.strip(), rank, index) for index, cell in enumerate(row) if cell.strip())
        for rank, row in enumerate(rows)
    )
    actions = [action for row in ranks for action in row]
    microbatches = 1 + max(action.microbatch for action in actions)
    return Program(path.stem, microbatches, 1 + max(action.chunk for action in actions), ranks)


def parse_action(cell: str) -> Action:
    """Inverse of `str(action)`. Raises ScheduleError."""
    match = _CELL.fullmatch(cell)
    if match is None:
        raise ScheduleError(f"`{cell}` is no action; F3 is one, B3.1 is one of the second chunk")
    kind, microbatch, chunk = match.groups()
    return Action(Kind(kind), int(microbatch), int(chunk or 0))


def _action(cell: str, rank: int, index: int) -> Action:
    try:
        return parse_action(cell)
    except ScheduleError as error:
        raise ScheduleError(f"rank {rank}, cell {index + 1}: {error}") from None
