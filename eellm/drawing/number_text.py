"""How numbers are written in tables and sentences, the same in the terminal and on the page."""

from __future__ import annotations

import math

from eellm.metrics.tables import Cell

MISSING = "\N{EN DASH}"
TIMES = "\N{MULTIPLICATION SIGN}"


def fixed(value: Cell, digits: int = 3) -> str:
    """A number with a fixed count of decimals; a dash for nothing."""
    if not isinstance(value, (int, float)):
        return MISSING if value is None else str(value)
    if not math.isfinite(value):
        return str(value)
    return f"{value:,.{digits}f}"


def percent(value: Cell, digits: int = 0) -> str:
    """A share as per cent; a share that is not quite all or nothing never reads as 100% or 0%."""
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        return MISSING
    text = f"{100 * value:.{digits}f}"
    smallest = 10.0**-digits
    if 0 < value < 1 and float(text) in (0.0, 100.0):
        text = f"<{smallest:.{digits}f}" if value < 0.5 else f">{100 - smallest:.{digits}f}"
    return f"{text}%"


def with_error(value: Cell, error: Cell) -> str:
    """A score and its standard error where it has one."""
    return fixed(value) if error is None else f"{fixed(value)} \N{PLUS-MINUS SIGN} {fixed(error)}"


def perplexity(value: Cell) -> str:
    """One decimal up to a thousand, none above."""
    return fixed(value, 1 if isinstance(value, (int, float)) and value < 1000 else 0)


def threshold(value: Cell | list[float]) -> str:
    """As given in the config: one number or one per exit; a dash at full depth."""
    if isinstance(value, list):
        return " ".join(map(threshold, value))
    if value is None:
        return MISSING
    return f"{value:g}" if isinstance(value, (int, float)) else str(value)


def count(value: float) -> str:
    """1,234 or 5.6 M or 7.8 B."""
    for size, unit in ((1e12, " T"), (1e9, " B"), (1e6, " M")):
        if value >= size:
            digits = 0 if value >= 100 * size else 1
            return f"{value / size:.{digits}f}{unit}"
    return f"{value:,.0f}"


def duration(seconds: float) -> str:
    """58 s, 4 min 12 s, 3 h 5 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def plural(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def listing(words: list[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1]


def binary_bytes(value: float) -> str:
    """512 B, 3.4 MiB, 12.5 GiB."""
    for power, unit in ((3, "GiB"), (2, "MiB"), (1, "KiB")):
        if value >= 1024**power:
            return f"{value / 1024**power:.1f} {unit}"
    return f"{value:.0f} B"


def time_text(seconds: float) -> str:
    """25.1 s, 3.42 ms, 12.0 us; with hours and minutes above ten minutes."""
    if seconds >= 600:
        return duration(seconds)
    for size, unit in ((1.0, "s"), (1e-3, "ms")):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} us" if seconds else "0 s"
