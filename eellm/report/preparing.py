"""What task=prepare_data shows: a bar on a terminal, lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

_SECONDS_BETWEEN_LINES = 5.0


class PreparationDisplay:
    """Counts characters of shards against the whole text; those that an earlier run left are counted too, and named."""

    def __init__(self, console: Console, bar: Progress | None, characters: int):
        self.console, self.bar, self.total = console, bar, characters
        self.done, self.kept, self.printed = 0, 0, time.monotonic()
        self.task = None if bar is None else bar.add_task("", total=characters)

    def shard(self, characters: int, kept: bool) -> None:
        self.done += characters
        self.kept += kept
        if self.bar is not None and self.task is not None:
            self.bar.update(self.task, completed=self.done, description=self._kept())
        elif time.monotonic() - self.printed > _SECONDS_BETWEEN_LINES or self.done == self.total:
            self.printed = time.monotonic()
            self.console.print(f"{self.done / 1e6:,.1f} of {self.total / 1e6:,.1f} million characters{self._kept()}")

    def finish(self, output: Path, told: str) -> None:
        self.console.print(f"{output}: {told}", soft_wrap=True)
        self.console.print(f"read it with: data=megatron data.path={output}", soft_wrap=True)

    def _kept(self) -> str:
        return f"  ({self.kept} shards kept from before)" if self.kept else ""


@contextmanager
def shown_progress(characters: int) -> Iterator[PreparationDisplay]:
    """`characters` of text in all; 0 = nothing to do."""
    console = Console(highlight=False)
    if not sys.stdout.isatty() or not characters:
        yield PreparationDisplay(console, None, characters)
        return
    columns = (TextColumn("tokenise"), BarColumn(bar_width=24), TaskProgressColumn(), TextColumn("{task.description}"))
    with Progress(*columns, TimeRemainingColumn(compact=True), console=console) as bar:
        yield PreparationDisplay(console, bar, characters)
