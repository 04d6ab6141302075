"""What answering a task's requests took."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass
class Work:
    """Tokens, and the seconds that they took."""

    tokens: int = 0
    seconds: float = 0.0

    @property
    def tokens_per_second(self) -> float | None:
        return self.tokens / self.seconds if self.tokens and self.seconds else None


@dataclass
class Usage:
    """Of one task under one setting.

    `scored`: tokens of the texts whose log-likelihood was asked for, and the passes over them and their contexts, which serve
    all settings. `generated`: new tokens, and the time from a batch of prompts to its last token. `layers`: a sum over both
    kinds of tokens of the layers behind which the head stands that spoke. `cut`: requests longer than the model was
    trained for, that lost their beginning.
    """

    scored: Work = field(default_factory=Work)
    generated: Work = field(default_factory=Work)
    layers: int = 0
    cut: int = 0

    @property
    def tokens(self) -> int:
        return self.scored.tokens + self.generated.tokens

    @property
    def mean_layers(self) -> float | None:
        return self.layers / self.tokens if self.tokens else None


def together(usages: Iterable[Usage]) -> Usage:
    """Of a group of tasks."""
    total = Usage()
    for usage in usages:
        for kind in ("scored", "generated"):
            sums, own = getattr(total, kind), getattr(usage, kind)
            sums.tokens, sums.seconds = sums.tokens + own.tokens, sums.seconds + own.seconds
        total.layers, total.cut = total.layers + usage.layers, total.cut + usage.cut
    return total
