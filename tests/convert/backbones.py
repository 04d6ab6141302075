"""Tiny models of every family with random weights, large enough that predictions are sure of themselves now and then."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import (
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

NUM_LAYERS, VOCABULARY = 4, 61

_TOKENS = {"vocab_size": VOCABULARY, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
_SHAPES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.4,
}
_GROUPS = {"num_key_value_heads": 2}
_GPT2 = {"n_embd": 32, "n_layer": NUM_LAYERS, "n_head": 4, "n_positions": 64, "initializer_range": 0.4}

FAMILIES: dict[str, Callable[..., PretrainedConfig]] = {
    "llama": lambda **more: LlamaConfig(**_TOKENS, **_SHAPES, **_GROUPS, **more),
    "mistral": lambda **more: MistralConfig(**_TOKENS, **_SHAPES, **_GROUPS, sliding_window=5, **more),
    "qwen2": lambda **more: Qwen2Config(**_TOKENS, **_SHAPES, **_GROUPS, **more),
    "qwen3": lambda **more: Qwen3Config(**_TOKENS, **_SHAPES, **_GROUPS, head_dim=16, **more),
    "olmo2": lambda **more: Olmo2Config(**_TOKENS, **_SHAPES, **_GROUPS, **more),
    "gpt2": lambda **more: GPT2Config(**_TOKENS, **_GPT2, **more),
    "gpt_neox": lambda **more: GPTNeoXConfig(**_TOKENS, **_SHAPES, **more),
}


def exit_options(layer: int, head: str, tie_output: bool = True, temperature: float = 1.0) -> dict[str, Any]:
    """One entry of `config.early_exits`."""
    return {"layer": layer, "head": head, "tie_output": tie_output, "temperature": temperature}
