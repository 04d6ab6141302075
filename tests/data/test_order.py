from __future__ import annotations

import numpy as np

from eellm.data.order import DatasetOrder, SampleOrder


def test_every_epoch_is_a_permutation_of_its_own():
    order = SampleOrder(seed=3, num_samples=50)
    epochs = [[order(epoch * 50 + place) for place in range(50)] for epoch in range(4)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 4


def test_order_depends_on_seed_and_number_alone():
    numbers = np.random.default_rng(0).integers(0, 500, 300).tolist()
    order = SampleOrder(seed=3, num_samples=50)
    forward = {number: order(number) for number in sorted(numbers)}
    other = SampleOrder(seed=3, num_samples=50)
    assert {number: other(number) for number in numbers} == forward
    assert [SampleOrder(4, 50)(number) for number in range(50)] != [order(number) for number in range(50)]


def test_order_is_the_recorded_one():
    """Runs must be resumable under other releases of the libraries, so these numbers may never change."""
    assert [SampleOrder(1234, 10)(number) for number in range(20)] == RECORDED


def test_dataset_order_repeats():
    assert [DatasetOrder(3)(number) for number in range(7)] == [0, 1, 2, 0, 1, 2, 0]


RECORDED = [8, 1, 6, 2, 0, 3, 5, 7, 4, 9, 8, 3, 6, 7, 0, 5, 4, 9, 1, 2]
