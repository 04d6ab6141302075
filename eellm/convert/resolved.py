"""A run's model in full: every null of its config is the number that it stands for. No torch."""

from __future__ import annotations

from typing import Any

from eellm.config.schema import Config, ModelConfig
from eellm.model.spec import ModelSpec, build_spec, resolved_ffn
from eellm.rundir import RunDirectory


def resolved_model(model: ModelConfig, vocab_size: int, sequence_length: int) -> dict[str, Any]:
    """The model's keys as `eellm.convert.families` compares them; `vocab_size` and `sequence_length` stand for nulls."""
    values, rotary = model.model_dump(), model.position == "rotary"
    return {
        **values,
        "num_query_groups": model.num_query_groups or model.num_attention_heads,
        "head_dim": model.head_dim or model.hidden_size // model.num_attention_heads,
        "ffn_hidden_size": resolved_ffn(model),
        "vocab_size": model.vocab_size or vocab_size,
        "max_positions": model.max_positions or sequence_length,
        "qkv_bias": model.qkv_bias or model.linear_bias,
        # where nothing rotates, these say nothing
        "rotary_base": model.rotary_base if rotary else 10000.0,
        "rotary_fraction": model.rotary_fraction if rotary else 1.0,
        "rotary_scaling": values["rotary_scaling"] if rotary else None,
    }


def run_spec(config: Config, run: RunDirectory) -> ModelSpec:
    """The model of a run, whose tokenizer knows the vocabulary's size where its config does not."""
    from eellm.data.tokenizer_files import load_tokenizer

    end = config.tokenizer.end_of_document
    return build_spec(config, config.model.vocab_size or load_tokenizer(run.tokenizer, end).vocab_size)
