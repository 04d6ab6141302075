"""A stage as decoding sees it: embedding, segments between active exits, heads, and the contexts of forwards.

Everything here belongs to one rank. Decoding runs without gradients and without the stand-ins for megatron-core.
Shape legend: r rows (tokens of all sequences, one after the other), h channels.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from eellm.decoding.model.kv_cache import KVCache, KVShape
from eellm.decoding.model.lean_embedding import LeanEmbedding
from eellm.decoding.model.lean_head import LeanHead
from eellm.decoding.model.lean_layer import DecodingContext, LeanLayer
from eellm.decoding.model.ragged import RaggedKV, Span
from eellm.decoding.model.weight_layout import store_columns_together
from eellm.model.context import rotary_factors
from eellm.model.stage import Readout, Stage


@dataclass(frozen=True)
class InferenceSegment:
    """A run of layers and the exit behind it."""

    layers: tuple[LeanLayer, ...]
    exit: Readout | None

    def forward(self, hidden: torch.Tensor, context: DecodingContext) -> torch.Tensor:
        """[r, 1, h] -> [r, 1, h] through the layers; the exit is the caller's business."""
        for layer in self.layers:
            hidden = layer(hidden, context)
        return hidden


class InferenceModel:
    """A stage cut at its active exits only; inactive ones cost nothing.

    `active`: layers of the exits that may be evaluated, ascending, on whatever stage. `segments[i].exit` is the exit behind
    segment i; None behind a last segment without one. `blocks[i]` is the decoder layer inside that exit, if it has one.
    The first stage has the `embedding`, the last one the `final` head; one that holds the whole model has both.
    """

    def __init__(self, stage: Stage, active: Sequence[int] = ()):
        assert not stage.config.sequence_parallel, "build the stage for decoding without sequence parallelism"
        store_columns_together(stage.parameters())
        self.spec, self.vocabulary = stage.spec, stage.vocabulary
        self.embedding = None if stage.embedding is None else LeanEmbedding(stage.embedding, stage.vocabulary)
        self.segments = _cut(stage, active)
        self.final = stage.readout("final") if stage.post_process else None
        exits = {index: segment.exit for index, segment in enumerate(self.segments) if segment.exit is not None}
        heads = [*exits.values(), *([self.final] if self.final else [])]
        self._heads = {readout.name: LeanHead(readout, self.spec) for readout in heads}
        blocks = {index: self._heads[exit_.name].block for index, exit_ in exits.items()}
        self.blocks = {index: block for index, block in blocks.items() if block is not None}
        self.segment_bytes = [sum(_bytes(layer.parameters()) for layer in segment.layers) for segment in self.segments]
        self.block_bytes = {index: _bytes(block.parameters()) for index, block in self.blocks.items()}
        self.head_bytes = {readout.name: readout_bytes(readout) for readout in heads}
        self.dtype = stage.config.params_dtype
        self.device = next(stage.parameters()).device
        self.spare_places = 0  # in a slot of its caches
        self._rotary: tuple[torch.Tensor, torch.Tensor] | None = None

    def cache(self, max_tokens: int, sequences: int = 1) -> KVCache:
        """An empty KV cache: the stage's layers, and the blocks of its active exits."""
        return KVCache([layer.name for layer in self.cached_layers], self.cache_shape(max_tokens, sequences))

    def cache_shape(self, max_tokens: int, sequences: int) -> KVShape:
        """What a layer of such a cache keeps on this rank."""
        groups = self.cached_layers[0].attention.groups
        return KVShape(max_tokens, groups, self.spec.head_dim, self.dtype, self.device, sequences, self.spare_places)

    @property
    def cached_layers(self) -> list[LeanLayer]:
        return [layer for segment in self.segments for layer in segment.layers] + list(self.blocks.values())

    def embed(self, ids: Sequence[int], positions: Sequence[int]) -> torch.Tensor:
        """Token ids at their positions -> [r, 1, h]."""
        assert self.embedding is not None, "tokens enter on the first stage"
        return self.embedding(ids, positions)

    def features(self, readout: Readout, hidden: torch.Tensor, context: DecodingContext | None = None) -> torch.Tensor:
        """[r, 1, h] -> [r, 1, h], what a head multiplies with its output matrix."""
        return self._heads[readout.name].features(hidden, context)

    def context(self, cache: KVCache, spans: Sequence[Span]) -> DecodingContext:
        """What rows of sequences share in all layers that have seen exactly the tokens before them."""
        self.prepare_positions(max(span.end for span in spans))
        if len(spans) == 1:
            positions: slice | torch.Tensor = slice(spans[0].start, spans[0].end)
        else:
            positions = torch.tensor([position for span in spans for position in span.positions], device=self.device)
        return DecodingContext(RaggedKV(self.spec, cache, spans), *self.rotary(positions))

    def rotary(self, positions: slice | torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """cos and sin [r, 1, 1, rotating channels] of prepared positions as `lean_layer.rotate_` takes them, if there are any."""
        if self._rotary is None:
            return None, None
        cos, sin = self._rotary
        return cos[positions], sin[positions]

    def prepare_positions(self, tokens: int) -> None:
        """Make rotary tables for texts of so many tokens, unless there are."""
        known = 0 if self._rotary is None else self._rotary[0].shape[0]
        if self.spec.position != "rotary" or tokens <= known:
            return
        positions = torch.arange(max(tokens, self.spec.max_positions, 2 * known), device=self.device).unsqueeze(0)
        cos, sin = rotary_factors(self.spec, positions, self.dtype)
        sin[..., : sin.shape[-1] // 2].neg_()
        self._rotary = cos, sin


def _cut(stage: Stage, active: Sequence[int]) -> list[InferenceSegment]:
    """The stage's segments, joined over exits that are not active."""
    segments: list[InferenceSegment] = []
    layers: list[LeanLayer] = []
    for segment in stage.segments:
        layers += [LeanLayer(layer, stage.spec, stage.vocabulary.group) for layer in segment.layers]
        if segment.exit is not None and segment.exit.head.layer in active:
            segments.append(InferenceSegment(tuple(layers), segment.exit))
            layers = []
    if layers:
        segments.append(InferenceSegment(tuple(layers), None))
    return segments


def readout_bytes(readout: Readout) -> int:
    """Bytes of weights that one evaluation of a head reads on this rank; rows that pad the vocabulary are not read."""
    own = (parameter for name, parameter in readout.head.named_parameters() if not name.startswith("output."))
    weight = readout.weight
    return _bytes(own) + readout.vocabulary.rows * weight.shape[1] * weight.element_size()


def _bytes(parameters: Iterable[torch.nn.Parameter]) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in parameters)
