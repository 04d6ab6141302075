"""In which order training samples are seen: a pure function of the seed."""

from __future__ import annotations

import numpy as np


class SampleOrder:
    """Global sample number -> index in a dataset of `num_samples`.

    Every epoch is a fresh permutation that depends on (seed, epoch) alone: not on the layout, the batch size or the
    length of the run.
    """

    def __init__(self, seed: int, num_samples: int):
        self.seed = seed
        self.num_samples = num_samples
        self._permutations: dict[int, np.ndarray] = {}

    def __call__(self, number: int) -> int:
        epoch, place = divmod(number, self.num_samples)
        if epoch not in self._permutations:
            # two epochs are kept: a batch can reach from one into the next
            newest = dict(list(self._permutations.items())[-1:])
            self._permutations = newest | {epoch: permutation(self.seed, epoch, self.num_samples)}
        return int(self._permutations[epoch][place])


class DatasetOrder:
    """The dataset's own order, over and over: what validation uses."""

    def __init__(self, num_samples: int):
        self.num_samples = num_samples

    def __call__(self, number: int) -> int:
        return number % self.num_samples


def permutation(seed: int, epoch: int, length: int) -> np.ndarray:
    """A permutation of range(length), int64, read-only.

    Made by sorting the generator's raw numbers: NumPy promises that these stay the same in all releases, which it does
    not of its own shuffles, and a run must be resumable under another release.
    """
    keys = np.random.Philox(np.random.SeedSequence([seed, epoch])).random_raw(length)
    order = np.argsort(keys, kind="stable")
    order.flags.writeable = False
    return order
