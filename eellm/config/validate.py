"""Rules between keys: everything that a single key's type cannot say, checked before any rank starts.

A rule is a function whose parameters name the groups it reads; it runs when all of them parsed, and yields problems.
"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from eellm.config.request import Request, checkpoint_overrides, typed_value, unread_overrides, unread_with_the_choice
from eellm.config.schema import (
    Config,
    DataConfig,
    DecodingConfig,
    EvaluationConfig,
    ExitPolicyConfig,
    ExitsConfig,
    LossWeightsConfig,
    LrScheduleConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    PrecisionConfig,
    ScheduleConfig,
    TaskConfig,
    TokenizerConfig,
    TrainerConfig,
)
from eellm.errors import Problem
from eellm.model.spec import exit_layer, per_exit, resolved_ffn

Problems = Iterator[Problem]


def check(groups: dict[str, Any], request: Request) -> list[Problem]:
    """Run every rule whose groups are there. `groups` maps top-level keys to parsed nodes and scalars."""
    available = {**groups, "groups": groups, "request": request}
    problems: list[Problem] = []
    for rule in RULES:
        names = list(inspect.signature(rule).parameters)
        if all(name in available for name in names):
            problems += rule(*(available[name] for name in names))
    return problems


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


def lists_have_one_entry_per_exit(exits: ExitsConfig, loss_weights: LossWeightsConfig) -> Problems:
    count = len(exits.layers)
    lists = {
        "exits.head": exits.head,
        "exits.tie_output": exits.tie_output,
        "exits.temperature": exits.temperature,
        "loss_weights.values": loss_weights.values,
        "loss_weights.initial": loss_weights.initial,
    }
    for path, value in lists.items():
        if isinstance(value, list) and len(value) != count:
            reason = f"a list of {len(value)} for {count} exits (exits.layers={exits.layers})"
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


def positions_cover_the_sequence(model: ModelConfig, data: DataConfig) -> Problems:
    if model.position == "learned" and model.max_positions is not None and model.max_positions < data.sequence_length:
        reason = f"shorter than data.sequence_length={data.sequence_length}"
        yield Problem("model.max_positions", model.max_positions, reason, "make it at least as long, or null")


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


def vocabulary_holds_the_tokenizer(model: ModelConfig, tokenizer: TokenizerConfig) -> Problems:
    if tokenizer.kind == "file" and tokenizer.path is None:
        yield Problem("tokenizer.path", None, "tokenizer.kind=file reads a file", "tokenizer.path=<tokenizer.json>")
    if tokenizer.kind == "file" and tokenizer.path is not None and not Path(tokenizer.path).expanduser().is_file():
        yield Problem("tokenizer.path", tokenizer.path, "there is no such file", "give the path of a tokenizer.json")
    if tokenizer.kind == "byte_bpe" and tokenizer.vocab_size is None:
        yield Problem("tokenizer.vocab_size", None, "a trained tokenizer needs a size", "tokenizer.vocab_size=2048")
    if tokenizer.kind == "byte_bpe" and (model.vocab_size or 2**62) < (tokenizer.vocab_size or 0):
        reason = f"smaller than tokenizer.vocab_size={tokenizer.vocab_size}"
        yield Problem("model.vocab_size", model.vocab_size, reason, "make it at least as large, or null for the tokenizer's")


def sequence_parallel_fits(parallel: ParallelConfig, data: DataConfig) -> Problems:
    if not parallel.sequence_parallel:
        return
    if parallel.tp == 1:
        yield Problem("parallel.sequence_parallel", True, "does nothing with parallel.tp=1", "set parallel.tp > 1, or false")
    elif data.sequence_length % parallel.tp:
        reason = f"not divisible by parallel.tp={parallel.tp}, over which parallel.sequence_parallel splits it"
        yield Problem("data.sequence_length", data.sequence_length, reason, f"choose a multiple of {parallel.tp}")


def layers_fill_the_stages(model: ModelConfig, parallel: ParallelConfig) -> Problems:
    stages, split = parallel.pp * parallel.vp, parallel.layers_per_stage
    if split is None:
        if model.num_layers % stages:
            reason = f"not divisible by parallel.pp x parallel.vp = {stages} stages"
            example = [len(range(stage, model.num_layers, stages)) for stage in range(stages)]
            fix = "choose a multiple" if 0 in example else f"parallel.layers_per_stage={example}, or a multiple"
            yield Problem("model.num_layers", model.num_layers, reason, fix)
    elif len(split) != stages:
        reason = f"{len(split)} entries for parallel.pp x parallel.vp = {stages} stages"
        yield Problem("parallel.layers_per_stage", split, reason, f"give {stages} entries")
    elif sum(split) != model.num_layers:
        reason = f"the sum is {sum(split)}, not model.num_layers={model.num_layers}"
        yield Problem("parallel.layers_per_stage", split, reason, "make the entries add up to the model's layers")


def schedule_suits_the_stages(parallel: ParallelConfig, schedule: ScheduleConfig) -> Problems:
    pp, vp = parallel.pp, parallel.vp
    if vp > 1 and pp == 1:
        yield Problem("parallel.vp", vp, "model chunks need pipeline ranks (parallel.pp=1)", "parallel.pp=2, or parallel.vp=1")
    if schedule.name == "interleaved" and vp == 1:
        yield Problem("schedule.name", schedule.name, "nothing to interleave (parallel.vp=1)", "parallel.vp=2, or schedule=auto")
    if schedule.name == "one_f_one_b" and vp > 1:
        reason = f"runs one model chunk a rank, parallel.vp={vp}"
        yield Problem("schedule.name", schedule.name, reason, "schedule=interleaved or auto, or parallel.vp=1")


def microbatches_divide_the_batch(task: TaskConfig, parallel: ParallelConfig, data: DataConfig, request: Request) -> Problems:
    dp = request.data_parallel(parallel)
    if dp is None or task.name == "generate":  # which reads no batches
        return
    batch, step = data.global_batch_size, data.micro_batch_size * dp
    if batch % step:
        reason = f"not divisible by data.micro_batch_size={data.micro_batch_size} x parallel.dp={dp} = {step}"
        yield Problem("data.global_batch_size", batch, reason, f"data.global_batch_size={max(1, batch // step) * step}")
    elif parallel.vp > 1 and parallel.pp > 1 and batch // step % parallel.pp:
        reason = f"makes {batch // step} microbatches; interleaving needs a multiple of parallel.pp={parallel.pp}"
        enough = -(-batch // step // parallel.pp) * step * parallel.pp
        yield Problem("data.global_batch_size", batch, reason, f"data.global_batch_size={enough}")


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


def optimizer_options_fit(optimizer: OptimizerConfig) -> Problems:
    if optimizer.distributed and optimizer.name == "sgd":
        yield Problem("optimizer.distributed", True, "only adam's states can be split", "optimizer=adam_distributed")
    gather = "optimizer.overlap_param_gather"
    if optimizer.overlap_param_gather and not optimizer.distributed:
        yield Problem(gather, True, "there is nothing to gather unless states are split", "optimizer.distributed=true")
    if optimizer.overlap_param_gather and not optimizer.overlap_grad_reduce:
        yield Problem(gather, True, "needs overlapped reduction too", "optimizer.overlap_grad_reduce=true")


def attention_kernel_runs(model: ModelConfig, precision: PrecisionConfig, device: str, data: DataConfig) -> Problems:
    kernel = model.attention
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


def warmup_ends_before_the_decay(lr_schedule: LrScheduleConfig) -> Problems:
    warmup, decay = lr_schedule.warmup_steps, lr_schedule.decay_steps
    if decay is not None and warmup >= decay:
        reason = f"the decay ends before the warm-up does (lr_schedule.decay_steps={decay})"
        yield Problem("lr_schedule.warmup_steps", warmup, reason, f"choose less than {decay}")


def corpus_can_be_read(data: DataConfig) -> Problems:
    if data.source == "stdlib":
        return
    if data.path is None:
        yield Problem("data.path", None, f"data.source={data.source} reads a file or folder", "data.path=<file or folder>")
    elif not Path(data.path).expanduser().exists():
        yield Problem("data.path", data.path, "there is no such file or folder", "give the path of a file or folder")


def split_has_both_parts(data: DataConfig, trainer: TrainerConfig, task: TaskConfig) -> Problems:
    fix = "data.split=[0.95,0.05]"
    if len(data.split) != 2:
        yield Problem("data.split", data.split, "not two shares: training and validation", fix)
    elif data.split[0] <= 0 and task.name != "evaluate":
        yield Problem("data.split", data.split, "nothing is left to train on", fix)
    elif data.split[1] <= 0 and (task.name != "train" or trainer.val_every):
        yield Problem("data.split", data.split, "nothing is held out for validation", f"{fix}, or trainer.val_every=0")


def policy_fits_the_exits(model: ModelConfig, exits: ExitsConfig, exit_policy: ExitPolicyConfig) -> Problems:
    layers = exit_layers(model, exits)
    active = layers if exit_policy.active is None else exit_policy.active
    unknown = [layer for layer in active if layer not in layers]
    if unknown:
        yield Problem("exit_policy.active", active, f"there is no exit after layer {unknown[0]}", f"choose from {layers}")
    elif exit_policy.active is not None and active != sorted(set(active)):
        yield Problem("exit_policy.active", active, "the layers must increase", f"exit_policy.active={sorted(set(active))}")
    threshold = exit_policy.threshold
    if isinstance(threshold, list) and len(threshold) != len(active):
        reason = f"a list of {len(threshold)} for {len(active)} active exits"
        yield Problem("exit_policy.threshold", threshold, reason, f"give {len(active)} entries, or one for all")
    if exit_policy.kind == "fixed_layer" and exit_policy.layer is None:
        yield Problem("exit_policy.layer", None, "exit_policy.kind=fixed_layer needs an exit", f"choose from {layers}")
    elif exit_policy.kind == "fixed_layer" and exit_policy.layer not in active:
        reason = f"there is no{' active' if exit_policy.active else ''} exit after this layer"
        yield Problem("exit_policy.layer", exit_policy.layer, reason, f"choose from {active}")


def thresholds_lie_in_range(exit_policy: ExitPolicyConfig) -> Problems:
    for threshold in per_exit(exit_policy.threshold, 1):
        if exit_policy.kind == "patience":
            if threshold < 1 or threshold != int(threshold):
                yield Problem("exit_policy.threshold", threshold, "no number of exits", "give a whole number, at least 1")
        elif exit_policy.kind in ("max_probability", "margin", "entropy") and not 0.0 <= threshold <= 1.0:
            yield Problem("exit_policy.threshold", threshold, f"a {exit_policy.kind} lies in 0..1", "give a number in 0..1")


def decoding_runs_on_one_stage(task: TaskConfig, parallel: ParallelConfig, request: Request) -> Problems:
    if task.name != "generate":
        return
    for key, size in (("pp", parallel.pp), ("vp", parallel.vp), ("dp", request.data_parallel(parallel) or 1)):
        if size > 1:
            over = "data-parallel ranks" if key == "dp" else "pipeline stages"
            yield Problem(f"parallel.{key}", size, f"decoding over {over} is not available yet", f"parallel.{key}=1")


def thresholds_are_given(evaluation: EvaluationConfig) -> Problems:
    if not evaluation.thresholds:
        yield Problem("evaluation.thresholds", [], "the trade-off table has no rows", "evaluation.thresholds=[0.5,0.8]")


def prompts_are_given(task: TaskConfig, decoding: DecodingConfig) -> Problems:
    if task.name in ("generate", "quickstart") and not decoding.prompts:
        yield Problem("decoding.prompts", [], "nothing to continue", "'decoding.prompts=[\"import \"]'")


def runs_are_named_where_needed(task: TaskConfig, checkpoint: str | None, resume: str | None) -> Problems:
    if task.name in ("evaluate", "generate") and checkpoint is None:
        yield Problem("checkpoint", None, f"task={task.name} reads a trained model", "checkpoint=<run directory>")
    if task.name in ("train", "quickstart") and checkpoint is not None:
        yield Problem("checkpoint", checkpoint, f"task={task.name} starts from random weights", "leave it out, or resume=<run>")
    if task.name != "train" and resume is not None:
        yield Problem("resume", resume, f"task={task.name} cannot be resumed", "leave it out, or task=train")
    if checkpoint is not None and resume is not None:
        yield Problem("resume", resume, "a run reads either `checkpoint` or `resume`", "leave one out")


def overrides_are_read(task: TaskConfig, request: Request) -> Problems:
    yield from unread_overrides(task.name, request)


def overrides_belong_to_the_choices(groups: dict[str, Any], request: Request) -> Problems:
    yield from unread_with_the_choice(groups, request)


def overrides_act_on_decoding(task: TaskConfig, decoding: DecodingConfig, request: Request) -> Problems:
    for override in request.parsed:
        if override.key in ("decoding.top_k", "decoding.top_p") and decoding.temperature == 0:
            reason = "decoding.temperature=0 always takes the most probable token"
            yield Problem(override.key, typed_value(override), reason, "set decoding.temperature, or leave it out")
        if override.group == "exit_policy" and task.name == "generate" and decoding.mode == "full":
            reason = "decoding.mode=full never exits early"
            yield Problem(override.key, typed_value(override), reason, "decoding=catch_up, or leave it out")


def overrides_leave_the_checkpoint_alone(task: TaskConfig, checkpoint: str | None, request: Request) -> Problems:
    if task.name in ("evaluate", "generate") and checkpoint is not None:
        yield from checkpoint_overrides(request)


def exit_layers(model: ModelConfig, exits: ExitsConfig) -> list[int]:
    """Exits as layers, fractions resolved."""
    return [exit_layer(position, model.num_layers) for position in exits.layers]


RULES: list[Callable[..., Problems]] = [
    exits_lie_in_the_model,
    lists_have_one_entry_per_exit,
    loss_weights_have_steps,
    heads_fit_the_width,
    positions_cover_the_sequence,
    matrices_divide_over_tp,
    vocabulary_holds_the_tokenizer,
    sequence_parallel_fits,
    layers_fill_the_stages,
    schedule_suits_the_stages,
    microbatches_divide_the_batch,
    ranks_fill_the_layout,
    optimizer_options_fit,
    attention_kernel_runs,
    warmup_ends_before_the_decay,
    corpus_can_be_read,
    split_has_both_parts,
    policy_fits_the_exits,
    thresholds_lie_in_range,
    decoding_runs_on_one_stage,
    thresholds_are_given,
    prompts_are_given,
    runs_are_named_where_needed,
    overrides_are_read,
    overrides_belong_to_the_choices,
    overrides_act_on_decoding,
    overrides_leave_the_checkpoint_alone,
]
assert all(set(inspect.signature(rule).parameters) <= {*Config.model_fields, "groups", "request"} for rule in RULES)
