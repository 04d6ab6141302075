"""metrics.jsonl, the record of a run: one JSON object a line, `{"step": .., "time": .., <name>: value, ..}`.

JSON has no NaN and no infinities. They are written as the strings "NaN", "Infinity" and "-Infinity", which
`float()` and pandas read back and any JSON parser accepts; null would hide which of them it was.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from pathlib import Path

from eellm.metrics.names import STEP

Row = dict[str, float]
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
    return {name: NON_FINITE[value] if isinstance(value, str) else value for name, value in json.loads(line).items()}


def read_rows(path: Path) -> list[Row]:
    """All rows of a metrics.jsonl in order; [] where there is no file.

    A last line without an end is what a killed process leaves behind, and is left out.
    """
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    return [decode_row(line) for line in lines if line.strip()]


def rewrite_rows(path: Path, rows: Iterable[Row]) -> None:
    """Replace a metrics.jsonl in one go, so that a kill in between loses nothing."""
    replacement = path.with_name(path.name + ".tmp")
    replacement.write_text("".join(encode_row(row) + "\n" for row in rows), encoding="utf-8")
    os.replace(replacement, path)


def rows_until(rows: Iterable[Row], step: int | None) -> list[Row]:
    """Rows up to and including a step; all of them for None."""
    return [row for row in rows if step is None or row[STEP] <= step]
