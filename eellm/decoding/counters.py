"""What decoding cost, counted where it happens: the measure against which speed is judged."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass
class Counters:
    """Sums over forwards; a *forward* is one run of one segment over k rows (tokens of any sequences).

    `layer_rows` counts a layer once per row, `layer_forwards` once per forward; `heads` counts the rows a head has read;
    `weight_bytes` counts a layer's or head's weights once per forward, however many rows share them. Rows looked up in
    the embedding are not counted. Of speculative decoding: tokens `drafted` and `accepted`, and `verifications`, the
    passes of a sequence that checked at least one draft.
    """

    tokens: int = 0
    layer_rows: int = 0
    layer_forwards: int = 0
    weight_bytes: int = 0
    rows: Counter[int] = field(default_factory=Counter)
    heads: Counter[str] = field(default_factory=Counter)
    drafted: int = 0
    accepted: int = 0
    verifications: int = 0

    def add_forward(self, layers: int, rows: int, weight_bytes: int) -> None:
        self.layer_rows += layers * rows
        self.layer_forwards += layers
        self.weight_bytes += weight_bytes
        self.rows[rows] += 1

    def add_head(self, name: str, rows: int, weight_bytes: int) -> None:
        self.heads[name] += rows
        self.weight_bytes += weight_bytes

    def add_verification(self, drafted: int, accepted: int) -> None:
        self.drafted += drafted
        self.accepted += accepted
        self.verifications += 1

    @property
    def layers_per_token(self) -> float:
        """Layers that rows passed per emitted token, those that only caught up included."""
        return self.layer_rows / max(self.tokens, 1)

    @property
    def bytes_per_token(self) -> float:
        return self.weight_bytes / max(self.tokens, 1)

    @property
    def acceptance_rate(self) -> float | None:
        """Share of drafted tokens that the full model accepted; None where nothing was drafted."""
        return self.accepted / self.drafted if self.drafted else None

    @property
    def mean_accepted_length(self) -> float | None:
        """Drafted tokens accepted per verification; None where nothing was verified."""
        return self.accepted / self.verifications if self.verifications else None
