"""Figures as a table for the terminal, at most 100 columns wide."""

from __future__ import annotations

from rich import box
from rich.table import Table

from eellm.benchmark.figure import Figure
from eellm.drawing.number_text import MISSING

NOTE = "interval: 95 % around the median; ~ after a verdict: the interval reaches across the target"


def figures_table(title: str, figures: list[Figure]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1))
    table.add_column("", no_wrap=True)
    for column in ("median", "interval", "", "target", "met"):
        table.add_column(column, justify="left" if column == "" else "right", no_wrap=True)
    group = figures[0].group if figures else ""
    for figure in figures:
        if figure.group != group:
            table.add_section()
            group = figure.group
        table.add_row(figure.label, *cells(figure))
    return table


def cells(figure: Figure) -> list[str]:
    if figure.value is None:
        return [MISSING, "not run", "", target(figure), ""]
    value = f"{figure.value:,.0f}" if figure.unit == "tokens" else number(figure.value)
    return [value, interval(figure), figure.unit, target(figure), verdict(figure)]


def notes(figures: list[Figure]) -> list[str]:
    """What stands below the table: what its columns mean, and why a figure is missing."""
    return [NOTE, *(f"{figure.label}: {figure.note}" for figure in figures if figure.note)]


def number(value: float) -> str:
    """Three decimals, one of a large number, or as many as show three digits of a small one."""
    if abs(value) >= 100:
        return f"{value:,.1f}"
    return f"{value:,.3f}" if value == 0 or abs(value) >= 0.1 else f"{value:.3g}"


def interval(figure: Figure) -> str:
    return "exact" if figure.interval is None else f"{number(figure.interval.low)} .. {number(figure.interval.high)}"


def target(figure: Figure) -> str:
    return "" if figure.target is None else f"{'≥' if figure.at_least else '≤'} {number(figure.target)}"


def verdict(figure: Figure) -> str:
    if figure.meets is None:
        return ""
    return ("yes" if figure.meets else "no") + ("" if figure.is_clear else " ~")
