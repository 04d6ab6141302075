"""The test harness itself: a rank that raises or hangs fails its test, with what it was doing."""

from __future__ import annotations

import os
import time

import pytest
import torch
import torch.distributed as dist

from tests import workers


def add_ranks(rank: int) -> float:
    total = torch.tensor(float(rank))
    dist.all_reduce(total)
    return total.item()


def fail_on_one(rank: int) -> None:
    if rank == 1:
        raise ValueError("a mistake on rank 1")


def hang_here_on_one(rank: int) -> None:
    while rank == 1:
        time.sleep(0.1)


def die_on_one(rank: int) -> None:
    if rank == 1:
        os._exit(7)


def test_results_come_back_in_rank_order_and_a_failure_is_of_its_run_alone() -> None:
    assert workers.run(2, add_ranks) == [1.0, 1.0]
    with pytest.raises(workers.RankFailed, match="a mistake on rank 1"):
        workers.run(2, fail_on_one)
    assert workers.run(2, add_ranks) == [1.0, 1.0]


def test_a_hung_rank_fails_with_its_stack(monkeypatch: pytest.MonkeyPatch) -> None:
    assert workers.run(2, add_ranks) == [1.0, 1.0]
    monkeypatch.setattr(workers, "TIMEOUT", 8)
    with pytest.raises(workers.RankFailed, match=r"rank 1 hung[\s\S]*hang_here_on_one"):
        workers.run(2, hang_here_on_one)


def test_a_rank_that_dies_is_told_at_once() -> None:
    assert workers.run(2, add_ranks) == [1.0, 1.0]
    began = time.monotonic()
    with pytest.raises(workers.RankFailed, match="rank 1 died with exit code 7"):
        workers.run(2, die_on_one)
    assert time.monotonic() - began < workers.TIMEOUT / 2
