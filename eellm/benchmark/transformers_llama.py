"""The same shapes in Hugging Face's `transformers`, where the model is a Llama and the library is installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

import torch

from eellm.mcore.parts import DTYPES
from eellm.model.spec import ModelSpec


def why_not(spec: ModelSpec, tp: int) -> str | None:
    """Why there is nothing to compare with; None where there is."""
    if tp > 1:
        return "it runs on one rank"
    if not is_llama(spec):
        return "no such architecture"
    if importlib.util.find_spec("transformers") is None:
        return "transformers is not installed"
    return None


def is_llama(spec: ModelSpec) -> bool:
    """Whether LlamaForCausalLM computes what the model computes at full depth."""
    parts = (spec.activation, spec.norm, spec.norm_placement, spec.residual, spec.qk_norm, spec.position)
    options = (spec.rotary_fraction, spec.rotary_scaling, spec.qkv_bias, spec.linear_bias, spec.sliding_window)
    wanted = ("swiglu", "rmsnorm", "before", "sequential", "none", "rotary")
    return parts == wanted and options == (1.0, None, False, False, None)


def build_llama(spec: ModelSpec, dtype: str, device: torch.device) -> Any:
    """A LlamaForCausalLM with random weights, in evaluation mode."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=spec.vocab_size,
        hidden_size=spec.hidden_size,
        intermediate_size=spec.ffn_hidden_size,
        num_hidden_layers=spec.num_layers,
        num_attention_heads=spec.num_heads,
        num_key_value_heads=spec.num_query_groups,
        head_dim=spec.head_dim,
        max_position_embeddings=spec.max_positions,
        rms_norm_eps=spec.norm_eps,
        tie_word_embeddings=spec.tie_embeddings,
        bos_token_id=None,
        eos_token_id=None,
    )
    model: Any = LlamaForCausalLM(config)
    return model.to(device, DTYPES[dtype]).eval()


class LlamaGeneration:
    """Work: one prompt after the other, as many new tokens each, by `generate` with its KV cache; greedily."""

    def __init__(self, model: Any, prompts: Sequence[list[int]], new_tokens: int):
        self.model, self.prompts, self.new_tokens = model, prompts, new_tokens
        self.texts: list[list[int]] = []

    def begin(self) -> None:
        """All is timed."""

    def __call__(self) -> None:
        prompt = torch.tensor([self.prompts[len(self.texts) % len(self.prompts)]], device=self.model.device)
        ids = self.model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=self.new_tokens,
            do_sample=False,
            use_cache=True,
            pad_token_id=0,
        )
        self.texts.append(ids[0, prompt.shape[1] :].tolist())
