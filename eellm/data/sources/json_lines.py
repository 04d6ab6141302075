"""JSON lines, plain or gzipped: one document a line."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, cast

from eellm.config.schema import DataConfig
from eellm.data.sources.document import Document, check_memory
from eellm.data.sources.files import given_files, reading
from eellm.errors import DataError

LONG_LINE = 1 << 26
"""Bytes from which on a line's length is measured before it is read."""


def documents(data: DataConfig) -> Iterator[Document]:
    for place, name, record in records(data):
        yield Document(name, _text(record, data.text_field, place))


def records(data: DataConfig) -> Iterator[tuple[str, str, dict]]:
    """(place for messages, name inside the corpus, object) of every line that is not blank. Raises DataError."""
    for name, path in given_files(data):
        for number, line in enumerate(_lines(path), start=1):
            if line.strip():
                yield f"{path}:{number}", f"{name}:{number}", _record(line, f"{path}:{number}")


def _lines(path: Path) -> Iterator[bytes]:
    number = 0
    with reading(path), cast(BinaryIO, gzip.open(path) if path.suffix == ".gz" else path.open("rb")) as file:
        try:
            while line := file.readline(LONG_LINE):
                number += 1
                if len(line) == LONG_LINE and not line.endswith(b"\n"):
                    line += _rest_of_line(file, len(line), f"{path}:{number}")
                yield line
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise DataError(f"{path}: not a whole gzip file after line {number} ({error}). Copy or compress it again.") from error


def _rest_of_line(file: BinaryIO, begun: int, place: str) -> bytes:
    """What is left of a line of which `begun` bytes are read, once its length is known to fit into memory."""
    here, length = file.tell(), begun
    while block := file.readline(LONG_LINE):
        length += len(block)
        if block.endswith(b"\n"):
            break
    check_memory(place, length)
    file.seek(here)
    return file.readline()


def _text(record: dict, field: str, place: str) -> str:
    if not isinstance(record.get(field), str):
        raise DataError(
            f"{place}: no text in the field '{field}'; the line has the fields {sorted(record)}. Set data.text_field."
        )
    return record[field]


def _record(line: bytes, place: str) -> dict:
    try:
        record = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise DataError(f"{place}: not UTF-8 (byte {error.start} of the line).") from error
    except json.JSONDecodeError as error:
        raise DataError(f"{place}: not JSON ({error.msg}, column {error.colno}). jsonl holds one JSON object a line.") from error
    if not isinstance(record, dict):
        raise DataError(f"{place}: no JSON object; the line is a {type(record).__name__}. jsonl holds one JSON object a line.")
    return record
