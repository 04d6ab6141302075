"""Segment queues: how tokens that left early catch up.

A token that exits after segment i leaves its hidden state pending at that boundary. When a later token enters segment
i + 1, the pending states in front of it go through in the same forward and fill the KV cache. So every token passes
every layer at most once, in order, and the KV cache is that of full decoding.
Shape legend: s tokens of one sequence, r rows (tokens of all sequences, one after the other), h channels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from eellm.decoding.counters import Counters
from eellm.decoding.model.compiled_steps import compiled
from eellm.decoding.model.cuda_graphs import SegmentGraphs
from eellm.decoding.model.kv_cache import KVCache
from eellm.decoding.model.lean_layer import DecodingContext
from eellm.decoding.model.ragged import Span
from eellm.decoding.model.segments import InferenceModel
from eellm.decoding.reading import Reading, read


class Boundary:
    """Hidden states of a sequence waiting at one place, oldest first, and how many have gone on from there."""

    def __init__(self) -> None:
        self._states: list[torch.Tensor] = []
        self.waiting = 0
        self.taken = 0

    def put(self, states: torch.Tensor) -> None:
        """[s, 1, h]"""
        self._states.append(states)
        self.waiting += states.shape[0]

    def take(self) -> list[torch.Tensor]:
        """All that wait."""
        states, self._states = self._states, []
        self.taken, self.waiting = self.taken + self.waiting, 0
        return states

    def pass_by(self, tokens: int) -> None:
        """As put and taken at once; nothing may wait."""
        self.taken += tokens

    def truncate(self, tokens: int) -> None:
        """Forget everything after a sequence's first `tokens`."""
        keep = max(0, tokens - self.taken)
        if keep < self.waiting:
            self._states = [torch.cat(self._states)[:keep]] if keep else []
            self.waiting = keep
        self.taken = min(self.taken, tokens)


class SegmentQueue:
    """One sequence on its way through the segments of a model: what waits where. Its keys and values have `slot` of `kv`.

    A head with a block (a decoder layer with a KV cache of its own) must see every token, so states wait for it too;
    they pass when it is read. `arrived` [s, 1, h] came out of the segment that the sequence passed last.
    """

    def __init__(self, model: InferenceModel, kv: KVCache, slot: int = 0):
        self.kv, self.slot = kv, slot
        self.before = [Boundary() for _ in model.segments]
        self.before_block = {index: Boundary() for index in model.blocks}
        self.arrived = torch.empty(0)
        kv.truncate(0, slot)

    def __len__(self) -> int:
        """Tokens that have entered the sequence."""
        return self.before[0].taken + self.before[0].waiting

    @property
    def complete(self) -> int:
        """Tokens that have passed all segments."""
        return self.before[-1].taken

    @property
    def pending(self) -> int:
        """Tokens that have not passed all segments yet."""
        return len(self) - self.complete

    def truncate(self, tokens: int) -> None:
        """Forget everything after the first `tokens`, wherever they have got to."""
        for boundary in (*self.before, *self.before_block.values()):
            boundary.truncate(tokens)
        self.kv.truncate(tokens, self.slot)


class SegmentRunner:
    """Takes the waiting tokens of many sequences through a segment, or to a head, in one forward.

    `advance(queues, 0)`, `advance(queues, 1)`, .. with ever fewer queues is a token's way until it leaves. All queues have
    slots of one KV cache. `counters` may be exchanged at any time. `graphs` run what they can: where there is
    CUDA, and on the CPU if steps are to be compiled.
    """

    def __init__(self, model: InferenceModel, compile_steps: bool = False):
        self.model, self.counters = model, Counters()
        self.graphs = SegmentGraphs(model) if model.device.type == "cuda" else None
        if compile_steps and self.graphs is None:
            self.graphs = SegmentGraphs(model, compiled)
        model.spare_places = int(self.graphs is not None)  # rows without a token write there
        self._spans: list[Span] = []
        self._cache: KVCache | None = None
        self._shared: DecodingContext | None = None

    def forget(self) -> None:
        """Let go of the KV cache served so far: another one is to take its memory."""
        self._cache, self._shared, self._spans = None, None, []
        if self.graphs is not None:
            self.graphs.forget()

    def push(self, queues: Sequence[SegmentQueue], texts: Sequence[Sequence[int]]) -> None:
        """Put of each sequence's text what has not entered it yet in front of the first segment."""
        new = [list(range(len(queue), len(text))) for queue, text in zip(queues, texts, strict=True)]
        ids = [text[place] for text, places in zip(texts, new, strict=True) for place in places]
        if not ids:
            return
        embedded = self.model.embed(ids, [place for places in new for place in places])
        for queue, states in zip(queues, embedded.split([len(places) for places in new]), strict=True):
            if states.shape[0]:
                queue.before[0].put(states)

    def advance(self, queues: Sequence[SegmentQueue], first: int, last: int | None = None) -> None:
        """Take everything that waits in front of a segment through it, or on to the end of segment `last`, if nothing waits on
        the way; something must wait in every queue."""
        last = first if last is None else last
        hidden, spans = self._take(queues, [queue.before[first] for queue in queues])
        for index in range(first, last + 1):
            hidden = self._through(index, hidden, queues, spans)
            if index in self.model.blocks:
                for queue, states in zip(queues, hidden.split([span.count for span in spans]), strict=True):
                    queue.before_block[index].put(states)
        for queue, states in zip(queues, hidden.split([span.count for span in spans]), strict=True):
            queue.arrived = states
            for passed in queue.before[first + 1 : last + 1]:
                passed.pass_by(states.shape[0])
            if last + 1 < len(queue.before):
                queue.before[last + 1].put(states)

    def finish(self, queues: Sequence[SegmentQueue]) -> None:
        """Take every pending token through all segments; of blocks see `fill_blocks`."""
        first, count = 0, len(self.model.segments)
        while first < count:
            last = first
            while last + 1 < count and not any(queue.before[last + 1].waiting for queue in queues):
                last += 1
            waiting = [queue for queue in queues if queue.before[first].waiting]
            if waiting:
                self.advance(waiting, first, last)
            first = last + 1

    def read_exit(self, queues: Sequence[SegmentQueue], index: int) -> Reading:
        """What the exit behind a segment says about each queue's newest token, which has just passed the segment."""
        readout = self.model.segments[index].exit
        assert readout is not None
        if index not in self.model.blocks:
            features = self.model.features(readout, _joined([queue.arrived[-1:] for queue in queues]))
        else:
            hidden, spans = self._take(queues, [queue.before_block[index] for queue in queues])
            features = self.model.features(readout, hidden, self._context(queues, spans))
            features = _joined([states[-1:] for states in features.split([span.count for span in spans])])
        self.counters.add_head(readout.name, features.shape[0], self.model.head_bytes[readout.name])
        return read(readout, features[:, 0])

    def read_final(self, queues: Sequence[SegmentQueue], newest_only: bool = True) -> Reading:
        """What the final head says about each queue's newest token, or about all rows of the last segment's last forward."""
        assert self.model.final is not None, "the last stage has the final head"
        hidden = _joined([queue.arrived[-1:] if newest_only else queue.arrived for queue in queues])
        features = self.model.features(self.model.final, hidden)
        self.counters.add_head("final", hidden.shape[0], self.model.head_bytes["final"])
        return read(self.model.final, features[:, 0])

    def fill_blocks(self, queues: Sequence[SegmentQueue]) -> None:
        """Take states that wait for exits' blocks through them: after a prompt, and where nothing may be left behind."""
        for index, block in self.model.blocks.items():
            waiting = [queue for queue in queues if queue.before_block[index].waiting]
            if waiting:
                hidden, spans = self._take(waiting, [queue.before_block[index] for queue in waiting])
                block(hidden, self._context(waiting, spans))
                self.counters.add_forward(1, hidden.shape[0], self.model.block_bytes[index])

    def drain(self, queues: Sequence[SegmentQueue]) -> None:
        """Take every pending token through all segments: the KV cache is then complete."""
        self.finish(queues)
        self.fill_blocks(queues)

    def _through(self, index: int, hidden: torch.Tensor, queues: Sequence[SegmentQueue], spans: list[Span]) -> torch.Tensor:
        segment = self.model.segments[index]
        if not segment.layers:  # a stage may begin with an exit
            return hidden
        self.counters.add_forward(len(segment.layers), hidden.shape[0], self.model.segment_bytes[index])
        if self.graphs is not None and self.graphs.serves(spans):
            return self.graphs.forward(index, hidden, queues[0].kv, spans)
        return segment.forward(hidden, self._context(queues, spans))

    def _take(self, queues: Sequence[SegmentQueue], places: Sequence[Boundary]) -> tuple[torch.Tensor, list[Span]]:
        """All that wait at a place of each queue [r, 1, h], and whose rows they are."""
        spans = [Span(queue.slot, at.taken, at.waiting) for queue, at in zip(queues, places, strict=True)]
        return _joined([states for at in places for states in at.take()]), spans

    def _context(self, queues: Sequence[SegmentQueue], spans: list[Span]) -> DecodingContext:
        """One context serves all segments that take the same tokens."""
        if self._shared is None or self._cache is not queues[0].kv or self._spans != spans:
            self._cache, self._spans = queues[0].kv, spans
            self._shared = self.model.context(self._cache, spans)
        return self._shared


def _joined(parts: list[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
