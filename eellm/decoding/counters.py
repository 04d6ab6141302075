"""What decoding cost, counted where it happens: the measure against which speed is judged."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass
class Counters:
    """Sums over forwards; a *forward* is one run of one segment over k rows (tokens).

    `layer_rows` counts a layer once per row, `layer_forwards` once per forward; `weight_bytes` counts a layer's or
    head's weights once per forward, however many rows share them. Rows looked up in the embedding are not counted.
    """

    tokens: int = 0
    layer_rows: int = 0
    layer_forwards: int = 0
    weight_bytes: int = 0
    rows: Counter[int] = field(default_factory=Counter)
    heads: Counter[str] = field(default_factory=Counter)

    def add_forward(self, layers: int, rows: int, weight_bytes: int) -> None:
        self.layer_rows += layers * rows
        self.layer_forwards += layers
        self.weight_bytes += weight_bytes
        self.rows[rows] += 1

    def add_head(self, name: str, weight_bytes: int) -> None:
        self.heads[name] += 1
        self.weight_bytes += weight_bytes

    @property
    def layers_per_token(self) -> float:
        """Layers that rows passed per emitted token, those that only caught up included."""
        return self.layer_rows / max(self.tokens, 1)

    @property
    def bytes_per_token(self) -> float:
        return self.weight_bytes / max(self.tokens, 1)
