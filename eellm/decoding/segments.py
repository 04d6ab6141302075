"""The whole model as decoding sees it: embedding, segments between active exits, heads, and the contexts of forwards.

Everything here belongs to one rank and, for now, to one stage that holds the whole model. Decoding runs without
gradients and without the stand-ins for megatron-core.
Shape legend: s tokens, b sequences, h channels.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from eellm.decoding.kv_cache import KVCache, KVShape
from eellm.errors import ConfigError, Problem
from eellm.model.context import AttentionMask, Context, KVStore, causal_mask, rotary_factors
from eellm.model.layer import DecoderLayer
from eellm.model.stage import Readout, Segment, Stage


class InferenceModel:
    """A stage cut at its active exits only; inactive ones cost nothing.

    `active`: layers of the exits that may be evaluated, ascending. `segments[i].exit` is the exit behind segment i;
    None behind a last segment without one. `blocks[i]` is the decoder layer inside that exit, if it has one.
    """

    def __init__(self, stage: Stage, active: Sequence[int] = ()):
        assert stage.embedding is not None, "decoding needs a stage that holds the whole model"
        assert stage.post_process, "decoding needs a stage that holds the whole model"
        assert not stage.config.sequence_parallel, "build the stage for decoding without sequence parallelism"
        self.spec, self.embedding = stage.spec, stage.embedding
        self.segments = _cut(stage, active)
        self.final = stage.readout("final")
        exits = {index: segment.exit for index, segment in enumerate(self.segments) if segment.exit is not None}
        self.blocks = {index: exit_.head.block for index, exit_ in exits.items() if exit_.head.block is not None}
        self.segment_bytes = [sum(_bytes(layer.parameters()) for layer in segment.layers) for segment in self.segments]
        self.block_bytes = {index: _bytes(block.parameters()) for index, block in self.blocks.items()}
        self.head_bytes = {readout.name: readout_bytes(readout) for readout in [*exits.values(), self.final]}
        self.dtype = stage.config.params_dtype
        self.device = self.final.weight.device
        self._rotary: tuple[torch.Tensor, torch.Tensor] | None = None

    def cache(self, max_tokens: int) -> KVCache:
        """An empty KV cache for one sequence: all layers, and the blocks of active exits.

        Raises ConfigError where the model has learned positions for fewer tokens.
        """
        limit = self.spec.max_positions
        if self.spec.position == "learned" and max_tokens > limit:
            reason = f"prompt and new tokens make {max_tokens}, and the model has learned {limit} positions"
            raise ConfigError([Problem("decoding.max_new_tokens", max_tokens, reason, "fewer new tokens or a shorter prompt")])
        layers = [layer for segment in self.segments for layer in segment.layers] + list(self.blocks.values())
        groups = layers[0].attention.num_query_groups_per_partition
        shape = KVShape(max_tokens, groups, self.spec.head_dim, self.dtype, self.device)
        return KVCache([layer.name for layer in layers], shape)

    def embed(self, ids: Sequence[int], start: int) -> torch.Tensor:
        """Token ids at positions start, start + 1, .. -> [s, 1, h]."""
        tokens = torch.tensor([ids], device=self.device)
        positions = torch.arange(start, start + len(ids), device=self.device).unsqueeze(0)
        return self.embedding(tokens, positions)

    def context(self, kv: KVStore, start: int, rows: int) -> Context:
        """What `rows` consecutive tokens from position `start` share in all layers that have seen exactly those before."""
        mask = AttentionMask(self._allowed(start, rows), self.spec.sliding_window)
        if self.spec.position != "rotary":
            return Context(mask, kv=kv)
        cos, sin = self._rotary_table(start + rows)
        return Context(mask, cos[start : start + rows], sin[start : start + rows], kv)

    def _allowed(self, start: int, rows: int) -> torch.Tensor | None:
        """Which of the keys [0, start + rows) each query sees; None where the kernel needs no telling."""
        spec, end = self.spec, start + rows
        if spec.attention == "flash_attn":  # aligns the last query with the last key and knows windows
            return None
        if spec.sliding_window is None or end <= spec.sliding_window:
            if start == 0:  # plain causal attention
                return None
            if rows == 1 and spec.attention == "sdpa":  # one query, after all keys
                return None
        positions = torch.arange(end, device=self.device).unsqueeze(0)
        return causal_mask(spec, positions[:, start:], positions)

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
