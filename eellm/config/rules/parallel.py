"""Rules on how the model and its batches are spread over ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from eellm.config.request import Request, measures_decoding, tunes
from eellm.config.schema import (
    BenchmarkConfig,
    DataConfig,
    ModelConfig,
    ParallelConfig,
    TaskConfig,
    TokenizerConfig,
)
from eellm.errors import Problem
from eellm.model.spec import resolved_ffn

Problems = Iterator[Problem]


def matrices_divide_over_tp(model: ModelConfig, parallel: ParallelConfig, tokenizer: TokenizerConfig) -> Problems:
    tp = parallel.tp
    parts = {
        "model.num_attention_heads": model.num_attention_heads,
        "model.num_query_groups": model.num_query_groups,
        "model.ffn_hidden_size": resolved_ffn(model),
    }
    for path, size in parts.items():
        if size is not None and size % tp:
            yield Problem(path, size, f"not divisible by parallel.tp={tp}", f"choose a multiple of {tp}, or another parallel.tp")
    vocab = model.vocab_size or (tokenizer.vocab_size if tokenizer.kind == "byte_bpe" else None)
    padded = None if vocab is None else -(-vocab // model.vocab_multiple) * model.vocab_multiple
    if model.vocab_multiple % tp and (padded is None or padded % tp):
        rows = "the vocabulary" if padded is None else f"the vocabulary padded to {padded} rows"
        reason = f"{rows} is not divisible by parallel.tp={tp}"
        yield Problem("model.vocab_multiple", model.vocab_multiple, reason, f"choose a multiple of {tp}")


def sequence_parallel_fits(parallel: ParallelConfig, data: DataConfig) -> Problems:
    if not parallel.sequence_parallel:
        return
    if parallel.tp == 1:
        yield Problem("parallel.sequence_parallel", True, "does nothing with parallel.tp=1", "set parallel.tp > 1, or false")
    elif data.sequence_length % parallel.tp:
        reason = f"not divisible by parallel.tp={parallel.tp}, over which parallel.sequence_parallel splits it"
        yield Problem("data.sequence_length", data.sequence_length, reason, f"choose a multiple of {parallel.tp}")


def layers_fill_the_stages(
    task: TaskConfig, benchmark: BenchmarkConfig, model: ModelConfig, parallel: ParallelConfig
) -> Problems:
    stages, split = parallel.pp * parallel.vp, parallel.layers_per_stage
    if tunes(task, benchmark):  # which need not build them all: eellm.config.rules.tuning
        return
    if split is None:
        if model.num_layers % stages:
            reason = f"not divisible by parallel.pp x parallel.vp = {stages} stages"
            example = [len(range(stage, model.num_layers, stages)) for stage in range(stages)]
            fix = "choose a multiple" if 0 in example else f"parallel.layers_per_stage={example}, or a multiple"
            yield Problem("model.num_layers", model.num_layers, reason, fix)
    elif split == "balance":
        if stages > model.num_layers:
            reason = f"fewer than the parallel.pp x parallel.vp = {stages} stages"
            yield Problem("model.num_layers", model.num_layers, reason, "every stage needs a layer")
    elif len(split) != stages:
        reason = f"{len(split)} entries for parallel.pp x parallel.vp = {stages} stages"
        yield Problem("parallel.layers_per_stage", split, reason, f"give {stages} entries")
    elif sum(split) != model.num_layers:
        reason = f"the sum is {sum(split)}, not model.num_layers={model.num_layers}"
        yield Problem("parallel.layers_per_stage", split, reason, "make the entries add up to the model's layers")


def microbatches_divide_the_batch(
    task: TaskConfig, benchmark: BenchmarkConfig, parallel: ParallelConfig, data: DataConfig, request: Request
) -> Problems:
    dp = request.data_parallel(parallel)
    if dp is None or task.name in ("generate", "serve") or measures_decoding(task, benchmark):  # which read no batches
        return
    batch, step = data.global_batch_size, data.micro_batch_size * dp
    if batch % step:
        reason = f"not divisible by data.micro_batch_size={data.micro_batch_size} x parallel.dp={dp} = {step}"
        yield Problem("data.global_batch_size", batch, reason, f"data.global_batch_size={max(1, batch // step) * step}")
    elif parallel.vp > 1 and parallel.pp > 1 and batch // step % parallel.pp:
        reason = f"makes {batch // step} microbatches; interleaving needs a multiple of parallel.pp={parallel.pp}"
        enough = -(-batch // step // parallel.pp) * step * parallel.pp
        yield Problem("data.global_batch_size", batch, reason, f"data.global_batch_size={enough}")


def microbatches_divide_the_ramp_up(task: TaskConfig, parallel: ParallelConfig, data: DataConfig, request: Request) -> Problems:
    dp, ramp = request.data_parallel(parallel), data.ramp_up
    if dp is None or ramp is None or task.name not in ("train", "quickstart"):
        return
    unit, product = data.micro_batch_size * dp, f"data.micro_batch_size={data.micro_batch_size} x parallel.dp={dp}"
    if parallel.vp > 1 and parallel.pp > 1:
        unit, product = unit * parallel.pp, f"{product} x parallel.pp={parallel.pp} (interleaving)"
    for key, size in {"start": ramp.start, "increment": ramp.increment}.items():
        if size % unit:
            yield Problem(f"data.ramp_up.{key}", size, f"not divisible by {product} = {unit}", f"choose a multiple of {unit}")


def ranks_fill_the_layout(parallel: ParallelConfig, request: Request) -> Problems:
    if request.world_size is None:
        return
    model_ranks, world = parallel.tp * parallel.pp, request.world_size
    if world % model_ranks:
        reason = f"parallel.tp x parallel.pp = {model_ranks} does not divide the {world} ranks started from outside (WORLD_SIZE)"
        yield Problem("parallel.pp", parallel.pp, reason, f"start a multiple of {model_ranks} ranks")
    elif parallel.dp is not None and parallel.dp * model_ranks != world:
        reason = f"makes {parallel.dp * model_ranks} ranks with parallel.tp and .pp, but {world} were started (WORLD_SIZE)"
        yield Problem("parallel.dp", parallel.dp, reason, f"parallel.dp={world // model_ranks}, or null for what is left")


RULES: list[Callable[..., Problems]] = [
    matrices_divide_over_tp,
    sequence_parallel_fits,
    layers_fill_the_stages,
    microbatches_divide_the_batch,
    microbatches_divide_the_ramp_up,
    ranks_fill_the_layout,
]
