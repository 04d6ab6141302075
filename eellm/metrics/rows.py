"""metrics.jsonl, the record of a run: one JSON object a line, `{"step": .., "time": .., <name>: value, ..}`.

JSON has no NaN and no infinities. They are written as the strings "NaN", "Infinity" and "-Infinity", which
`float()` and pandas read back and any JSON parser accepts; null would hide which of them it was.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeGuard, TypeVar

from eellm.metrics.names import STEP, TIME

Row = dict[str, float]
T = TypeVar("T")
NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def encode(value: float) -> float | str:
    """A number as it stands in JSON and CSV."""
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "Infinity" if value > 0 else "-Infinity"
    return value


def encode_row(row: Row) -> str:
    """One line without its end."""
    return json.dumps({name: encode(value) for name, value in row.items()}, allow_nan=False)


def decode_row(line: str) -> Row:
    """Raises ValueError for what is no row."""
    row = decode_values(json.loads(line))
    for name in (STEP, TIME):
        if not math.isfinite(row.get(name, math.nan)):
            raise ValueError(f"{name} is {row[name]}" if name in row else f"{name} is missing")
    if row[STEP] != int(row[STEP]):
        raise ValueError(f"{STEP} is {row[STEP]}, not a whole number")
    return row


def decode_values(values: object) -> Row:
    """Numbers by name, as they were before `encode`. Raises ValueError for anything else."""
    if not isinstance(values, dict):
        raise ValueError(f"holds {values!r:.40}, not an object")
    row: Row = {}
    for name, value in values.items():
        read = NON_FINITE.get(value, value) if isinstance(value, str) else value
        if not is_number(read):
            raise ValueError(f"{name} is {value!r:.40}, not a number")
        row[name] = read
    return row


def is_number(value: object) -> TypeGuard[float]:
    """Whether it is one that a float can hold; true and false are none."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return isinstance(value, float) or abs(value) <= sys.float_info.max


def read_rows(path: Path) -> list[Row]:
    """All rows of a metrics.jsonl in order; [] where there is no file.

    A last line without an end is what a killed process leaves behind, and is left out. Raises ValueError, naming the line, for
    any other that is no row.
    """
    if not path.exists():
        return []
    return decode_lines(path, path.read_text(encoding="utf-8").split("\n")[:-1], decode_row)


def decode_lines(path: Path, lines: Iterable[str], decode: Callable[[str], T]) -> list[T]:
    """What the lines of a file hold, empty ones left out. Raises ValueError, naming the line that `decode` cannot read."""
    found = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                found.append(decode(line))
            except ValueError as error:
                raise ValueError(f"{path.name}, line {number}: {error}") from error
    return found


def rewrite_rows(path: Path, rows: Iterable[Row]) -> None:
    """Replace a metrics.jsonl in one go, so that a kill in between loses nothing."""
    replacement = path.with_name(path.name + ".tmp")
    replacement.write_text("".join(encode_row(row) + "\n" for row in rows), encoding="utf-8")
    os.replace(replacement, path)


def rows_until(rows: Iterable[Row], step: int | None) -> list[Row]:
    """Rows up to and including a step; all of them for None."""
    return [row for row in rows if step is None or row[STEP] <= step]
