"""The size of every step against its definition, driven step by step as a training loop would, and that against Megatron's."""

from __future__ import annotations

import random
from fractions import Fraction

import pytest
from megatron.core import num_microbatches_calculator

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


def by_definition(final: int, start: int, increment: int, samples: int, steps: int) -> list[tuple[int, int]]:
    """(first sample, size) of each step: one increment more from the end of each equal share of the samples on."""
    increments = (final - start) // increment
    shares = [Fraction(samples * number, increments) for number in range(1, increments + 1)]
    consumed, found = 0, []
    for _ in range(steps):
        found.append((consumed, start + increment * sum(consumed >= share for share in shares)))
        consumed += found[-1][1]
    return found


def sizes(final: int, start: int, increment: int, samples: int) -> BatchSizes:
    return BatchSizes(final, RampUpConfig(start=start, increment=increment, samples=samples))


@pytest.mark.parametrize("name", RAMPS)
def test_the_definition_is_megatrons(name: str) -> None:
    if not hasattr(num_microbatches_calculator, "RampupBatchsizeNumMicroBatchesCalculator"):
        pytest.skip("later releases of megatron-core have no ramp")
    final, *ramp = RAMPS[name]
    calculator = num_microbatches_calculator.RampupBatchsizeNumMicroBatchesCalculator(final, 1, 1, False, 1, *ramp)
    for consumed, size in by_definition(final, *ramp, steps=60):
        calculator.update(consumed, consistency_check=True)
        assert calculator.get_current_global_batch_size() == size


@pytest.mark.parametrize("name", RAMPS)
def test_steps_are_found_from_wherever_one_begins(name: str) -> None:
    expected = by_definition(*RAMPS[name], steps=60)
    found = sizes(*RAMPS[name])
    assert expected[-1][1] == RAMPS[name][0]
    for begin in (0, 1, 2, 7, 40):
        consumed = expected[begin][0]
        assert [found.step(number, consumed) for number in range(60 - begin)] == expected[begin:]


def test_any_step_of_random_ramps() -> None:
    rng = random.Random(0)
    for _ in range(200):
        start, increment, increments = (rng.randint(1, 9) for _ in range(3))
        ramp = (start + increment * increments, start, increment, rng.randint(1, 300))
        expected = by_definition(*ramp, steps=80)
        numbers = rng.sample(range(80), 20)
        assert [sizes(*ramp).step(number) for number in numbers] == [expected[number] for number in numbers]


def test_without_a_ramp_all_steps_are_alike() -> None:
    assert [BatchSizes(8).step(number, consumed=3) for number in (0, 1, 10**6)] == [(3, 8), (11, 8), (8 * 10**6 + 3, 8)]
