"""What a sink is: a place that metrics are written to."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from eellm.metrics.rows import Row
from eellm.metrics.tables import TableRow


class Sink:
    """Takes everything and keeps nothing; a sink overrides what it has a place for."""

    def log(self, row: Row) -> None:
        """One row of metrics, with `step` and `time`."""

    def table(self, name: str, rows: Sequence[TableRow]) -> None:
        """A whole table; a later one of the same name replaces it."""

    def html(self, name: str, text: str) -> None:
        """A finished page."""

    def image(self, name: str, path: Path) -> None:
        """A finished picture, a PNG file."""

    def close(self, final: dict[str, float], status: str) -> None:
        """Called once, at the end, whatever the status."""
