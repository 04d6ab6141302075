"""Several data sets as one, in given shares: which sample comes from which is a function of weights and sample number.

megatron-core's BlendedDataset fills arrays for a number of samples that must be known beforehand and asks
torch.distributed who writes them; here training has no end, and a run may be continued to any length.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from eellm.data.order import DatasetOrder, SampleOrder

LONGEST_PERIOD = 1_000_000
"""Weights that need more samples to come out even are rounded to shares of one in a million."""


class Blend:
    """Sample number -> (part, how many samples of the part came before).

    With the weights as whole numbers w of sum W, every W samples hold exactly w_i of part i, spread evenly: within such
    a period the m-th sample of a part is due at (m + 1/2) W / w_i, and samples stand in the order in which they are due.
    """

    def __init__(self, weights: Sequence[float]):
        self.weights = whole_weights(weights)

    @property
    def period(self) -> int:
        return int(self.weights.sum())

    def __call__(self, number: int) -> tuple[int, int]:
        cycle, place = divmod(number, self.period)
        part = int(self._parts[place])
        return part, cycle * int(self.weights[part]) + int(self._before[place])

    def until_exhausted(self, sizes: Sequence[int]) -> int:
        """How many samples there are before some part of so many samples would have to give one twice."""
        # sample number of the first one too many of each part
        return min(self._number(part, size) for part, size in enumerate(sizes))

    def _number(self, part: int, index: int) -> int:
        cycle, rest = divmod(index, int(self.weights[part]))
        return cycle * self.period + int(np.flatnonzero(self._parts == part)[rest])

    @functools.cached_property
    def _parts(self) -> np.ndarray:
        """Part of every sample of a period."""
        parts = np.repeat(np.arange(len(self.weights), dtype=np.int32), self.weights)
        index = np.concatenate([np.arange(weight) for weight in self.weights])
        # one division, which rounds alike on every machine
        due = (2 * index + 1) / self.weights[parts]
        return parts[np.lexsort((parts, due))]

    @functools.cached_property
    def _before(self) -> np.ndarray:
        """Samples of the same part before every sample of a period."""
        before = np.empty(self.period, dtype=np.int64)
        for part, weight in enumerate(self.weights):
            before[self._parts == part] = np.arange(weight)
        return before


class BlendedOrder:
    """Sample number -> index in the parts laid end to end; every part goes through its own epochs in its own order."""

    def __init__(self, blend: Blend, orders: Sequence[SampleOrder | DatasetOrder]):
        self.blend = blend
        self.orders = orders
        self.begins = np.concatenate([[0], np.cumsum([order.num_samples for order in orders])])

    def __call__(self, number: int) -> int:
        part, index = self.blend(number)
        return int(self.begins[part]) + self.orders[part](index)


def whole_weights(weights: Sequence[float]) -> np.ndarray:
    """The weights as the smallest whole numbers in the same proportion, int64; their sum is at most about a million."""
    exact = [Fraction(str(weight)) for weight in weights]
    shares = [weight / sum(exact) for weight in exact]
    denominator = math.lcm(*(share.denominator for share in shares))
    if denominator > LONGEST_PERIOD:
        return np.array([max(1, round(share * LONGEST_PERIOD)) for share in shares], dtype=np.int64)
    return np.array([int(share * denominator) for share in shares], dtype=np.int64)
