"""Losses, gradients and gradient norm of every layout equal one-process autograd of the plain model."""

from __future__ import annotations

import itertools

import pytest

from eellm.model.spec import ExitSpec
from tests.engine import matrix
from tests.engine.layouts import Case, tiny_spec
from tests.engine.matrix import TOLERANCE, Differences, compare

mixed_heads = (ExitSpec(1, "embedding"), ExitSpec(2, "mlp", tie_output=False, temperature=1.5), ExitSpec(3, "block"))
mixed = tiny_spec(exits=mixed_heads)
untied = tiny_spec(exits=mixed_heads, tie_embeddings=False)
eight = tiny_spec(num_layers=8, exits=(ExitSpec(2), ExitSpec(3, "mlp"), ExitSpec(6, "block", tie_output=False), ExitSpec(8)))
large = tiny_spec(num_layers=2, vocab_size=70_001, padded_vocab_size=70_016, exits=(ExitSpec(1, tie_output=False),))

MATRIX = {matrix.name_of(row): row for row in matrix.rows()}


def check(case: Case) -> Differences:
    found = compare(case)
    tolerance = TOLERANCE[case.dtype]
    assert found.gradient < tolerance, found.parameter
    assert found.loss < tolerance
    assert found.norm < tolerance
    return found


@pytest.mark.parametrize("name", MATRIX)
def test_matrix(name: str) -> None:
    check(matrix.case_of(MATRIX[name]))


def test_matrix_covers_every_pair() -> None:
    """Counted anew: any two values that can meet do so in a row of fp32, and each half precision meets every value."""
    impossible = {("exits", name, layout) for name in ("end", "start", "middle") for layout in ("pp1", "tp2", "tp2_sp", "dp2")}
    impossible |= {("exits", "middle", layout) for layout in ("pp2", "pp2_tp2", "pp2_dp2")}
    impossible |= {("layers", "uneven", layout) for layout in ("pp1", "tp2", "tp2_sp", "dp2")}
    for first, second in itertools.combinations(matrix.FACTORS, 2):
        met = {(row[first], row[second]) for row in MATRIX.values() if row["dtype"] == "fp32"}
        for pair in itertools.product(matrix.FACTORS[first], matrix.FACTORS[second]):
            can_meet = first != "layout" or (second, pair[1], pair[0]) not in impossible
            assert (pair in met) == can_meet, (first, second, pair)
    for dtype, (factor, values) in itertools.product(("bf16", "fp16"), matrix.FACTORS.items()):
        assert {row[factor] for row in MATRIX.values() if row["dtype"] == dtype} == set(values)


OTHERS = {
    "mixed_heads": Case(mixed),
    "documents": Case(mixed, documents=True),
    "token_confidence": Case(mixed, token_confidence=True, unmasked=31),
    "tp2_sequence_parallel_documents": Case(untied, {"tp": 2, "sequence_parallel": True}, documents=True),
    "tp2_token_confidence": Case(mixed, {"tp": 2}, token_confidence=True, unmasked=5),
    "tp2_ids_beyond_two_bytes": Case(large, {"tp": 2}),
    "pp4_balanced_mixed_heads": Case(eight, {"pp": 4}, boundary="balance"),
}
"""Mixed heads with a temperature, documents in a sequence, weights by token, a large vocabulary: what the matrix leaves out."""


@pytest.mark.parametrize("name", OTHERS)
def test_other_options(name: str) -> None:
    check(OTHERS[name])


VARIANTS = {
    "gpt2": {"norm": "layernorm", "position": "learned", "activation": "gelu_tanh", "qkv_bias": True, "linear_bias": True},
    "neox": {"norm": "layernorm", "residual": "parallel", "rotary_fraction": 0.25, "activation": "gelu", "linear_bias": True},
    "olmo2": {"norm_placement": "after", "qk_norm": "projection"},
    "qwen3": {"qk_norm": "head", "qkv_bias": True, "head_dim": 16},
    "mistral": {"sliding_window": 5, "activation": "geglu", "attention": "unfused"},
}


@pytest.mark.parametrize("family", VARIANTS)
@pytest.mark.parametrize("layout", [{}, {"tp": 2, "sequence_parallel": True}], ids=["single", "tp2_sp"])
def test_families_of_layers(family: str, layout: dict) -> None:
    check(Case(tiny_spec(exits=mixed_heads, **VARIANTS[family]), layout))
