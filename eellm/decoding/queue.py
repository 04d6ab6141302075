"""Segment queues: how tokens that left early catch up.

A token that exits after segment i leaves its hidden state pending at that boundary. When a later token enters segment
i + 1, the pending states in front of it go through in the same forward and fill the KV cache. So every token passes
every layer at most once, in order, and the KV cache is that of full decoding.
Shape legend: s tokens, b sequences, h channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from eellm.decoding.counters import Counters
from eellm.decoding.kv_cache import KVCache
from eellm.decoding.reading import Reading, read
from eellm.decoding.segments import InferenceModel
from eellm.model.context import Context
from eellm.model.stage import Readout


class _Boundary:
    """Hidden states waiting at one place, oldest first, and how many have gone on from there."""

    def __init__(self) -> None:
        self._states: list[torch.Tensor] = []
        self.waiting = 0
        self.taken = 0

    def put(self, states: torch.Tensor) -> None:
        """[s, b, h]"""
        self._states.append(states)
        self.waiting += states.shape[0]

    def take(self) -> tuple[int, torch.Tensor]:
        """(position of the first, all that wait [s, b, h])."""
        start, states = self.taken, self._states
        self._states = []
        self.taken, self.waiting = start + self.waiting, 0
        return start, states[0] if len(states) == 1 else torch.cat(states)


@dataclass(frozen=True)
class Arrival:
    """A sequence's newest token behind a segment: its hidden state [1, b, h], and the context it came in."""

    hidden: torch.Tensor
    context: Context


class SegmentQueue:
    """One sequence on its way through the segments of a model, with its KV cache.

    `advance(0)`, `advance(1)`, .. takes what waits in front of a segment through it. A head with a block (a decoder
    layer with a KV cache of its own) must see every token, so states wait for it too; they pass when it is read.
    """

    def __init__(self, model: InferenceModel, kv: KVCache):
        self.model, self.kv = model, kv
        self.counters = Counters()
        self._before = [_Boundary() for _ in model.segments]
        self._before_block = {index: _Boundary() for index in model.blocks}
        self._span = (0, 0)
        self._context: Context | None = None

    def __len__(self) -> int:
        """Tokens that have entered the sequence."""
        return self._before[0].taken + self._before[0].waiting

    @property
    def pending(self) -> int:
        """Tokens that have not passed all segments yet."""
        return len(self) - self._before[-1].taken

    def push(self, ids: Sequence[int]) -> None:
        """Put the sequence's next tokens in front of the first segment."""
        self._before[0].put(self.model.embed(ids, len(self)))

    def advance(self, index: int) -> Arrival:
        """Take everything that waits in front of a segment through it."""
        start, hidden = self._before[index].take()
        segment, rows = self.model.segments[index], hidden.shape[0]
        context = self._shared(start, rows)
        hidden = segment.forward(hidden, context)
        self.counters.add_forward(len(segment.layers), rows, self.model.segment_bytes[index])
        if index + 1 < len(self._before):
            self._before[index + 1].put(hidden)
        if index in self._before_block:
            self._before_block[index].put(hidden)
        return Arrival(hidden[-1:], context)

    def read_exit(self, index: int, arrival: Arrival) -> Reading:
        """What the exit behind a segment says about the newest token, which has just passed the segment."""
        readout = self.model.segments[index].exit
        assert readout is not None
        if index not in self._before_block:
            return self._read(readout, arrival.hidden, arrival.context)
        start, hidden = self._before_block[index].take()
        return self._read(readout, hidden, self._shared(start, hidden.shape[0]))

    def read_final(self, arrival: Arrival) -> Reading:
        """What the final head says about the newest token, which has just passed the last segment."""
        return self._read(self.model.final, arrival.hidden, arrival.context)

    def fill_blocks(self) -> None:
        """Take states that wait for exits' blocks through them: after a prompt, and where nothing may be left behind."""
        for index, boundary in self._before_block.items():
            if boundary.waiting:
                start, hidden = boundary.take()
                self.model.blocks[index](hidden, self._shared(start, hidden.shape[0]))
                self.counters.add_forward(1, hidden.shape[0], self.model.block_bytes[index])

    def drain(self) -> None:
        """Take every pending token through all segments: the KV cache is then complete."""
        for index, boundary in enumerate(self._before):
            if boundary.waiting:
                self.advance(index)
        self.fill_blocks()

    def _read(self, readout: Readout, hidden: torch.Tensor, context: Context) -> Reading:
        """Of [s, b, h] the last token's."""
        features = readout.head.features(hidden, context)[-1]
        self.counters.add_head(readout.name, self.model.head_bytes[readout.name])
        return read(readout, features)

    def _shared(self, start: int, rows: int) -> Context:
        """One context serves all segments that take the same tokens."""
        if self._context is None or self._span != (start, rows):
            self._span, self._context = (start, rows), self.model.context(self.kv, start, rows)
        return self._context
