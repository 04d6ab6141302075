"""Rotary frequencies against those of `transformers`."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from eellm.config.compose import compose
from eellm.config.schema import RotaryScalingConfig
from eellm.errors import ConfigError
from eellm.model.context import rotary_frequencies
from tests.engine.layouts import tiny_spec

LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


@pytest.mark.parametrize("factor", [1.0, 2.5, 8.0, 32.0])
@pytest.mark.parametrize("kind", ["linear", "llama3"])
def test_scaled_frequencies(kind: str, factor: float) -> None:
    base, width = 500000.0, 128
    own = {"low_frequency_factor": 1.0, "high_frequency_factor": 4.0, "original_positions": 8192} if kind == "llama3" else {}
    spec = tiny_spec(head_dim=width, rotary_base=base, rotary_scaling=RotaryScalingConfig(kind=kind, factor=factor, **own))
    parameters = {"rope_type": kind, "rope_theta": base, "factor": factor, **(LLAMA3 if kind == "llama3" else {})}
    theirs = LlamaConfig(hidden_size=width, num_attention_heads=1, max_position_embeddings=131072, rope_parameters=parameters)
    wanted, _ = ROPE_INIT_FUNCTIONS[kind](theirs, "cpu")
    got = rotary_frequencies(spec)
    assert torch.equal(got, rotary_frequencies(tiny_spec(head_dim=width, rotary_base=base))) == (factor == 1.0)
    torch.testing.assert_close(got, wanted, rtol=2e-7, atol=0.0)


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ("{kind: llama3, factor: 8}", "model.rotary_scaling.original_positions=null: kind=llama3 needs it"),
        ("{kind: linear, factor: 2, original_positions: 8}", "original_positions=8: kind=linear never reads it"),
        ("{kind: yarn, factor: 2}", "model.rotary_scaling.kind=yarn: must be one of linear, llama3"),
        (
            "{kind: llama3, factor: 8, low_frequency_factor: 4, high_frequency_factor: 4, original_positions: 8}",
            "not below high_frequency_factor=4",
        ),
    ],
)
def test_what_cannot_be(value: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        compose([f"model.rotary_scaling={value}"])
    assert compose(["model.rotary_scaling={kind: linear, factor: 2}"]).model.rotary_scaling is not None
