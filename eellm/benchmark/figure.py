"""What a benchmark reports: named numbers with a unit, an interval where they were timed, and a target where there is one."""

from __future__ import annotations

from dataclasses import dataclass

from eellm.benchmark.paired_timing import Interval
from eellm.layout import ParallelLayout
from eellm.metrics import names
from eellm.metrics.tables import TableRow

MEGABYTE = 1e6


@dataclass(frozen=True)
class Figure:
    """`value` is what counts; a timed one is its interval's median. A target is an upper bound."""

    name: str
    label: str
    unit: str
    value: float
    interval: Interval | None = None
    target: float | None = None

    @property
    def meets(self) -> bool | None:
        return None if self.target is None else self.value <= self.target

    @property
    def is_clear(self) -> bool:
        """Whether all of the interval lies on the value's side of the target."""
        if self.target is None or self.interval is None:
            return True
        return (self.interval.low <= self.target) == (self.interval.high <= self.target)

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
            "meets": self.meets,
        }


def timed(name: str, label: str, unit: str, interval: Interval, target: float | None = None) -> Figure:
    return Figure(name, label, unit, interval.median, interval, target)


def megabytes(name: str, label: str, size: float, target: float | None = None) -> Figure:
    """`size` and `target` in bytes."""
    return Figure(name, label, "MB", size / MEGABYTE, target=None if target is None else target / MEGABYTE)


def layout_name(layout: ParallelLayout) -> str:
    """As the options of `parallel` are called: single, pp2, tp2_pp2."""
    sizes = {"tp": layout.tp, "pp": layout.pp, "vp": layout.vp, "dp": layout.dp}
    return "_".join(f"{name}{size}" for name, size in sizes.items() if size > 1) or "single"
