"""Bytes: what a rank holds all the time, and what a microbatch leaves on a stage from forward to backward.

Activations are counted operation by operation, as autograd keeps them for `eellm.model.layer`; of a stage's input and the norm
that reads it once. Checked against the live storages of a run.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from eellm.layout import ParallelLayout
from eellm.metrics.flops import FUSED_ATTENTION, Recompute
from eellm.model.spec import ExitSpec, ModelSpec, StageSpec
from eellm.plan import parameters

WIDTH = {"fp32": 4, "bf16": 2, "fp16": 2}
_FP32 = 4


@dataclass(frozen=True)
class Shape:
    """What activations depend on besides the model. `chunk` tokens have logits at a time. `fused_norm`: RMSNorm is one kernel,
    as on a GPU; the CPU keeps normalised values too, in fp32."""

    sequence: int
    micro_batch: int
    dtype: str
    tp: int = 1
    sequence_parallel: bool = False
    recompute: Recompute = "none"
    chunk: int = 1024
    fused_norm: bool = True

    @classmethod
    def of(cls, layout: ParallelLayout, sequence: int, dtype: str, recompute: Recompute, chunk: int) -> Shape:
        return cls(sequence, layout.micro_batch_size, dtype, layout.tp, layout.sequence_parallel, recompute, chunk)

    @property
    def tokens(self) -> int:
        return self.sequence * self.micro_batch

    @property
    def split_tokens(self) -> int:
        """Tokens of a rank between tensor-parallel regions."""
        return self.tokens // self.tp if self.sequence_parallel else self.tokens

    @property
    def width(self) -> int:
        """Bytes of an activation."""
        return WIDTH[self.dtype]


@dataclass(frozen=True)
class StaticMemory:
    """Bytes of one rank, there from the first step on."""

    weights: int
    gradients: int
    optimizer: float

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer


def static_memory(
    count: int, dtype: str, optimizer: Literal["adam", "sgd"], sharded_over: int = 1, trained: int | None = None
) -> StaticMemory:
    """Of `count` parameters, of which `trained` are (None: all). Gradients are fp32; so are optimizer states, and the weights'
    main copies beside half precision; these are `sharded_over` ranks by the distributed optimizer."""
    states = (2 if optimizer == "adam" else 1) * _FP32 + (_FP32 if WIDTH[dtype] < _FP32 else 0)
    trained = count if trained is None else trained
    return StaticMemory(count * WIDTH[dtype], trained * _FP32, trained * states / sharded_over)


def hidden_bytes(spec: ModelSpec, shape: Shape) -> int:
    """Hidden states of a microbatch, as they pass from stage to stage."""
    return shape.split_tokens * spec.hidden_size * shape.width


def norm_bytes(spec: ModelSpec, shape: Shape) -> int:
    """A norm over the width: its input and statistics."""
    if spec.norm == "layernorm":
        statistics = 2 * (_FP32 if shape.fused_norm else shape.width)
        return shape.split_tokens * (spec.hidden_size * shape.width + statistics)
    if shape.fused_norm:
        return shape.split_tokens * (spec.hidden_size * shape.width + _FP32)
    return shape.split_tokens * (2 * spec.hidden_size * _FP32 + _FP32)


def layer_bytes(spec: ModelSpec, shape: Shape) -> float:
    """A decoder layer, from its forward pass to its backward pass."""
    if shape.recompute == "full":
        return hidden_bytes(spec, shape)
    # with the norms before: norm, input of QKV, norm, input of the MLP; with the norms after: the same four
    bare = 2 * norm_bytes(spec, shape) + 2 * hidden_bytes(spec, shape)
    if spec.residual == "parallel" and (spec.norm == "layernorm" or shape.fused_norm or shape.width == _FP32):
        bare -= hidden_bytes(spec, shape)  # both norms read one input
    return bare + (attention_bytes(spec, shape) + mlp_bytes(spec, shape)) / shape.tp


def attention_bytes(spec: ModelSpec, shape: Shape) -> int:
    """Between the projections, over all tensor-parallel ranks: QKV (values are a view of it), rotated or copied queries and
    keys, statistics and result of the kernel."""
    queries, keys = spec.num_heads * spec.head_dim, spec.num_query_groups * spec.head_dim
    kept = (queries + 2 * keys + queries) * shape.width
    if spec.position == "rotary":
        kept += (queries + keys) * shape.width
    elif spec.num_heads > spec.num_query_groups:
        kept += queries * shape.width
    if spec.qk_norm == "head":
        kept += (spec.num_heads + spec.num_query_groups) * _FP32 + _head_norm_input(spec, shape)
    elif spec.qk_norm == "projection":
        kept += (queries + keys) * (_FP32 + shape.width) + 2 * _FP32
    if shape.recompute == "selective":
        return shape.tokens * kept
    if spec.attention in FUSED_ATTENTION:
        return shape.tokens * (kept + spec.num_heads * _FP32)
    scores = spec.num_heads * shape.sequence
    return shape.tokens * (kept + scores * (_FP32 if shape.width == _FP32 else _FP32 + shape.width))


def _head_norm_input(spec: ModelSpec, shape: Shape) -> int:
    """What a norm of queries and keys keeps per token besides statistics: queries where groups make a copy of them; on the CPU
    normalised values in fp32, of half precision also the input in fp32."""
    queries, both = spec.num_heads * spec.head_dim, (spec.num_heads + spec.num_query_groups) * spec.head_dim
    copied = queries * shape.width if spec.num_heads > spec.num_query_groups else 0
    if shape.fused_norm:
        return copied
    return both * _FP32 + (copied if shape.width == _FP32 else both * _FP32)


def mlp_bytes(spec: ModelSpec, shape: Shape) -> int:
    """Between the projections, over all tensor-parallel ranks. Gated: both halves, the activation, megatron-core's copy of the
    linear half, their product."""
    return shape.tokens * spec.ffn_hidden_size * (5 if spec.gated else 2) * shape.width


def head_kept_bytes(spec: ModelSpec, exit_: ExitSpec | None, shape: Shape) -> float:
    """A head from forward to backward; the loss keeps gradients of features and of the matrix in place of logits."""
    kind = "norm" if exit_ is None else exit_.head
    kept: float = shape.tokens * spec.hidden_size * shape.width + parameters.matrix(spec, shape.tp) * _FP32
    if kind == "mlp":
        kept += norm_bytes(spec, shape) + hidden_bytes(spec, shape) + mlp_bytes(spec, shape) / shape.tp
    elif kind == "block":
        kept += layer_bytes(spec, shape)
    return kept + (norm_bytes(spec, shape) if kind != "embedding" else 0)


def logits_bytes(spec: ModelSpec, shape: Shape) -> int:
    """Logits that exist at a time, fp32 and in the weights' type, and the features that they are made of."""
    rows, tokens = spec.padded_vocab_size // shape.tp, min(shape.chunk, shape.tokens)
    each = _FP32 if shape.width == _FP32 else _FP32 + shape.width
    return tokens * rows * each + shape.tokens * spec.hidden_size * shape.width


def stage_kept_bytes(spec: ModelSpec, part: StageSpec, shape: Shape) -> float:
    """Layers of a stage, and the hidden states that an exit at its end keeps; others are kept by the layer after them."""
    at_end = bool(part.segments) and part.segments[-1].exit is not None and not part.has_final_head
    return part.num_layers * layer_bytes(spec, shape) + (hidden_bytes(spec, shape) if at_end else 0)


def working_bytes(spec: ModelSpec, shape: Shape) -> float:
    """Passing in the backward pass of a layer: gradients inside the MLP, and with full recomputation the layer's activations."""
    gradients = (shape.tokens * spec.ffn_hidden_size * (3 if spec.gated else 2) / shape.tp) * shape.width
    again = layer_bytes(spec, replace(shape, recompute="none")) if shape.recompute == "full" else 0.0
    return gradients + 2 * hidden_bytes(spec, shape) + again
