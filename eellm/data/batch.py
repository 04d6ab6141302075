"""One optimizer step's data on one data-parallel rank, the unit that Lightning calls a batch.

Shape legend: M microbatches, b sequences per microbatch, s tokens per sequence.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass
class Microbatch:
    """`tokens`, `labels`, `positions` int64 [b, s]; `loss_mask` float32 [b, s]; `documents` int32 [b, s] or None.

    `labels[t]` is the token after `tokens[t]`. `documents` numbers the documents of a sequence where attention
    must not cross them; None means plain causal attention.
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    loss_mask: torch.Tensor
    positions: torch.Tensor
    documents: torch.Tensor | None = None


@dataclass
class GlobalBatch:
    """As `Microbatch`, with a leading dimension M. `sample_ids` are the global sample numbers [M, b]."""

    tokens: torch.Tensor
    labels: torch.Tensor
    loss_mask: torch.Tensor
    positions: torch.Tensor
    documents: torch.Tensor | None = None
    sample_ids: torch.Tensor | None = None

    def __len__(self) -> int:
        return self.tokens.shape[0]

    @property
    def num_sequences(self) -> int:
        """Sequences that this data-parallel rank reads."""
        return self.tokens.shape[0] * self.tokens.shape[1]

    def __getitem__(self, index: int) -> Microbatch:
        documents = None if self.documents is None else self.documents[index]
        return Microbatch(self.tokens[index], self.labels[index], self.loss_mask[index], self.positions[index], documents)

    def to(self, device: torch.device) -> GlobalBatch:
        return GlobalBatch(*(None if value is None else value.to(device) for value in vars(self).values()))  # type: ignore[arg-type]
