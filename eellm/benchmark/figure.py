"""What a benchmark reports: named numbers with a unit, an interval where they were timed, and a target where there is one."""

from __future__ import annotations

from dataclasses import dataclass, replace

from eellm.benchmark.paired_timing import Interval
from eellm.layout import ParallelLayout
from eellm.metrics import names
from eellm.metrics.tables import TableRow

MEGABYTE = 1e6

TOKENS = "tokens/s"
"""Unit of how fast text is generated."""


@dataclass(frozen=True)
class Figure:
    """`value` is what counts; a timed one is its interval's median. None: it was not measured, and `note` says why.

    A target is an upper bound, or with `at_least` a lower one.
    """

    name: str
    label: str
    unit: str
    value: float | None
    interval: Interval | None = None
    target: float | None = None
    at_least: bool = False
    note: str = ""

    @property
    def meets(self) -> bool | None:
        return None if self.value is None else self._on_the_right_side(self.value)

    @property
    def is_clear(self) -> bool:
        """Whether all of the interval lies on the value's side of the target."""
        if self.target is None or self.interval is None:
            return True
        return self._on_the_right_side(self.interval.low) == self._on_the_right_side(self.interval.high)

    @property
    def group(self) -> str:
        """What belongs together: the part of the name before the slash."""
        return self.name.partition("/")[0]

    @property
    def metric(self) -> str:
        return names.BENCHMARK.format(figure=self.name)

    def row(self, layout: str) -> TableRow:
        """A row of benchmark.csv."""
        interval = self.interval
        return {
            "name": self.name,
            "layout": layout,
            "value": self.value,
            "unit": self.unit,
            "median": interval.median if interval else None,
            "low": interval.low if interval else None,
            "high": interval.high if interval else None,
            "target": self.target,
            "bound": None if self.target is None else "at least" if self.at_least else "at most",
            "meets": self.meets,
            "note": self.note or None,
        }

    def _on_the_right_side(self, value: float) -> bool | None:
        if self.target is None:
            return None
        return value >= self.target if self.at_least else value <= self.target


def timed(name: str, label: str, unit: str, interval: Interval, target: float | None = None, at_least: bool = False) -> Figure:
    return Figure(name, label, unit, interval.median, interval, target, at_least)


def not_run(figure: Figure, reason: str) -> Figure:
    """The figure's row where it could not be measured."""
    return replace(figure, value=None, interval=None, note=f"not run: {reason}")


def megabytes(name: str, label: str, size: float, target: float | None = None) -> Figure:
    """`size` and `target` in bytes."""
    return Figure(name, label, "MB", size / MEGABYTE, target=None if target is None else target / MEGABYTE)


def layout_name(layout: ParallelLayout) -> str:
    """As the options of `parallel` are called: single, pp2, tp2_pp2."""
    sizes = {"tp": layout.tp, "pp": layout.pp, "vp": layout.vp, "dp": layout.dp}
    return "_".join(f"{name}{size}" for name, size in sizes.items() if size > 1) or "single"
