"""Times of alternating pieces of work, and what can be said of a median with few of them."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist

from eellm.device_clock import seconds_on, wait_for

Work = Callable[[], object]
Some = TypeVar("Some", bound=Work)
Name = TypeVar("Name", bound=str)


@dataclass(frozen=True)
class Interval:
    """A median and the 95 % confidence interval around it."""

    median: float
    low: float
    high: float


def median_interval(values: Sequence[float]) -> Interval:
    """Between order statistics: the narrowest symmetric pair that covers the true median with probability 0.95.

    It presumes independent values and nothing about their distribution. Below six values even the extremes cover
    less; they are given then.
    """
    ordered = sorted(values)
    count = len(ordered)
    # the true median lies below the k-th smallest with the probability of fewer than k heads in `count` tosses
    outside, cut = 0.0, 0
    for heads in range(count // 2):
        outside += math.comb(count, heads) / 2**count
        if 2 * outside > 0.05:
            break
        cut = heads
    return Interval(statistics.median(ordered), ordered[cut], ordered[-1 - cut])


@dataclass(frozen=True)
class CriticalPath:
    """Clock of a piece of work that all ranks do: from a common start to the last rank's end."""

    device: torch.device

    def seconds(self, work: Work) -> float:
        """The same number on all ranks."""
        wait_for(self.device)
        dist.barrier()
        begin = time.perf_counter()
        work()
        elapsed = torch.tensor(seconds_on(self.device) - begin, dtype=torch.float64, device=self.device)
        dist.all_reduce(elapsed, op=dist.ReduceOp.MAX)
        return elapsed.item()


def alternate(works: Mapping[Name, Some], clock: Callable[[Some], float], rounds: int, warmup: int) -> dict[Name, list[float]]:
    """Seconds of each work in each round, after `warmup` rounds that do not count.

    Every round does each work once, in an order that turns round from round to round, so that a drift of the machine
    falls on all of them. Garbage is collected between works, not within.
    """
    seconds: dict[Name, list[float]] = {name: [] for name in works}
    with _collecting_by_hand():
        for number in range(-warmup, rounds):
            for name in sorted(works, reverse=number % 2 == 1):
                gc.collect()
                elapsed = clock(works[name])
                if number >= 0:
                    seconds[name].append(elapsed)
    return seconds


@contextmanager
def _collecting_by_hand() -> Iterator[None]:
    """No garbage collection but by call, which then looks only at what was made inside."""
    enabled = gc.isenabled()
    gc.disable()
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
        if enabled:
            gc.enable()
