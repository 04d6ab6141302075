"""Rows that cover all pairs of values of several factors: a greedy covering array, the same on every machine.

Most faults of a layout show where two choices meet (a tied matrix and interleaving, masked data and a data-parallel
rank), so rows in which every two values meet at least once find them with a small part of the full product.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable

Row = dict[str, str]
Pair = frozenset[tuple[str, str]]


def pairs_of(row: Row) -> set[Pair]:
    return {frozenset(pair) for pair in itertools.combinations(row.items(), 2)}


def all_pairs(factors: dict[str, list[str]], possible: Callable[[Row], bool]) -> list[Pair]:
    """Every pair of values of different factors that may stand in one row, in the factors' order."""
    pairs = []
    for first, second in itertools.combinations(factors, 2):
        for values in itertools.product(factors[first], factors[second]):
            if possible(dict(zip((first, second), values, strict=True))):
                pairs.append(frozenset(zip((first, second), values, strict=True)))
    return pairs


def covering_rows(factors: dict[str, list[str]], possible: Callable[[Row], bool], wanted: list[Pair]) -> list[Row]:
    """Rows in which every wanted pair occurs. Each starts from the first pair that is missing, and takes, factor by factor, the
    value that brings most missing pairs; equals are drawn from a fixed seed, so that factors do not vary in step."""
    missing = dict.fromkeys(wanted)
    draw = random.Random(0)
    rows = []
    while missing:
        row: Row = dict(next(iter(missing)))
        for name in factors:
            if name not in row:
                choices = [value for value in factors[name] if possible({**row, name: value})]
                row[name] = max(choices, key=lambda value: (_gain(row, (name, value), missing), draw.random()))
        for pair in pairs_of(row):
            missing.pop(pair, None)
        rows.append({name: row[name] for name in factors})
    return rows


def _gain(row: Row, item: tuple[str, str], missing: dict[Pair, None]) -> int:
    return sum(frozenset((item, other)) in missing for other in row.items())
