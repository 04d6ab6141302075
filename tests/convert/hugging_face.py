"""Tiny models of `transformers` with random weights, one for each family."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

VOCABULARY = 61

_SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
_GROUPS = {"num_key_value_heads": 2}
_LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
_LLAMA3 |= {"original_max_position_embeddings": 16, "rope_theta": 500.0}

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", _SHAPE | _GROUPS),
    "llama3": ("Llama", _SHAPE | _GROUPS | {"rope_parameters": _LLAMA3, "tie_word_embeddings": True, "head_dim": 16}),
    "llama_linear_biases": (
        *("Llama",),
        _SHAPE | {"rope_parameters": {"rope_type": "linear", "factor": 2.5}, "attention_bias": True, "mlp_bias": True},
    ),
    "smollm2": (  # with its 9 heads in 3 groups
        *("Llama",),
        _SHAPE | {"tie_word_embeddings": True, "hidden_size": 72, "num_attention_heads": 9, "num_key_value_heads": 3},
    ),
    "mistral": ("Mistral", _SHAPE | _GROUPS | {"sliding_window": 5}),
    "qwen2": ("Qwen2", _SHAPE | _GROUPS | {"tie_word_embeddings": True}),
    "qwen2_window": ("Qwen2", _SHAPE | _GROUPS | {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 0}),
    "qwen3": ("Qwen3", _SHAPE | _GROUPS | {"head_dim": 16}),
    "olmo2": ("Olmo2", _SHAPE | _GROUPS),
    "gpt2": (
        "GPT2",
        {
            **{"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64},
            **{"initializer_range": 0.3, "bos_token_id": None, "eos_token_id": None},
        },
    ),
    "gpt_neox": ("GPTNeoX", _SHAPE | {"rotary_pct": 0.5}),
    "pythia_sequential": ("GPTNeoX", _SHAPE | {"use_parallel_residual": False, "hidden_act": "gelu_new"}),
}
"""Row of the parity table -> (class prefix in `transformers`, config)."""


def build(row: str, seed: int = 0) -> Any:
    """The model in fp32, its norms and biases away from 1 and 0."""
    import transformers

    kind, values = MODELS[row]
    torch.manual_seed(seed)
    config = getattr(transformers, f"{kind}Config")(**values)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model


def save(row: str, folder: Path, **options: Any) -> Any:
    """Write a model's folder; `options` of save_pretrained, e.g. max_shard_size."""
    model = build(row)
    model.save_pretrained(folder, **options)
    return model


def token_ids() -> torch.Tensor:
    """Two texts of 24 tokens."""
    return torch.randint(0, VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    return model(ids).logits.float()
