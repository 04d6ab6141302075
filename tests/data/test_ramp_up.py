"""The size of every step against megatron-core's own calculator, driven step by step as a training loop would."""

from __future__ import annotations

import random

import pytest
from megatron.core.num_microbatches_calculator import RampupBatchsizeNumMicroBatchesCalculator

from eellm.config.schema import RampUpConfig
from eellm.data.ramp_up import BatchSizes

RAMPS = {
    "several_steps_a_size": (64, 16, 16, 960),
    "one_step_a_size": (64, 16, 16, 120),
    "sizes_left_out": (64, 4, 4, 30),
    "one_increment": (8, 2, 6, 5),
    "final_after_the_first_step": (8, 4, 1, 4),
    "sample_in_the_middle_of_a_step": (12, 2, 2, 35),
}


def by_megatron(final: int, start: int, increment: int, samples: int, steps: int) -> list[tuple[int, int]]:
    """(first sample, size) of each step."""
    calculator = RampupBatchsizeNumMicroBatchesCalculator(final, 1, 1, False, 1, start, increment, samples)
    consumed, found = 0, []
    for _ in range(steps):
        calculator.update(consumed, consistency_check=True)
        found.append((consumed, calculator.get_current_global_batch_size()))
        consumed += found[-1][1]
    return found


def sizes(final: int, start: int, increment: int, samples: int) -> BatchSizes:
    return BatchSizes(final, RampUpConfig(start=start, increment=increment, samples=samples))


@pytest.mark.parametrize("name", RAMPS)
def test_steps_are_megatrons_from_wherever_one_begins(name: str) -> None:
    expected = by_megatron(*RAMPS[name], steps=60)
    found = sizes(*RAMPS[name])
    assert expected[-1][1] == RAMPS[name][0]
    for begin in (0, 1, 2, 7, 40):
        consumed = expected[begin][0]
        assert [found.step(number, consumed) for number in range(60 - begin)] == expected[begin:]


def test_random_ramps_are_megatrons() -> None:
    rng = random.Random(0)
    for _ in range(200):
        start, increment, increments = (rng.randint(1, 9) for _ in range(3))
        # Megatron divides in floating point: shares of whole samples leave nothing to rounding
        ramp = (start + increment * increments, start, increment, increments * rng.randint(1, 40))
        expected = by_megatron(*ramp, steps=80)
        numbers = rng.sample(range(80), 20)
        assert [sizes(*ramp).step(number) for number in numbers] == [expected[number] for number in numbers]


def test_without_a_ramp_all_steps_are_alike() -> None:
    assert [BatchSizes(8).step(number, consumed=3) for number in (0, 1, 10**6)] == [(3, 8), (11, 8), (8 * 10**6 + 3, 8)]
