"""Rows of several sequences in one forward: all of a layer is row by row, only attention knows whose a row is.

Shape legend: r rows (tokens of all sequences, one after the other), b sequences, g key/value groups, p query heads per group,
d channels of a head, k keys. Projections are [r, g, p + 2, d]: of each group its queries, its key, its value.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from eellm.decoding.model.grouped_attention import additive, first_rows, later_rows, newest_rows, padded_rows
from eellm.decoding.model.kv_cache import KVCache, NextPlaces
from eellm.model.context import causal_mask
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


MOST_PADDING = 4
"""Rows of a padded block per row of a token, up to which sequences attend together."""


class RaggedKV:
    """Attention to a KV cache in one forward: rows are the tokens of `spans`, in order.

    Sequences with few rows each attend together, padded to the longest; prompts, and very unequal ones, each for itself.
    """

    def __init__(self, spec: ModelSpec, cache: KVCache, spans: Sequence[Span]):
        self.cache, self.spans = cache, list(spans)
        self.counts = [span.count for span in spans]
        self.window = spec.sliding_window
        self.places: NextPlaces | None = None
        self.padded: torch.Tensor | None = None
        if self._together():
            slots, starts = [span.slot for span in spans], [span.start for span in spans]
            self.places = NextPlaces(slots, starts, self.counts, cache.shape.device)
            self.masks: list[torch.Tensor | None] = [self._mask_of_all(spec, self.places)]
        else:
            self.masks = [_mask(spec, cache, span) for span in spans]

    def attend(self, layer: str, mixed: torch.Tensor) -> torch.Tensor:
        """Store the keys and values of projections [r, g, p + 2, d], attend from their queries: [r, 1, g * p * d]."""
        query, pairs = mixed[:, :, :-2], mixed[:, :, -2:]
        if self.places is not None:
            keys, values = self.cache.append_each(layer, self.places, pairs)
            if self.padded is None:
                return newest_rows(query, keys, values, self.masks[0])
            assert self.masks[0] is not None
            return padded_rows(query, keys, values, self.masks[0], self.padded)
        if len(self.spans) == 1:
            return self._attend_one(layer, query, pairs, 0)
        rows = zip(query.split(self.counts), pairs.split(self.counts), strict=True)
        return torch.cat([self._attend_one(layer, *own, number) for number, own in enumerate(rows)])

    def _together(self) -> bool:
        if len(self.spans) == 1 or max(self.counts) == 1:
            return len(self.spans) > 1
        padded = len(self.spans) * max(self.counts)
        return all(span.start > 0 for span in self.spans) and padded <= MOST_PADDING * sum(self.counts)

    def _mask_of_all(self, spec: ModelSpec, places: NextPlaces) -> torch.Tensor:
        """What is added to the scores of all rows; sets `padded` where sequences have more than one."""
        shape, most = self.cache.shape, max(self.counts)
        positions = places.row_places.unsqueeze(1)
        if most > 1:
            ends = torch.tensor([[span.end - 1] for span in self.spans], device=shape.device)
            numbers = [sequence * most + row for sequence, count in enumerate(self.counts) for row in range(count)]
            self.padded = torch.tensor(numbers, device=shape.device)
            positions = ends.repeat(1, most)  # rows without a token see what is there, and are dropped
            positions.view(-1)[self.padded] = places.row_places
        allowed = causal_mask(spec, positions, torch.arange(places.longest, device=shape.device).unsqueeze(0))
        if most > 1:  # each token's query heads are rows of their own
            allowed = allowed.repeat_interleave(spec.num_heads // spec.num_query_groups, 2)
        return additive(allowed.repeat_interleave(shape.groups, 0), shape.dtype)

    def _attend_one(self, layer: str, query: torch.Tensor, pairs: torch.Tensor, number: int) -> torch.Tensor:
        """The rows of one span."""
        span, mask = self.spans[number], self.masks[number]
        keys, values = self.cache.append(layer, span.slot, pairs)
        if span.count == 1:
            if self.window is not None:
                keys, values = keys[:, -self.window :], values[:, -self.window :]
            return newest_rows(query, keys.unsqueeze(0), values.unsqueeze(0), None)
        if span.start == 0:
            return first_rows(query, keys, values, mask)
        assert mask is not None
        return later_rows(query, keys, values, mask)


def _mask(spec: ModelSpec, cache: KVCache, span: Span) -> torch.Tensor | None:
    """What is added to the scores of a span's rows; None where no more than their order needs to be known."""
    in_sight = spec.sliding_window is None or span.end <= spec.sliding_window
    if span.count == 1 or (span.start == 0 and in_sight):
        return None
    positions = torch.arange(span.end, device=cache.shape.device).unsqueeze(0)
    allowed = causal_mask(spec, positions[:, span.start :], positions)
    if span.start > 0:  # each token's query heads are rows of their own
        allowed = allowed.repeat_interleave(spec.num_heads // spec.num_query_groups, 2)
    return additive(allowed, cache.shape.dtype)
