"""Rules on the model, its exits and their loss weights."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path

from eellm.config.schema import (
    BenchmarkConfig,
    DataConfig,
    ExitsConfig,
    LossWeightsConfig,
    ModelConfig,
    PrecisionConfig,
    TaskConfig,
    TokenizerConfig,
    TuningConfig,
)
from eellm.errors import Problem, as_typed
from eellm.model.spec import exit_layer

Problems = Iterator[Problem]


def exits_lie_in_the_model(model: ModelConfig, exits: ExitsConfig) -> Problems:
    shown = exits.layers
    for position in shown:
        if isinstance(position, float) and not 0.0 < position <= 1.0:
            yield Problem("exits.layers", shown, f"{position} is no fraction of the depth", "give layers, or fractions in (0, 1]")
            return
    layers = exit_layers(model, exits)
    for layer in layers:
        if not 1 <= layer <= model.num_layers:
            reason = f"{layer} is not one of the layers 1..{model.num_layers} (model.num_layers={model.num_layers})"
            yield Problem("exits.layers", shown, reason, f"give layers in 1..{model.num_layers}, or fractions in (0, 1]")
    if len(set(layers)) < len(layers):
        twice = sorted({layer for layer in layers if layers.count(layer) > 1})
        yield Problem("exits.layers", shown, f"more than one exit after layer {twice[0]} ({layers})", "name each layer once")
    elif layers != sorted(layers):
        yield Problem("exits.layers", shown, "the layers must increase", f"exits.layers={sorted(shown)}")


def a_benchmark_has_exits_to_measure(task: TaskConfig, benchmark: BenchmarkConfig, exits: ExitsConfig) -> Problems:
    if task.name == "benchmark" and benchmark.name in ("training", "tuning") and not exits.layers:
        reason = f"task=benchmark benchmark={benchmark.name} measures what exits cost"
        yield Problem("exits.layers", [], reason, "exits=custom")


def lists_have_one_entry_per_exit(
    task: TaskConfig, exits: ExitsConfig, loss_weights: LossWeightsConfig, tuning: TuningConfig
) -> Problems:
    lists = {"exits.head": exits.head, "exits.tie_output": exits.tie_output, "exits.temperature": exits.temperature}
    weights = {"loss_weights.values": loss_weights.values, "loss_weights.initial": loss_weights.initial}
    weighted = tuning.layers if task.name == "tune" and tuning.layers is not None else exits.layers
    places = [(path, value, exits.layers) for path, value in lists.items()]
    for path, value, layers in [*places, *((path, value, weighted) for path, value in weights.items())]:
        count = len(layers)
        if isinstance(value, list) and len(value) != count:
            reason = f"a list of {len(value)} for {count} exits ({as_typed(list(layers))})"
            yield Problem(path, value, reason, f"give {count} entries, or one value for all exits")


def loss_weights_have_steps(loss_weights: LossWeightsConfig) -> Problems:
    kind = loss_weights.kind
    if kind in ("warmup", "cooldown", "rotating") and loss_weights.steps < 1:
        yield Problem("loss_weights.steps", loss_weights.steps, f"loss_weights.kind={kind} needs steps", "give at least 1")


def heads_fit_the_width(model: ModelConfig) -> Problems:
    heads, groups = model.num_attention_heads, model.num_query_groups
    if model.head_dim is None and model.hidden_size % heads:
        reason = f"not divisible by model.num_attention_heads={heads}"
        yield Problem("model.hidden_size", model.hidden_size, reason, "choose a multiple, or set model.head_dim")
    if groups is not None and heads % groups:
        reason = f"not divisible by model.num_query_groups={groups}"
        yield Problem("model.num_attention_heads", heads, reason, "each group must serve equally many query heads")
    width = model.head_dim or model.hidden_size // heads
    rotated = int(width * model.rotary_fraction)
    if model.position == "rotary" and (rotated < 2 or rotated % 2):
        reason = f"rotates {rotated} of {width} channels of a head; channels rotate in pairs"
        yield Problem("model.rotary_fraction", model.rotary_fraction, reason, "choose a share that makes an even number")


def rotary_scaling_is_whole(model: ModelConfig) -> Problems:
    scaling = model.rotary_scaling
    if scaling is None:
        return
    own = {key: getattr(scaling, key) for key in ("low_frequency_factor", "high_frequency_factor", "original_positions")}
    for key, value in own.items():
        if scaling.kind == "llama3" and value is None:
            yield Problem(f"model.rotary_scaling.{key}", None, "kind=llama3 needs it", "give it as the model's card does")
        if scaling.kind == "linear" and value is not None:
            yield Problem(f"model.rotary_scaling.{key}", value, "kind=linear never reads it", "leave it out")
    low, high = own["low_frequency_factor"], own["high_frequency_factor"]
    if scaling.kind == "llama3" and low is not None and high is not None and low >= high:
        reason = f"not below high_frequency_factor={high:g}"
        yield Problem("model.rotary_scaling.low_frequency_factor", low, reason, "give a smaller number")


def positions_cover_the_sequence(model: ModelConfig, data: DataConfig) -> Problems:
    if model.position == "learned" and model.max_positions is not None and model.max_positions < data.sequence_length:
        reason = f"shorter than data.sequence_length={data.sequence_length}"
        yield Problem("model.max_positions", model.max_positions, reason, "make it at least as long, or null")


def vocabulary_holds_the_tokenizer(
    model: ModelConfig, tokenizer: TokenizerConfig, task: TaskConfig, checkpoint: str | None
) -> Problems:
    if task.name == "convert" or checkpoint is not None:  # tokenizers travel with their models
        return
    if tokenizer.kind == "file" and tokenizer.path is None:
        yield Problem("tokenizer.path", None, "tokenizer.kind=file reads a file", "tokenizer.path=<file or folder>")
    if tokenizer.kind == "file" and tokenizer.path is not None and not Path(tokenizer.path).expanduser().exists():
        yield Problem("tokenizer.path", tokenizer.path, "there is no such file or folder", "give the path of a tokenizer")
    if tokenizer.kind == "byte_bpe" and tokenizer.vocab_size is None:
        yield Problem("tokenizer.vocab_size", None, "a trained tokenizer needs a size", "tokenizer.vocab_size=2048")
    if tokenizer.kind == "byte_bpe" and (model.vocab_size or 2**62) < (tokenizer.vocab_size or 0):
        reason = f"smaller than tokenizer.vocab_size={tokenizer.vocab_size}"
        yield Problem("model.vocab_size", model.vocab_size, reason, "make it at least as large, or null for the tokenizer's")


def attention_kernel_runs(
    task: TaskConfig, model: ModelConfig, precision: PrecisionConfig, device: str, data: DataConfig
) -> Problems:
    kernel = model.attention
    if task.name == "plan":  # which runs nothing here
        return
    if kernel == "flash_attn":
        if precision.dtype == "fp32":
            yield Problem("model.attention", kernel, "knows no fp32", "precision=bf16, or model.attention=sdpa")
        if data.document_boundaries == "reset":
            reason = "cannot stop at documents' ends (data.document_boundaries=reset)"
            yield Problem("model.attention", kernel, reason, "model.attention=sdpa, or data.document_boundaries=loss")
        if device == "cpu" or not _cuda_available():
            where = "device=cpu" if device == "cpu" else "there is none on this machine"
            yield Problem("model.attention", kernel, f"needs a CUDA device ({where})", "model.attention=sdpa")
    if kernel == "transformer_engine" and importlib.util.find_spec("transformer_engine") is None:
        yield Problem("model.attention", kernel, "needs transformer-engine", "pip install 'eellm[gpu]', or model.attention=sdpa")


def _cuda_available() -> bool:
    import torch

    return torch.cuda.is_available()


def exit_layers(model: ModelConfig, exits: ExitsConfig) -> list[int]:
    """Exits as layers, fractions resolved."""
    return [exit_layer(position, model.num_layers) for position in exits.layers]


RULES: list[Callable[..., Problems]] = [
    exits_lie_in_the_model,
    a_benchmark_has_exits_to_measure,
    lists_have_one_entry_per_exit,
    loss_weights_have_steps,
    heads_fit_the_width,
    rotary_scaling_is_whole,
    positions_cover_the_sequence,
    vocabulary_holds_the_tokenizer,
    attention_kernel_runs,
]
