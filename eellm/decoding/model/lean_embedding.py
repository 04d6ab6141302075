"""The embedding as decoding runs it: rows of the tables, without megatron-core's way through autograd, over `Embedding`'s
parameters."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from eellm.model.stage import Embedding
from eellm.model.vocabulary import Vocabulary


class LeanEmbedding:
    def __init__(self, embedding: Embedding, vocabulary: Vocabulary):
        self._tokens, self._vocabulary = embedding.tokens.weight, vocabulary
        self._positions = None if embedding.positions is None else embedding.positions.weight

    def __call__(self, ids: Sequence[int], positions: Sequence[int]) -> torch.Tensor:
        """Token ids at their positions -> [r, 1, h]."""
        device, vocabulary = self._tokens.device, self._vocabulary
        tokens = torch.tensor(ids, device=device)
        if vocabulary.group.size() == 1:
            rows = self._tokens[tokens]
        else:
            index, here = vocabulary.local(tokens)
            rows = vocabulary.reduce(self._tokens[index] * here.unsqueeze(1))
        if self._positions is not None:
            rows = rows + self._positions[torch.tensor(positions, device=device)]
        return rows.unsqueeze(1)
