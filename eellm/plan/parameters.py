"""Parameters that one tensor-parallel rank of a stage holds, counted from shapes: exactly those of `eellm.model.stage`."""

from __future__ import annotations

from eellm.model.spec import ExitSpec, ModelSpec, StageSpec, uses_output_matrix


def norm(spec: ModelSpec) -> int:
    return spec.hidden_size * (2 if spec.norm == "layernorm" else 1)


def mlp(spec: ModelSpec, tp: int = 1) -> int:
    rows = spec.ffn_hidden_size * (2 if spec.gated else 1) // tp
    bias = rows + spec.hidden_size if spec.linear_bias else 0
    return spec.hidden_size * (rows + spec.ffn_hidden_size // tp) + bias


def attention(spec: ModelSpec, tp: int = 1) -> int:
    queries, keys = spec.num_heads * spec.head_dim, spec.num_query_groups * spec.head_dim
    projected = (queries + 2 * keys) // tp
    bias = projected if spec.qkv_bias or spec.linear_bias else 0
    bias += spec.hidden_size if spec.linear_bias else 0
    norms = {"none": 0, "head": 2 * spec.head_dim, "projection": (queries + keys) // tp}[spec.qk_norm]
    return spec.hidden_size * (projected + queries // tp) + bias + norms


def layer(spec: ModelSpec, tp: int = 1) -> int:
    return 2 * norm(spec) + attention(spec, tp) + mlp(spec, tp)


def matrix(spec: ModelSpec, tp: int = 1) -> int:
    """An input embedding or output matrix."""
    return spec.padded_vocab_size // tp * spec.hidden_size


def head(spec: ModelSpec, exit_: ExitSpec | None, tp: int = 1) -> int:
    """A head's own parameters; None = the final head, whose matrix is the model's."""
    kind = "norm" if exit_ is None else exit_.head
    body = {"embedding": 0, "norm": norm(spec), "mlp": 2 * norm(spec) + mlp(spec, tp), "block": norm(spec) + layer(spec, tp)}[
        kind
    ]
    return body + (0 if exit_ is None or exit_.tie_output else matrix(spec, tp))


def stage(spec: ModelSpec, part: StageSpec, tp: int = 1) -> int:
    count = part.num_layers * layer(spec, tp) + sum(head(spec, exit_, tp) for exit_ in part.exits)
    if part.has_embedding:
        count += matrix(spec, tp) + (spec.max_positions * spec.hidden_size if spec.position == "learned" else 0)
    if part.has_final_head:
        count += head(spec, None, tp)
    reads_embedding = part.has_embedding and spec.tie_embeddings
    return count + (matrix(spec, tp) if uses_output_matrix(spec, part) and not reads_embedding else 0)


def whole_model(spec: ModelSpec) -> int:
    """Parameters of the model, copies of a tied matrix counted once."""
    own = spec.num_layers * layer(spec) + head(spec, None) + sum(head(spec, exit_) for exit_ in spec.exits)
    positions = spec.max_positions * spec.hidden_size if spec.position == "learned" else 0
    return own + positions + matrix(spec) * (1 if spec.tie_embeddings else 2)
