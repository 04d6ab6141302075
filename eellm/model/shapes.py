"""Every parameter's global name and whole shape, from the model's description alone. No torch."""

from __future__ import annotations

from collections.abc import Iterator

from eellm.model.spec import ExitSpec, ModelSpec

Shape = tuple[int, ...]


def parameter_shapes(spec: ModelSpec) -> dict[str, Shape]:
    """Global name -> shape, in the order of the network: what a checkpoint of the model holds."""
    matrix = (spec.padded_vocab_size, spec.hidden_size)
    shapes: dict[str, Shape] = {"embedding.tokens.weight": matrix}
    if spec.position == "learned":
        shapes["embedding.positions.weight"] = (spec.max_positions, spec.hidden_size)
    for number in range(1, spec.num_layers + 1):
        shapes.update(_layer(spec, f"layers.{number}"))
    for exit_ in spec.exits:
        shapes.update(_exit(spec, exit_))
    shapes.update(_norm(spec, "heads.final.norm"))
    if not spec.tie_embeddings:
        shapes["output.weight"] = matrix
    return shapes


def _exit(spec: ModelSpec, exit_: ExitSpec) -> Iterator[tuple[str, Shape]]:
    name = f"heads.{exit_.name}"
    if exit_.head == "block":
        yield from _layer(spec, f"{name}.block")
    if exit_.head == "mlp":
        yield from _norm(spec, f"{name}.mlp_norm")
        yield from _mlp(spec, f"{name}.mlp")
    if exit_.head != "embedding":
        yield from _norm(spec, f"{name}.norm")
    if not exit_.tie_output:
        yield f"{name}.output.weight", (spec.padded_vocab_size, spec.hidden_size)


def _layer(spec: ModelSpec, name: str) -> Iterator[tuple[str, Shape]]:
    yield from _norm(spec, f"{name}.attention_norm")
    queries, groups = spec.num_heads * spec.head_dim, spec.num_query_groups * spec.head_dim
    qkv_bias = spec.qkv_bias or spec.linear_bias
    yield from _linear(f"{name}.attention.linear_qkv", queries + 2 * groups, spec.hidden_size, qkv_bias)
    yield from _linear(f"{name}.attention.linear_proj", spec.hidden_size, queries, spec.linear_bias)
    if spec.qk_norm == "head":
        yield f"{name}.attention.q_layernorm.weight", (spec.head_dim,)
        yield f"{name}.attention.k_layernorm.weight", (spec.head_dim,)
    if spec.qk_norm == "projection":
        yield f"{name}.attention.q_norm.weight", (queries,)
        yield f"{name}.attention.k_norm.weight", (groups,)
    yield from _norm(spec, f"{name}.mlp_norm")
    yield from _mlp(spec, f"{name}.mlp")


def _mlp(spec: ModelSpec, name: str) -> Iterator[tuple[str, Shape]]:
    inner = spec.ffn_hidden_size * (2 if spec.gated else 1)
    yield from _linear(f"{name}.linear_fc1", inner, spec.hidden_size, spec.linear_bias)
    yield from _linear(f"{name}.linear_fc2", spec.hidden_size, spec.ffn_hidden_size, spec.linear_bias)


def _linear(name: str, rows: int, columns: int, bias: bool) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.weight", (rows, columns)
    if bias:
        yield f"{name}.bias", (rows,)


def _norm(spec: ModelSpec, name: str) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.weight", (spec.hidden_size,)
    if spec.norm == "layernorm":
        yield f"{name}.bias", (spec.hidden_size,)
