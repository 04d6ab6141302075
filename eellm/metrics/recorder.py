"""Where metrics go: one recorder, any number of sinks. metrics.jsonl is the record, the others mirror it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from eellm.config.schema import Config
from eellm.metrics.file_sinks import CsvSink, JsonlSink, TableSink
from eellm.metrics.names import STEP, TIME
from eellm.metrics.rows import read_rows
from eellm.metrics.sink import Sink
from eellm.metrics.tables import TableRow
from eellm.metrics.wandb_sink import WandbSink


class Recorder:
    """Hands metrics to all sinks. Without sinks (ranks other than the main one) every call does nothing."""

    def __init__(self, sinks: Sequence[Sink]):
        self._sinks = list(sinks)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Write one row. Values are those of the whole run: the caller has reduced them over ranks."""
        if not self._sinks:
            return
        row = {STEP: step, TIME: time.time(), **{name: float(value) for name, value in metrics.items()}}
        for sink in self._sinks:
            sink.log(row)

    def table(self, name: str, rows: Sequence[TableRow]) -> None:
        """Write a table: `<name>.csv` in the run directory, and its mirrors."""
        for sink in self._sinks:
            sink.table(name, rows)

    def html(self, name: str, text: str) -> None:
        """Hand a finished page to the sinks that can show one."""
        for sink in self._sinks:
            sink.html(name, text)

    def image(self, name: str, path: Path) -> None:
        """Hand a finished picture to the sinks that can show one."""
        for sink in self._sinks:
            sink.image(name, path)

    def close(self, final: dict[str, float], status: str) -> None:
        """End the record. `final`: the run's last scalars; `status`: `done`, `failed` or `preempted`. Idempotent."""
        sinks, self._sinks = self._sinks, []
        for sink in sinks:
            sink.close(final, status)


def open_recorder(config: Config, run_dir: Path, is_main_rank: bool, resume_step: int | None = None) -> Recorder:
    """The recorder of a run. An existing record is continued; `resume_step` drops what was written after it."""
    if not is_main_rank:
        return Recorder([])
    record = run_dir / "metrics.jsonl"
    sinks: list[Sink] = [JsonlSink(record, resume_step), TableSink(run_dir)]
    if config.logger.csv:
        sinks.append(CsvSink(run_dir / "metrics.csv", read_rows(record)))
    if config.logger.wandb.mode != "off":
        sinks.append(WandbSink(config, run_dir, read_rows(record)))
    return Recorder(sinks)
