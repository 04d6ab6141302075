"""Floating-point operations of the model, from its shapes alone. A multiplication and its addition count as two.

Matrix products are counted and nothing else, attention scores over the whole square of the sequence (no half
for causality or a window) as torch's FlopCounterMode does. Heads multiply the rows of the real vocabulary only.
*Model* FLOPs are forward + 2 x forward; *hardware* FLOPs add what is computed again in the backward pass.
"""

from __future__ import annotations

from typing import Literal

from eellm.model.spec import ExitSpec, ModelSpec

Recompute = Literal["none", "selective", "full"]
FUSED_ATTENTION = ("sdpa", "flash_attn", "transformer_engine")
BACKWARD = 2


def scores_flops(spec: ModelSpec, sequence_length: int) -> int:
    """One of attention's two products (queries with keys, or weights with values), per token and layer."""
    return 2 * sequence_length * spec.num_heads * spec.head_dim


def mlp_flops(spec: ModelSpec) -> int:
    """The MLP, forward, per token."""
    return 2 * spec.hidden_size * spec.ffn_hidden_size * (3 if spec.gated else 2)


def layer_flops(spec: ModelSpec, sequence_length: int) -> int:
    """One decoder layer, forward, per token."""
    projections = 2 * spec.hidden_size * spec.head_dim * (2 * spec.num_heads + 2 * spec.num_query_groups)
    return projections + 2 * scores_flops(spec, sequence_length) + mlp_flops(spec)


def head_flops(spec: ModelSpec, exit_: ExitSpec | None, sequence_length: int) -> int:
    """One output head with what stands before its output matrix, forward, per token; None = the final head."""
    output = 2 * spec.hidden_size * spec.vocab_size
    if exit_ is None or exit_.head in ("embedding", "norm"):
        return output
    return output + (mlp_flops(spec) if exit_.head == "mlp" else layer_flops(spec, sequence_length))


def flops_by_head(spec: ModelSpec, sequence_length: int) -> dict[str, int]:
    """Forward FLOPs per token of every head, by its name."""
    heads = {exit_.name: head_flops(spec, exit_, sequence_length) for exit_ in spec.exits}
    return heads | {"final": head_flops(spec, None, sequence_length)}


def forward_flops(spec: ModelSpec, sequence_length: int) -> int:
    """All layers and all heads, forward, per token."""
    return spec.num_layers * layer_flops(spec, sequence_length) + sum(flops_by_head(spec, sequence_length).values())


def training_flops(spec: ModelSpec, sequence_length: int) -> int:
    """Model FLOPs of training, per token: forward, and backward to inputs and to weights."""
    return (1 + BACKWARD) * forward_flops(spec, sequence_length)


def tuning_flops(spec: ModelSpec, sequence_length: int) -> int:
    """Model FLOPs of tuning the spec's exits, per token: forward as far as it is built, and backward through exits.

    The output matrix that exits share with the model gets no gradient.
    """
    output = 2 * spec.hidden_size * spec.vocab_size
    exits = [head_flops(spec, exit_, sequence_length) * (1 + BACKWARD) - output * exit_.tie_output for exit_ in spec.exits]
    final = [head_flops(spec, None, sequence_length)] if spec.has_final_head else []
    return spec.built_layers * layer_flops(spec, sequence_length) + sum(exits) + sum(final)


def recomputed_flops(spec: ModelSpec, sequence_length: int, recompute: Recompute = "none") -> int:
    """What the backward pass computes a second time, per token.

    `selective` repeats attention's products, `full` whole layers. A fused attention kernel keeps no scores and
    always repeats the first product, also inside a layer or a block head that is computed again.
    """
    score = scores_flops(spec, sequence_length)
    blocks = spec.num_layers + sum(exit_.head == "block" for exit_ in spec.exits)
    kernel = blocks * score if spec.attention in FUSED_ATTENTION else 0
    repeated = {"none": 0, "selective": 2 * score, "full": layer_flops(spec, sequence_length)}[recompute]
    return kernel + spec.num_layers * repeated


def hardware_flops(spec: ModelSpec, sequence_length: int, recompute: Recompute = "none") -> int:
    """Model FLOPs of training and what is recomputed, per token."""
    return training_flops(spec, sequence_length) + recomputed_flops(spec, sequence_length, recompute)
