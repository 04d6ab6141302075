"""Reads a wandb transaction log (the .wandb file of an offline run) back, as an independent check of what was written.

The file is a LevelDB log: after a 7-byte file header, blocks of 32 KiB hold chunks of
(crc32 of type and data u32, length u16, type u8, data); type 1 is a whole record, 2, 3, 4 its first, middle and last
parts.
"""

from __future__ import annotations

import json
import struct
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

BLOCK = 32768
CHUNK_HEADER = 7


@dataclass
class OfflineRun:
    """What an offline run recorded: history rows, config, summary, metric definitions, run fields."""

    history: list[dict[str, Any]] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    metrics: list[Any] = field(default_factory=list)
    run: Any = None
    exit_code: int | None = None
    folder: Path = Path()

    def table(self, name: str) -> dict[str, Any]:
        """The JSON of the last table logged under a name: `columns` and `data`."""
        key = f"{name}.path"
        path = [row[key] for row in self.history if key in row][-1]
        return json.loads((self.folder / "files" / path).read_text())


def records(data: bytes) -> Iterator[bytes]:
    """The records of a log up to the first chunk that is not whole: a log that is still being written ends anywhere."""
    position, parts = CHUNK_HEADER, b""
    while position + CHUNK_HEADER <= len(data):
        if BLOCK - position % BLOCK < CHUNK_HEADER:
            position += BLOCK - position % BLOCK
            continue
        checksum, length, kind = struct.unpack_from("<IHB", data, position)
        end = position + CHUNK_HEADER + length
        if zlib.crc32(data[position + CHUNK_HEADER - 1 : end]) != checksum:
            return
        parts += data[position + CHUNK_HEADER : end]
        position = end
        if kind in (1, 4):
            yield parts
            parts = b""


def _key(item) -> str:
    return item.key or ".".join(item.nested_key)


def read_offline_run(run_dir: Path, patience: float = 20.0) -> OfflineRun:
    """The newest offline run under `<run_dir>/wandb`, once the record of its exit is there.

    wandb's service may write the end of the file a moment after `finish` has returned.

    Raises:
        TimeoutError: no such record after `patience` seconds.
    """
    deadline = time.monotonic() + patience
    while True:
        run = _read(max(run_dir.glob("wandb/offline-run-*/run-*.wandb"), key=lambda path: path.stat().st_mtime_ns))
        if run.exit_code is not None:
            return run
        if time.monotonic() > deadline:
            raise TimeoutError(f"{run.folder} has no record of the run's exit after {patience:g} s")
        time.sleep(0.1)


def _read(path: Path) -> OfflineRun:
    from wandb.proto import wandb_internal_pb2

    result = OfflineRun(folder=path.parent)
    for data in records(path.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        kind = record.WhichOneof("record_type")
        if kind == "history":
            result.history.append({_key(item): json.loads(item.value_json) for item in record.history.item})
        elif kind == "run":
            result.run = record.run
            result.config |= {_key(item): json.loads(item.value_json) for item in record.run.config.update}
        elif kind == "config":
            result.config |= {_key(item): json.loads(item.value_json) for item in record.config.update}
        elif kind == "summary":
            result.summary |= {_key(item): json.loads(item.value_json) for item in record.summary.update}
        elif kind == "metric":
            result.metrics.append(record.metric)
        elif kind == "exit":
            result.exit_code = record.exit.exit_code
    return result
