"""Scores of the harness's log-likelihood requests, kept: every setting asks for the same ones."""

from __future__ import annotations

import array
import hashlib
import time
from collections.abc import Sequence

from eellm.harness.scores import WindowScorer, WindowScores
from eellm.harness.windows import windows

Pair = tuple[Sequence[int], Sequence[int]]
"""Token ids of a context, at least one, and of the text that is scored behind it."""


class KeptScores:
    """`longest`: tokens that the model reads at a time. `seconds` by task: what scoring its requests took, once."""

    def __init__(self, scorer: WindowScorer, longest: int):
        self.scorer, self.longest = scorer, longest
        self.seconds: dict[str, float] = {}
        self._kept: dict[tuple[str, bytes], list[WindowScores]] = {}

    def of(self, task: str, pairs: Sequence[Pair]) -> list[list[WindowScores]]:
        """Scores of the windows of every pair (`eellm.harness.windows`), those in order."""
        keys = [(task, _key(*pair)) for pair in pairs]
        missing = {key: pair for key, pair in zip(keys, pairs, strict=True) if key not in self._kept}
        if missing:
            started = time.perf_counter()
            cut = {key: list(windows(*pair, self.longest)) for key, pair in missing.items()}
            scores = iter(self.scorer.score([window for own in cut.values() for window in own]))
            self._kept |= {key: [next(scores) for _ in own] for key, own in cut.items()}
            self.seconds[task] = self.seconds.get(task, 0.0) + time.perf_counter() - started
        return [self._kept[key] for key in keys]


def _key(context: Sequence[int], text: Sequence[int]) -> bytes:
    """A hash of the ids: contexts are long, and there are many."""
    ids = array.array("q", (len(context), *context, *text))
    return hashlib.blake2b(ids.tobytes(), digest_size=16).digest()
