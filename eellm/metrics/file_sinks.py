"""The sinks that write into the run directory: metrics.jsonl (the record), metrics.csv (its mirror), tables.

What the system refuses to write is raised as a WriteError.
"""

from __future__ import annotations

import contextlib
import csv
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

from eellm.errors import writing
from eellm.metrics.rows import Row, encode_row, read_rows, rewrite_rows, rows_until
from eellm.metrics.sink import Sink
from eellm.metrics.tables import TableRow, cell_text, columns_of, write_table


class JsonlSink(Sink):
    """metrics.jsonl, appended to and flushed line by line.

    An existing file is continued: rows after `resume_step` (what a resumed run will write again) and an
    unfinished last line are dropped first. None keeps all rows.
    """

    def __init__(self, path: Path, resume_step: int | None = None):
        self._path = path
        with writing(path):
            rewrite_rows(path, rows_until(read_rows(path), resume_step))
            self._file = open(path, "a", buffering=1, encoding="utf-8")  # noqa: SIM115

    def log(self, row: Row) -> None:
        with writing(self._path):
            self._file.write(encode_row(row) + "\n")

    def close(self, final: dict[str, float], status: str) -> None:
        _close(self._file)


class CsvSink(Sink):
    """metrics.csv, equal to metrics.jsonl row by row; begins with `rows` (what is already in the record).

    A metric seen for the first time becomes a new last column, for which the file is written anew.
    """

    def __init__(self, path: Path, rows: Sequence[Row] = ()):
        self._path = path
        self._columns = columns_of(rows)
        with writing(path):
            write_table(path, rows)
            self._file = self._append()

    def log(self, row: Row) -> None:
        new = [name for name in row if name not in self._columns]
        with writing(self._path):
            if new:
                self._widen(new)
            self._writer(self._file).writerow([cell_text(row.get(name)) for name in self._columns])

    def close(self, final: dict[str, float], status: str) -> None:
        _close(self._file)

    def _append(self) -> TextIO:
        return open(self._path, "a", buffering=1, newline="", encoding="utf-8")

    def _writer(self, file: TextIO) -> Any:
        return csv.writer(file, lineterminator="\n")

    def _widen(self, new: list[str]) -> None:
        self._file.close()
        with open(self._path, newline="", encoding="utf-8") as file:
            old = list(csv.reader(file))[1:]
        self._columns += new
        replacement = self._path.with_name(self._path.name + ".tmp")
        with open(replacement, "w", newline="", encoding="utf-8") as file:
            writer = self._writer(file)
            writer.writerow(self._columns)
            writer.writerows(cells + [""] * (len(self._columns) - len(cells)) for cells in old)
        os.replace(replacement, self._path)
        self._file = self._append()


class TableSink(Sink):
    """Writes each table as `<name>.csv` into the run directory."""

    def __init__(self, run_dir: Path):
        self._run_dir = run_dir

    def table(self, name: str, rows: Sequence[TableRow]) -> None:
        path = self._run_dir / f"{name}.csv"
        with writing(path):
            write_table(path, rows)


def _close(file: TextIO) -> None:
    """A row that could not be written is still in the file's buffer, and closing tries again: it was reported when it failed."""
    with contextlib.suppress(OSError):
        file.close()
