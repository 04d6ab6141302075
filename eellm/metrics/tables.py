"""The CSV tables of a run directory (exits.csv, trade_off.csv, speed_quality.csv): written and read back.

A cell is a number, a text, a truth value or nothing (None, an empty cell). Columns stand in the order in which
they first appear.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from eellm.metrics.rows import encode

Cell = float | int | str | bool | None
TableRow = Mapping[str, Cell]


def columns_of(rows: Sequence[TableRow]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row))


def cell_text(cell: Cell) -> str:
    if cell is None:
        return ""
    return str(encode(cell)) if isinstance(cell, float) else str(cell)


def parse_cell(text: str) -> Cell:
    """Numbers as numbers, "" as None, everything else as it stands."""
    if text in ("", "True", "False"):
        return {"": None, "True": True, "False": False}[text]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def write_table(path: Path, rows: Sequence[TableRow]) -> None:
    """Write rows as CSV, replacing the file in one go."""
    columns = columns_of(rows)
    replacement = path.with_name(path.name + ".tmp")
    with open(replacement, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        if columns:
            writer.writerow(columns)
        writer.writerows([cell_text(row.get(name)) for name in columns] for row in rows)
    os.replace(replacement, path)


def read_table(path: Path) -> list[dict[str, Cell]]:
    """Rows of a CSV written by `write_table` or by pandas; [] where there is no file.

    Raises ValueError, naming the line, where a row has not one cell a column.
    """
    if not path.exists():
        return []
    rows: list[dict[str, Cell]] = []
    with open(path, newline="", encoding="utf-8") as file:
        reader = csv.reader(file)
        try:
            columns = next(reader, [])
            for cells in filter(None, reader):
                if len(cells) != len(columns):
                    raise ValueError(f"{len(cells)} cells for {len(columns)} columns")
                rows.append({name: parse_cell(text) for name, text in zip(columns, cells, strict=True)})
        except (csv.Error, ValueError) as error:
            raise ValueError(f"{path.name}, line {reader.line_num}: {error}") from error
    return rows
