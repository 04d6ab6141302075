"""Rows of several sequences in one forward: all of a layer is row by row, only attention knows whose a row is.

Shape legend: r rows (tokens of all sequences, one after the other), b sequences, n query heads, g key/value groups, d channels
of a head, k keys. Hidden states are [r, 1, h].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from eellm.decoding.kv_cache import KVCache
from eellm.model.context import AttentionMask, Kernel, causal_mask
from eellm.model.spec import ModelSpec


@dataclass(frozen=True)
class Span:
    """`count` consecutive tokens of the sequence in a slot, the first one at position `start`."""

    slot: int
    start: int
    count: int

    @property
    def end(self) -> int:
        return self.start + self.count

    @property
    def positions(self) -> range:
        return range(self.start, self.end)


class RaggedKV:
    """`eellm.model.context.KVStore` of one forward: rows [r, 1, ..] are the tokens of `spans`, in order.

    Sequences with one row each attend together, padded to the longest; else each attends for itself.
    """

    def __init__(self, spec: ModelSpec, cache: KVCache, spans: Sequence[Span]):
        self.cache, self.spans = cache, list(spans)
        self.counts = [span.count for span in spans]
        self.together = len(self.spans) > 1 and set(self.counts) == {1}
        device = cache.shape.device
        if self.together:
            positions = torch.tensor([[span.start] for span in spans], device=device)
            keys = torch.arange(max(span.end for span in spans), device=device).unsqueeze(0)
            self.masks = [AttentionMask(causal_mask(spec, positions, keys), spec.sliding_window)]
        else:
            self.masks = [AttentionMask(_allowed(spec, span, device), spec.sliding_window) for span in spans]

    def attend(self, layer: str, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, kernel: Kernel) -> torch.Tensor:
        """[r, 1, n, d] with [r, 1, g, d] -> [r, 1, n * d]."""
        if self.together:
            keys, values = self.cache.append_each(layer, [span.slot for span in self.spans], key, value)
            return kernel(query.transpose(0, 1), keys, values, self.masks[0]).transpose(0, 1)
        rows = zip(self.spans, self.masks, *(x.split(self.counts) for x in (query, key, value)), strict=True)
        out = [kernel(own, *self.cache.append(layer, span.slot, *new), mask) for span, mask, own, *new in rows]
        return out[0] if len(out) == 1 else torch.cat(out)


def _allowed(spec: ModelSpec, span: Span, device: torch.device | str) -> torch.Tensor | None:
    """Which of the keys [0, end) each query of a span sees [1, 1, s, k]; None where the kernel needs no telling."""
    if spec.attention == "flash_attn":  # aligns the last query with the last key and knows windows
        return None
    if spec.sliding_window is None or span.end <= spec.sliding_window:
        if span.start == 0:  # plain causal attention
            return None
        if span.count == 1 and spec.attention == "sdpa":  # one query, after all keys
            return None
    positions = torch.arange(span.end, device=device).unsqueeze(0)
    return causal_mask(spec, positions[:, span.start :], positions)
