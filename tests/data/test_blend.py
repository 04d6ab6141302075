from __future__ import annotations

import numpy as np
import pytest

from eellm.data.blend import LONGEST_PERIOD, Blend, BlendedOrder, whole_weights
from eellm.data.order import DatasetOrder, SampleOrder

WEIGHTS = [[0.7, 0.3], [1.0, 1.0, 1.0], [0.05, 0.25, 0.7], [5, 1], [0.123, 0.456, 0.421], [2.0]]


def counted(blend: Blend, samples: int) -> list[list[int]]:
    """Samples of every part before each sample, counted one by one; also holds each part's numbering to it."""
    counts, rows = [0] * len(blend.weights), []
    for number in range(samples):
        rows.append(list(counts))
        part, index = blend(number)
        assert index == counts[part]
        counts[part] += 1
    return [*rows, counts]


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_shares_are_exact_in_every_period_and_even_within(weights):
    blend = Blend(weights)
    shares = np.asarray(weights) / sum(weights)
    rows = np.asarray(counted(blend, 2 * blend.period))
    for end in (blend.period, 2 * blend.period):
        np.testing.assert_allclose(rows[end], end * shares, rtol=1e-12)
    # never a whole sample further from its share than parts that are due at once can put it
    distance = np.abs(rows - np.arange(len(rows))[:, None] * shares)
    assert distance.max() <= (1 + len(weights)) / 2


@pytest.mark.parametrize("weights", [[0.7, 0.3], [0.05, 0.25, 0.7]], ids=str)
def test_prefixes_hold_what_megatrons_blend_holds(weights):
    """megatron-core's own index builder serves at each sample the part that is furthest behind."""
    helpers = pytest.importorskip("megatron.core.datasets.helpers")
    size = 1000
    parts, indices = np.zeros(size, dtype=np.int16), np.zeros(size, dtype=np.int64)
    helpers.build_blending_indices(parts, indices, list(weights), len(weights), size, False)
    theirs = np.cumsum(parts[:, None] == np.arange(len(weights)), axis=0)
    ours = np.asarray(counted(Blend(weights), size))[1:]
    assert np.abs(ours - theirs).max() <= 1


def test_whole_weights_are_the_smallest_in_proportion():
    assert whole_weights([0.7, 0.3]).tolist() == [7, 3]
    assert whole_weights([2.0, 4.0]).tolist() == [1, 2]
    assert whole_weights([0.1, 0.2, 0.3]).tolist() == [1, 2, 3]
    rounded = whole_weights([0.314159265358979, 1.0])
    assert rounded.sum() == pytest.approx(LONGEST_PERIOD, abs=2)
    assert rounded[0] / rounded[1] == pytest.approx(0.314159265358979, abs=2e-6)


def test_a_part_goes_through_its_own_epochs():
    """Each part's samples, in turn, are those of its order: all of them once before one comes again."""
    sizes, blend = [5, 11, 3], Blend([0.5, 0.3, 0.2])
    order = BlendedOrder(blend, [SampleOrder(7, size) for size in sizes])
    begins = [0, 5, 16]
    seen: list[list[int]] = [[], [], []]
    for number in range(200):
        part = blend(number)[0]
        seen[part].append(order(number) - begins[part])
    for part, size in enumerate(sizes):
        own = SampleOrder(7, size)
        assert seen[part] == [own(number) for number in range(len(seen[part]))]
        for begin in range(0, len(seen[part]), size):
            epoch = seen[part][begin : begin + size]
            assert len(set(epoch)) == len(epoch)


def test_any_sample_can_be_asked_for_first():
    orders = [BlendedOrder(Blend([0.7, 0.3]), [SampleOrder(3, 10), SampleOrder(3, 4)]) for _ in range(2)]
    forward = [orders[0](number) for number in range(300)]
    assert [orders[1](number) for number in reversed(range(300))] == forward[::-1]


@pytest.mark.parametrize(("weights", "sizes"), [([0.7, 0.3], [10, 10]), ([1, 1, 2], [3, 7, 5]), ([5, 1], [4, 100])])
def test_exhaustion_is_where_a_sample_would_come_twice(weights, sizes):
    order = BlendedOrder(Blend(weights), [DatasetOrder(size) for size in sizes])
    count = Blend(weights).until_exhausted(sizes)
    first = [order(number) for number in range(count)]
    assert len(set(first)) == count
    assert order(count) in first
