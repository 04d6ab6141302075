"""A stage as decoding sees it: embedding, segments between active exits, heads, and the contexts of forwards.

Everything here belongs to one rank. Decoding runs without gradients and without the stand-ins for megatron-core.
Shape legend: r rows (tokens of all sequences, one after the other), h channels.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from eellm.decoding.kv_cache import KVCache, KVShape
from eellm.decoding.ragged import RaggedKV, Span
from eellm.model.context import AttentionMask, Context, rotary_factors
from eellm.model.layer import DecoderLayer
from eellm.model.stage import Readout, Segment, Stage


class InferenceModel:
    """A stage cut at its active exits only; inactive ones cost nothing.

    `active`: layers of the exits that may be evaluated, ascending, on whatever stage. `segments[i].exit` is the exit behind
    segment i; None behind a last segment without one. `blocks[i]` is the decoder layer inside that exit, if it has one.
    The first stage has the `embedding`, the last one the `final` head; one that holds the whole model has both.
    """

    def __init__(self, stage: Stage, active: Sequence[int] = ()):
        assert not stage.config.sequence_parallel, "build the stage for decoding without sequence parallelism"
        self.spec, self.embedding = stage.spec, stage.embedding
        self.segments = _cut(stage, active)
        self.final = stage.readout("final") if stage.post_process else None
        exits = {index: segment.exit for index, segment in enumerate(self.segments) if segment.exit is not None}
        self.blocks = {index: exit_.head.block for index, exit_ in exits.items() if exit_.head.block is not None}
        self.segment_bytes = [sum(_bytes(layer.parameters()) for layer in segment.layers) for segment in self.segments]
        self.block_bytes = {index: _bytes(block.parameters()) for index, block in self.blocks.items()}
        heads = [*exits.values(), *([self.final] if self.final else [])]
        self.head_bytes = {readout.name: readout_bytes(readout) for readout in heads}
        self.dtype = stage.config.params_dtype
        self.device = next(stage.parameters()).device
        self._rotary: tuple[torch.Tensor, torch.Tensor] | None = None

    def cache(self, max_tokens: int, sequences: int = 1) -> KVCache:
        """An empty KV cache: the stage's layers, and the blocks of its active exits."""
        return KVCache([layer.name for layer in self.cached_layers], self.cache_shape(max_tokens, sequences))

    def cache_shape(self, max_tokens: int, sequences: int) -> KVShape:
        """What a layer of such a cache keeps on this rank."""
        groups = self.cached_layers[0].attention.num_query_groups_per_partition
        return KVShape(max_tokens, groups, self.spec.head_dim, self.dtype, self.device, sequences)

    @property
    def cached_layers(self) -> list[DecoderLayer]:
        return [layer for segment in self.segments for layer in segment.layers] + list(self.blocks.values())

    def embed(self, ids: Sequence[int], positions: Sequence[int]) -> torch.Tensor:
        """Token ids at their positions -> [r, 1, h]."""
        assert self.embedding is not None, "tokens enter on the first stage"
        tokens, places = torch.tensor([ids, positions], device=self.device).unsqueeze(1)
        return self.embedding(tokens, places)

    def context(self, cache: KVCache, spans: Sequence[Span]) -> Context:
        """What rows of sequences share in all layers that have seen exactly the tokens before them."""
        kv = RaggedKV(self.spec, cache, spans)
        if self.spec.position != "rotary":
            return Context(AttentionMask(), kv=kv)
        tables = self._rotary_table(max(span.end for span in spans))
        if len(spans) == 1:
            cos, sin = (table[spans[0].start : spans[0].end] for table in tables)
        else:
            positions = torch.tensor([position for span in spans for position in span.positions], device=self.device)
            cos, sin = (table[positions] for table in tables)
        return Context(AttentionMask(), cos, sin, kv)

    def _rotary_table(self, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        if self._rotary is None or self._rotary[0].shape[0] < tokens:
            length = max(tokens, self.spec.max_positions, 2 * (0 if self._rotary is None else self._rotary[0].shape[0]))
            positions = torch.arange(length, device=self.device).unsqueeze(0)
            self._rotary = rotary_factors(self.spec, positions, self.dtype)
        return self._rotary


def _cut(stage: Stage, active: Sequence[int]) -> list[Segment]:
    """The stage's segments, joined over exits that are not active."""
    segments: list[Segment] = []
    layers: list[DecoderLayer] = []
    for segment in stage.segments:
        layers += segment.layers
        if segment.exit is not None and segment.exit.head.layer in active:
            segments.append(Segment(tuple(layers), segment.exit))
            layers = []
    if layers:
        segments.append(Segment(tuple(layers), None))
    return segments


def readout_bytes(readout: Readout) -> int:
    """Bytes of weights that one evaluation of a head reads on this rank; rows that pad the vocabulary are not read."""
    own = (parameter for name, parameter in readout.head.named_parameters() if not name.startswith("output."))
    weight = readout.weight
    return _bytes(own) + readout.vocabulary.rows * weight.shape[1] * weight.element_size()


def _bytes(parameters: Iterable[torch.nn.Parameter]) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in parameters)
