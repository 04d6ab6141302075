"""The claims about memory on tiny shapes, and that what is compared computes the same."""

from __future__ import annotations

import numpy as np
import pytest

from eellm.benchmark.step_memory import RankMemory, StepMemory
from tests import workers
from tests.benchmark.models import gradients_of_the_exits, growth, losses_and_gradients, memory_of_a_step, programs

LABELS = 16 * 2 * (8 + 4)
"""Bytes of a microbatch's labels and mask, which an exit keeps with its hidden states."""
LAYOUTS = {
    "single": (1, []),
    "pp2": (2, ["parallel=pp2"]),
    "pp2_boundary_start": (2, ["parallel=pp2", "exits.boundary=start"]),
    "pp2_exits_on_one_stage": (2, ["parallel=pp2", "exits.layers=[3]", "loss_weights.values=1.0"]),
    "pp2_vp2": (2, ["parallel=pp2_vp2"]),
    "tp2": (2, ["parallel=tp2"]),
}


@pytest.mark.dist
@pytest.mark.parametrize("name", LAYOUTS)
def test_exits_add_no_more_than_the_logits_of_one_microbatch(name: str) -> None:
    world, overrides = LAYOUTS[name]
    memories = workers.run(world, memory_of_a_step, *overrides)
    assert len(set(memories)) == 1, "every rank reports the same"
    assert len(memories[0].ranks) == world
    assert memories[0].nearest.added <= memories[0].nearest.allowance


@pytest.mark.dist
def test_exits_that_are_not_deferred_exceed_it() -> None:
    """Chunks of 4 tokens leave little room, and eager exits keep gradients of their weights."""
    overrides = ["parallel=pp2", "exits.deferred=false", "trainer.loss_chunk=4"]
    memory = workers.run(2, memory_of_a_step, *overrides)[0]
    assert memory.nearest.added > memory.nearest.allowance
    deferred = workers.run(2, memory_of_a_step, "parallel=pp2", "trainer.loss_chunk=4")[0]
    assert deferred.with_exits < memory.with_exits
    assert deferred.without_exits == memory.without_exits


@pytest.mark.dist
def test_logits_do_not_add_up_over_microbatches_in_flight() -> None:
    for in_flight in (2, 5):
        (grown,) = workers.run(1, growth, in_flight)
        assert grown["deferred"] <= grown["hidden"] + LABELS
        assert grown["deferred"] < grown["logits"] / 10
        # three exits keep the gradients of their hidden states and of the output matrix, in fp32
        assert grown["eager"] >= 3 * (grown["hidden"] + 1000 * 16 * 4)


@pytest.mark.dist
@pytest.mark.parametrize(
    "overrides", [[], ["exits.head=[embedding,mlp,block]", "exits.tie_output=false", "exits.temperature=1.5"]]
)
def test_the_plain_loss_is_ours_in_value_and_gradient(overrides: list[str]) -> None:
    (results,) = workers.run(1, losses_and_gradients, *overrides)
    (value, hidden, parameters), (plain_value, plain_hidden, plain_parameters) = results["ours"], results["plain"]
    assert value == pytest.approx(plain_value, rel=1e-5)
    assert len(hidden) == 4
    for ours, plain in zip([*hidden, *parameters], [*plain_hidden, *plain_parameters], strict=True):
        np.testing.assert_allclose(ours, plain, rtol=1e-4, atol=1e-5 * max(1.0, np.abs(plain).max()))


@pytest.mark.dist
def test_the_exits_alone_do_the_exits_work() -> None:
    ((actual, expected),) = workers.run(1, gradients_of_the_exits)
    assert any(np.abs(gradient).max() > 0 for gradient in expected)
    for ours, plain in zip(actual, expected, strict=True):
        np.testing.assert_allclose(ours, plain, rtol=1e-4, atol=1e-5 * max(1.0, np.abs(plain).max()))


@pytest.mark.dist
def test_it_runs_the_schedule_of_the_config() -> None:
    """GPipe keeps the activations of all four microbatches where 1F1B keeps those of two, with exits and without."""
    one_f_one_b, gpipe = (
        workers.run(2, memory_of_a_step, "parallel=pp2", f"schedule={name}")[0] for name in ("one_f_one_b", "gpipe")
    )
    assert gpipe.without_exits > one_f_one_b.without_exits
    assert gpipe.with_exits > one_f_one_b.with_exits
    assert one_f_one_b.nearest.allowance < gpipe.nearest.allowance
    assert gpipe.nearest.added <= gpipe.nearest.allowance


def test_the_largest_rank_decides_and_each_has_an_allowance_of_its_own() -> None:
    first, last = RankMemory(with_exits=110, without_exits=100, allowance=40), RankMemory(80, 50, 40)
    memory = StepMemory((first, last))
    assert (memory.with_exits, memory.without_exits, memory.added) == (110, 100, 10)
    assert memory.nearest == last
    assert StepMemory((first, RankMemory(130, 50, 40))).added == 30, "the largest rank is another one with exits"


@pytest.mark.dist
def test_bubbles_that_nothing_can_fill_without_exits() -> None:
    overrides = ["parallel=pp4", "schedule=bubble_filling", "data.global_batch_size=16"]
    assert workers.run(4, programs, *overrides)[0] == ("bubble_filling", "one_f_one_b")
