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
    """What one layer keeps: keys and values [sequences, groups, max_tokens + spare, head_dim].

    `spare` places behind a slot's last take what rows without a token write (`eellm.decoding.model.cuda_graphs`)."""

    max_tokens: int
    groups: int
    head_dim: int
    dtype: torch.dtype = torch.float32
    device: torch.device | str = "cpu"
    sequences: int = 1
    spare: int = 0

    @property
    def layer_bytes(self) -> int:
        """Bytes that one layer takes, filled or not."""
        return 2 * self.dtype.itemsize * math.prod(self.size)

    @property
    def size(self) -> tuple[int, int, int, int]:
        return self.sequences, self.groups, self.max_tokens + self.spare, self.head_dim


class NextPlaces:
    """Where the next tokens of several sequences go, `counts` of each; made once for all layers that are equally full.

    `row_slots`, `row_places` [r]: slot and place of each token. `block`: the slots as a slice, where they follow each other,
    so that reading them copies nothing.
    """

    def __init__(self, slots: Sequence[int], starts: Sequence[int], counts: Sequence[int], device: torch.device | str):
        self.slots, self.starts, self.counts = slots, starts, counts
        self.longest = max(start + count for start, count in zip(starts, counts, strict=True))
        rows = [
            (slot, start + number) for slot, start, count in zip(slots, starts, counts, strict=True) for number in range(count)
        ]
        self.row_slots, self.row_places = torch.tensor(rows, device=device).unbind(1)
        self.slot_index = self.row_slots if len(rows) == len(slots) else torch.tensor(slots, device=device)
        first = slots[0]
        self.block = slice(first, first + len(slots)) if list(slots) == list(range(first, first + len(slots))) else None


class KVCache:
    """Memory taken once, for named layers (`1`, `2`, .., `exit_04`); a sequence has a slot of its own.

    Layers fill at their own pace, because tokens that left early have not reached the deeper ones yet. New keys and values
    come in pairs, as a QKV projection in megatron-core's layout has them. A group's keys stand behind each other.
    """

    def __init__(self, layers: Sequence[str], shape: KVShape):
        self.shape = shape
        # zeros: what stands behind a sequence's end is masked where sequences attend together, but must be finite
        self._stored = {layer: torch.zeros(2, *shape.size, dtype=shape.dtype, device=shape.device) for layer in layers}
        self._slots = {layer: stored.unbind(1) for layer, stored in self._stored.items()}
        self._filled = {layer: [0] * shape.sequences for layer in layers}

    def append(self, layer: str, slot: int, pairs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Store a sequence's next keys and values [s, g, 2, d]; return all it has, [g, filled, d] each.

        Raises ValueError when the slot is full.
        """
        count, own = pairs.shape[0], self._slots[layer][slot]
        start = self._extend(layer, slot, count)
        own.narrow(2, start, count).copy_(pairs.permute(2, 1, 0, 3))
        keys, values = own.narrow(2, 0, start + count).unbind()
        return keys, values

    def append_each(self, layer: str, places: NextPlaces, pairs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Store the keys and values of several sequences' next tokens [r, g, 2, d]; return theirs, [b, g, longest, d] each.

        What stands behind the end of a shorter one has no meaning."""
        self.extend_each(layer, places.slots, places.starts, places.counts)
        stored = self._stored[layer]
        stored[:, places.row_slots, :, places.row_places] = pairs.transpose(1, 2)
        found = stored[:, :, :, : places.longest]
        found = found.index_select(1, places.slot_index) if places.block is None else found[:, places.block]
        keys, values = found.unbind()
        return keys, values

    def extend_each(self, layer: str, slots: Sequence[int], starts: Sequence[int], counts: Sequence[int]) -> None:
        """Count so many more tokens in each of several slots, whose next places are `starts`."""
        found = [self._extend(layer, slot, count) for slot, count in zip(slots, counts, strict=True)]
        assert found == list(starts), "layers that take the same rows are equally full"

    def put_rows(self, layer: str, places: torch.Tensor, pairs: torch.Tensor, keys: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Store keys and values [b, g, 2, d] of the first b slots at `places` [b]; return the first `keys` of each slot,
        [b, g, keys, d] each. Nothing is counted and nothing on the host is read: kernels only."""
        slots, stored = torch.arange(len(places), device=places.device), self._stored[layer]
        stored[:, slots, :, places] = pairs.transpose(1, 2)
        found, values = stored[:, : len(places), :, :keys].unbind()
        return found, values

    def filled(self, layer: str, slot: int = 0) -> int:
        """Tokens of a sequence whose keys and values the layer has."""
        return self._filled[layer][slot]

    def read(self, layer: str, slot: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [g, filled, d] of a layer and sequence."""
        keys, values = self._slots[layer][slot].narrow(2, 0, self._filled[layer][slot]).unbind()
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

    def _extend(self, layer: str, slot: int, count: int) -> int:
        """The first of a sequence's next `count` places."""
        start = self._filled[layer][slot]
        if start + count > self.shape.max_tokens:
            asked = f"{start} are filled, {count} more do not fit"
            raise ValueError(f"KV cache of layer {layer} holds {self.shape.max_tokens} tokens: {asked}")
        self._filled[layer][slot] = start + count
        return start
