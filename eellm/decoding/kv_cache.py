"""Keys and values of the tokens a model has seen, layer by layer and sequence by sequence.

Shape legend: t tokens at most, s tokens of one sequence, b sequences, g key/value groups of this rank, d channels of a head.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class KVShape:
    """What one layer keeps: keys and values [sequences, max_tokens, groups, head_dim]."""

    max_tokens: int
    groups: int
    head_dim: int
    dtype: torch.dtype = torch.float32
    device: torch.device | str = "cpu"
    sequences: int = 1

    @property
    def layer_bytes(self) -> int:
        """Bytes that one layer takes, filled or not."""
        return 2 * self.dtype.itemsize * math.prod(self.size)

    @property
    def size(self) -> tuple[int, int, int, int]:
        return self.sequences, self.max_tokens, self.groups, self.head_dim


class KVCache:
    """Memory taken once, for named layers (`1`, `2`, .., `exit_04`); a sequence has a slot of its own.

    Layers fill at their own pace, because tokens that left early have not reached the deeper ones yet.
    """

    def __init__(self, layers: Sequence[str], shape: KVShape):
        self.shape = shape
        # zeros: what stands behind a sequence's end is masked where sequences attend together, but must be finite
        self._stored = {layer: torch.zeros(2, *shape.size, dtype=shape.dtype, device=shape.device).unbind() for layer in layers}
        self._filled = {layer: [0] * shape.sequences for layer in layers}

    def append(self, layer: str, slot: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Store a sequence's next tokens [s, 1, g, d]; return its keys and values [filled, 1, g, d].

        Raises ValueError when the slot is full.
        """
        start, end = self._extend(layer, slot, key.shape[0])
        for stored, new in zip(self._stored[layer], (key, value), strict=True):
            stored[slot, start:end] = new[:, 0]
        return self.read(layer, slot)

    def append_each(
        self, layer: str, slots: Sequence[int], key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store one token of each of several sequences [b, 1, g, d]; return theirs [longest, b, g, d].

        What stands behind the end of a shorter one has no meaning."""
        starts = [self._extend(layer, slot, 1)[0] for slot in slots]
        where = torch.tensor([slots, starts], device=self.shape.device)
        found = []
        for stored, new in zip(self._stored[layer], (key, value), strict=True):
            stored[where[0], where[1]] = new[:, 0]
            found.append(stored[:, : max(starts) + 1].index_select(0, where[0]).transpose(0, 1))
        return found[0], found[1]

    def filled(self, layer: str, slot: int = 0) -> int:
        """Tokens of a sequence whose keys and values the layer has."""
        return self._filled[layer][slot]

    def read(self, layer: str, slot: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [filled, 1, g, d] of a layer and sequence."""
        keys, values = (stored[slot, : self._filled[layer][slot]].unsqueeze(1) for stored in self._stored[layer])
        return keys, values

    def truncate(self, tokens: int, slot: int = 0) -> None:
        """Forget everything after a sequence's first `tokens`, in all layers; 0 makes the slot ready for another one."""
        for filled in self._filled.values():
            filled[slot] = min(filled[slot], tokens)

    @property
    def layers(self) -> list[str]:
        return list(self._stored)

    @property
    def memory_bytes(self) -> int:
        """Bytes taken, filled or not."""
        return len(self._stored) * self.shape.layer_bytes

    def _extend(self, layer: str, slot: int, count: int) -> tuple[int, int]:
        """(first, behind the last) of a sequence's next `count` places."""
        start = self._filled[layer][slot]
        if start + count > self.shape.max_tokens:
            asked = f"{start} are filled, {count} more do not fit"
            raise ValueError(f"KV cache of layer {layer} holds {self.shape.max_tokens} tokens: {asked}")
        self._filled[layer][slot] = start + count
        return start, start + count
