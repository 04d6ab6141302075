"""Decode steps as CUDA graphs: a segment's pass over one new row per sequence is captured once and replayed. On the CPU the
same steps can be compiled (`eellm.decoding.model.compiled_steps`); a graph is then the compiled function.

A replay repeats the kernels of the capture, so everything that changes from step to step stands in tensors that stay where
they are: hidden states, positions, places in the cache. Row i of a graph belongs to slot i. There is a graph for each segment,
number of slots (powers of two) and number of keys (powers of two); rows without a new token are computed and dropped, and write
to a place behind the slot's last. Prompts, rows that catch up and tensor-parallel models run eagerly.
Shape legend: r rows with a new token, b rows of a graph (slots), g key/value groups, p query heads per group, d channels of a
head, h channels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from eellm.decoding.model.grouped_attention import additive, newest_rows
from eellm.decoding.model.kv_cache import KVCache
from eellm.decoding.model.lean_layer import DecodingContext
from eellm.decoding.model.ragged import Span
from eellm.decoding.model.segments import InferenceModel
from eellm.model.context import causal_mask

Run = Callable[[], torch.Tensor]
Capture = Callable[[Run], Run]
"""Runs a function once and returns one that repeats its kernels; both give the same output tensor."""

LEAST_KEYS = 256


def cuda_capture(run: Run) -> Run:
    """The real one; a first run in a stream of its own loads what must not be loaded during a capture."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()

    def replay() -> torch.Tensor:
        graph.replay()
        return out

    return replay


class SlotRows:
    """`KeysAndValues` of rows 0 .. b - 1, one new token for each of the first b slots, whose places are read from tensors.

    `positions` [b]: each row sees the first `keys` keys of its slot up to its position. `places` [b]: where its own are stored.
    """

    def __init__(self, model: InferenceModel, cache: KVCache, positions: torch.Tensor, places: torch.Tensor, keys: int):
        self.cache, self.places, self.keys = cache, places, keys
        allowed = causal_mask(model.spec, positions.unsqueeze(1), torch.arange(keys, device=positions.device).unsqueeze(0))
        self.mask = additive(allowed.expand(-1, cache.shape.groups, -1, -1).reshape(-1, 1, 1, keys), cache.shape.dtype)

    def attend(self, layer: str, mixed: torch.Tensor) -> torch.Tensor:
        """Store the keys and values of projections [b, g, p + 2, d], attend from their queries: [b, 1, g * p * d]."""
        keys, values = self.cache.put_rows(layer, self.places, mixed[:, :, -2:], self.keys)
        return newest_rows(mixed[:, :, :-2], keys, values, self.mask)


class _Step:
    """One segment, number of slots and number of keys: static tensors and, from the first run on, their graph."""

    def __init__(self, model: InferenceModel, index: int, cache: KVCache, slots: int, keys: int):
        self.model, self.segment, self.cache, self.keys = model, model.segments[index], cache, keys
        self.hidden = torch.zeros(slots, 1, model.spec.hidden_size, dtype=model.dtype, device=model.device)
        self.places = torch.zeros(2, slots, dtype=torch.long, device=model.device)
        self.cos, self.sin = model.rotary(slice(None))  # kept, as the model may replace its tables by longer ones
        self.replay: Run | None = None

    def run(self) -> torch.Tensor:
        """[b, 1, h], from static tensors alone."""
        positions, places = self.places
        cos, sin = (None if table is None else table[positions] for table in (self.cos, self.sin))
        kv = SlotRows(self.model, self.cache, positions, places, self.keys)
        return self.segment.forward(self.hidden, DecodingContext(kv, cos, sin))


class SegmentGraphs:
    """Captures what it has not seen yet, replays the rest. `capture` and `least_keys` may be others where there is no CUDA."""

    def __init__(self, model: InferenceModel, capture: Capture = cuda_capture, least_keys: int = LEAST_KEYS):
        self.model, self._capture, self._least_keys = model, capture, least_keys
        self._cache: KVCache | None = None
        self._steps: dict[tuple[int, int, int], _Step] = {}

    def forget(self) -> None:
        """Drop all graphs, and with them the cache that they read and write."""
        self._cache, self._steps = None, {}

    @property
    def captured(self) -> int:
        """Graphs at hand."""
        return sum(step.replay is not None for step in self._steps.values())

    def serves(self, spans: Sequence[Span]) -> bool:
        """One new row per sequence, and nothing to agree on with other ranks."""
        return self.model.vocabulary.group.size() == 1 and all(span.count == 1 for span in spans)

    def forward(self, index: int, hidden: torch.Tensor, cache: KVCache, spans: Sequence[Span]) -> torch.Tensor:
        """`InferenceSegment.forward` of rows [r, 1, h] that `serves` has approved; returns a tensor of their own."""
        step = self._step(index, cache, spans)
        rows = torch.tensor([span.slot for span in spans], device=hidden.device)
        idle = cache.shape.max_tokens  # nobody reads what is stored there
        positions, places = [0] * len(step.hidden), [idle] * len(step.hidden)
        for span in spans:
            positions[span.slot] = places[span.slot] = span.start
        for layer in step.segment.layers:
            cache.extend_each(layer.name, [span.slot for span in spans], [span.start for span in spans], [1] * len(spans))
        step.hidden[rows] = hidden
        step.places.copy_(torch.tensor([positions, places]))
        if step.replay is None:
            step.replay = self._capture(step.run)
        return step.replay()[rows]

    def _step(self, index: int, cache: KVCache, spans: Sequence[Span]) -> _Step:
        if cache is not self._cache:  # graphs hold on to the memory that they were captured with
            self._cache, self._steps = cache, {}
            self.model.prepare_positions(cache.shape.max_tokens)
        shape = cache.shape
        slots = bucket(max(span.slot for span in spans) + 1, 1, shape.sequences)
        keys = bucket(max(span.end for span in spans), self._least_keys, shape.max_tokens)
        if (index, slots, keys) not in self._steps:
            self._steps[index, slots, keys] = _Step(self.model, index, cache, slots, keys)
        return self._steps[index, slots, keys]


def bucket(count: int, least: int, most: int) -> int:
    """The smallest of least, 2 * least, 4 * least, .. and most that holds `count`."""
    size = least
    while size < count:
        size *= 2
    return min(size, most)
