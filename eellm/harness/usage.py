"""What answering a task's requests took."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass
class Usage:
    """Of one task under one setting. `layers` and `tokens` are sums over scored or generated tokens.

    `layers` counts those behind which each token's head stands. `seconds`: of the passes that scored, which serve all
    settings, or of generation, prompts included. `cut`: requests longer than the model was trained for, cut on their left.
    """

    tokens: int = 0
    layers: int = 0
    seconds: float = 0.0
    cut: int = 0

    @property
    def mean_layers(self) -> float | None:
        return self.layers / self.tokens if self.tokens else None

    @property
    def tokens_per_second(self) -> float | None:
        return self.tokens / self.seconds if self.tokens and self.seconds else None


def together(usages: Iterable[Usage]) -> Usage:
    """Of a group of tasks."""
    total = Usage()
    for usage in usages:
        total.tokens, total.layers = total.tokens + usage.tokens, total.layers + usage.layers
        total.seconds, total.cut = total.seconds + usage.seconds, total.cut + usage.cut
    return total
