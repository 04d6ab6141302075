"""What differs between runs, and whether it differs by more than seeds do; and which settings no other one beats."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pandas as pd

from eellm.errors import RunError

Z = 1.959964
T = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622)
"""Half widths of two-sided 95 % intervals, in standard errors: of a known deviation, and with 1 to 9 degrees of freedom."""


def spread(frame: pd.DataFrame, by: str | Sequence[str], value: str) -> pd.DataFrame:
    """`mean`, sample standard deviation `std` (missing for one run) and `n` of a value over the runs (seeds) of each setting.

    Rows without the value do not count. A missing setting (null in the config) is a setting.
    """
    groups = frame.dropna(subset=[value]).groupby(listed(by), sort=False, dropna=False)[value]
    return groups.agg(["mean", "std", "count"]).rename(columns={"count": "n"}).reset_index()


def within_noise(
    frame: pd.DataFrame, by: str, value: str, baseline: object, pair: str = "seed", each: str | Sequence[str] = ()
) -> pd.DataFrame:
    """How far each setting of `by` is from one of them, and whether that is more than chance: one row a setting.

    Runs of equal `pair` are compared with each other, so what a seed does to both is no noise. `difference` is their mean
    difference, `low` and `high` its 95 % interval (Student's t over `n` pairs), `within_noise` whether that holds 0. With
    fewer than two pairs nothing can be said: no interval, and `within_noise`. A missing setting is called "null". Each row's 5 %
    is its own: of twenty settings without any effect one is expected to look as if it had some.

    `each`: columns (a head, a step) for each of whose values, in their order, settings are compared on their own.

    Raises RunError where there is no such baseline, or two runs of one setting and pair.
    """
    if each:
        return _within_noise_of_each(listed(each), frame, by, value, baseline, pair)
    known = frame.dropna(subset=[value])
    known = known.assign(**{by: known[by].astype(object).where(known[by].notna(), "null")})
    if pair not in known:
        known = known.assign(**{pair: 0})
    if known.duplicated([by, pair]).any():
        raise RunError(f"several runs have the same {by} and {pair}: they differ in more than these. Select some of them first.")
    table = known.pivot(index=pair, columns=by, values=value)
    if baseline not in table:
        raise RunError(f"baseline={baseline!r}: no run has {by}={baseline!r} and {value}; there are {list(table.columns)}.")
    rows = []
    for setting in table.columns:
        if setting == baseline:
            continue
        differences = (table[setting] - table[baseline]).dropna()
        n, mean = len(differences), differences.mean()
        half = t_quantile(n - 1) * differences.std() / math.sqrt(n) if n > 1 else math.nan
        bounds = {"difference": mean, "low": mean - half, "high": mean + half, "n": n}
        rows.append({by: setting, **bounds, "within_noise": not abs(mean) > half})
    return pd.DataFrame(rows, columns=[by, "difference", "low", "high", "n", "within_noise"])


def _within_noise_of_each(each: list[str], frame: pd.DataFrame, *compared: Any) -> pd.DataFrame:
    """`within_noise` of every group, behind what the group has in common."""
    parts = []
    for _, group in frame.groupby(each, sort=False):
        part = within_noise(group, *compared)
        for place, column in enumerate(each):
            part.insert(place, column, group[column].iloc[0])
        parts.append(part)
    return pd.concat(parts, ignore_index=True)


def t_quantile(degrees: int) -> float:
    """Half width of a two-sided 95 % interval, in standard errors. Above 9 degrees of freedom by the expansion of Abramowitz and
    Stegun, 26.7.5, right to 3e-3."""
    if degrees <= len(T):
        return T[degrees - 1]
    return Z + (Z**3 + Z) / (4 * degrees) + (5 * Z**5 + 16 * Z**3 + 3 * Z) / (96 * degrees**2)


def pareto_front(
    frame: pd.DataFrame,
    speed: str = "speedup",
    quality: str = "agreement",
    by: str | Sequence[str] | None = None,
    lower_is_better: bool = False,
) -> pd.DataFrame:
    """The rows that no other row beats: none is as good in both columns and better in one. By rising speed, quality falls.

    `by`: a front for each value (or combination) of these columns. `lower_is_better`: of quality, e.g. a loss. Rows without one
    of the two are on no front; equal rows are on it together.
    """
    known = frame.dropna(subset=[speed, quality])
    if by is None:
        return _front(known, speed, quality, lower_is_better)
    groups = known.groupby(listed(by), sort=False, dropna=False)
    fronts = [_front(group, speed, quality, lower_is_better) for _, group in groups]
    return pd.concat(fronts) if fronts else known


def _front(frame: pd.DataFrame, speed: str, quality: str, lower_is_better: bool) -> pd.DataFrame:
    kept: list[tuple[float, float, int]] = []
    goodness = -frame[quality] if lower_is_better else frame[quality]
    # fastest first, the best first among equally fast ones: a row is on the front if it is better than all faster ones
    for fast, good, place in sorted(
        zip(frame[speed], goodness, range(len(frame)), strict=True), key=lambda row: (-row[0], -row[1])
    ):
        if not kept or good > kept[-1][1] or (fast, good) == kept[-1][:2]:
            kept.append((fast, good, place))
    return frame.iloc[[place for _, _, place in reversed(kept)]]


def listed(names: str | Sequence[str] | None) -> list[str]:
    """Names of columns given as one, several or none."""
    return [names] if isinstance(names, str) else list(names or ())
