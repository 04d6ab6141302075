"""The interval against enumeration, the order of works, the clock over ranks."""

from __future__ import annotations

import itertools
import time

import pytest
import torch

from eellm.benchmark.paired_timing import CriticalPath, alternate, median_interval
from tests import workers


@pytest.mark.parametrize("count", range(6, 13))
def test_the_interval_covers_the_median_and_no_narrower_pair_does(count: int) -> None:
    """Each value is above or below the true median with equal chance: all 2^n patterns, counted."""
    interval = median_interval(list(range(count)))
    cut = int(interval.low)
    assert interval.high == count - 1 - cut

    def coverage(cut: int) -> float:
        below = [sum(pattern) for pattern in itertools.product((0, 1), repeat=count)]
        return sum(cut < number < count - cut for number in below) / 2**count

    assert coverage(cut) >= 0.95 > coverage(cut + 1)


def test_few_values_give_their_extremes_and_order_does_not_matter() -> None:
    interval = median_interval([5.0, 1.0, 2.0])
    assert (interval.median, interval.low, interval.high) == (2.0, 1.0, 5.0)


def test_rounds_turn_round_and_the_warm_up_does_not_count() -> None:
    calls = []
    works = {name: lambda name=name: calls.append(name) for name in "abc"}
    times = itertools.count()

    def clock(work) -> float:
        work()
        return float(next(times))

    seconds = alternate(works, clock, rounds=2, warmup=1)
    assert "".join(calls) == "cba" + "abc" + "cba"
    assert seconds == {"a": [3.0, 8.0], "b": [4.0, 7.0], "c": [5.0, 6.0]}


def timed_by_rank(rank: int) -> float:
    return CriticalPath(torch.device("cpu")).seconds(lambda: time.sleep(0.3 if rank == 1 else 0.0))


@pytest.mark.dist
def test_the_slowest_rank_sets_the_time_of_all() -> None:
    first, second = workers.run(2, timed_by_rank)
    assert first == second >= 0.3
