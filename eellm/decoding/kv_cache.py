"""Keys and values of the tokens a model has seen, layer by layer.

Shape legend: t tokens at most, b sequences, g key/value groups of this rank, d channels of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class KVShape:
    """What one layer keeps: keys and values [max_tokens, sequences, groups, head_dim]."""

    max_tokens: int
    groups: int
    head_dim: int
    dtype: torch.dtype = torch.float32
    device: torch.device | str = "cpu"
    sequences: int = 1


class KVCache:
    """`eellm.model.context.KVStore` in memory taken once, for named layers (`1`, `2`, .., `exit_04`).

    Layers fill at their own pace, because tokens that left early have not reached the deeper ones yet.
    """

    def __init__(self, layers: Sequence[str], shape: KVShape):
        size = (2, shape.max_tokens, shape.sequences, shape.groups, shape.head_dim)
        self.shape = shape
        self._stored = {layer: torch.empty(size, dtype=shape.dtype, device=shape.device).unbind() for layer in layers}
        self._filled = dict.fromkeys(layers, 0)

    def append(self, layer: str, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Store the next tokens' [s, b, g, d]; return keys and values [filled, b, g, d]. Raises ValueError when full."""
        start = self._filled[layer]
        end = start + key.shape[0]
        if end > self.shape.max_tokens:
            asked = f"{start} are filled, {key.shape[0]} more do not fit"
            raise ValueError(f"KV cache of layer {layer} holds {self.shape.max_tokens} tokens: {asked}")
        keys, values = self._stored[layer]
        keys[start:end] = key
        values[start:end] = value
        self._filled[layer] = end
        return keys[:end], values[:end]

    def filled(self, layer: str) -> int:
        """Tokens whose keys and values the layer has."""
        return self._filled[layer]

    def read(self, layer: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [filled, b, g, d] of a layer."""
        keys, values = self._stored[layer]
        return keys[: self._filled[layer]], values[: self._filled[layer]]

    def truncate(self, tokens: int) -> None:
        """Forget everything after the first `tokens`, in all layers; 0 makes the cache ready for another sequence."""
        self._filled = {layer: min(filled, tokens) for layer, filled in self._filled.items()}

    @property
    def layers(self) -> list[str]:
        return list(self._stored)

    @property
    def memory_bytes(self) -> int:
        """Bytes taken, filled or not."""
        return sum(part.numel() * part.element_size() for pair in self._stored.values() for part in pair)
