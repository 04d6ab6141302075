"""Rules on the text that is read and how it is split."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from eellm.config.paths import expanded, prefixes, tokenizer_beside
from eellm.config.request import BEGINS_WITH_A_MODEL, READS_A_MODEL, Request
from eellm.config.schema import DataConfig, PrepareConfig, TaskConfig, TokenizerConfig, TrainerConfig, TuningConfig
from eellm.errors import Problem

Problems = Iterator[Problem]


def corpus_can_be_read(data: DataConfig) -> Problems:
    if data.source in ("stdlib", "megatron"):
        return
    name = data.path
    if name is None:
        yield Problem("data.path", None, f"data.source={data.source} reads a file or folder", "data.path=<file or folder>")
    elif isinstance(name, list):
        yield Problem("data.path", name, f"data.source={data.source} reads one path", "data.path=<file or folder>")
    elif data.source != "huggingface" and not expanded(name).exists():
        yield Problem("data.path", name, "there is no such file or folder", "give the path of a file or folder")


def tokens_can_be_read(data: DataConfig) -> Problems:
    if data.source != "megatron":
        return
    if data.path is None or data.path == []:
        fix = "data.path=<prefix>, without .bin or .idx"
        yield Problem("data.path", data.path, "data.source=megatron reads .bin/.idx files", fix)
    for key, paths in (("data.path", data.path), ("data.validation_path", data.validation_path)):
        for prefix in prefixes(paths):
            missing = [f"{prefix.name}{ending}" for ending in (".bin", ".idx") if not Path(f"{prefix}{ending}").is_file()]
            if missing:
                yield Problem(key, str(prefix), f"there is no {' and no '.join(missing)}", "give the prefix of a pair of files")


def weights_fit_the_blend(data: DataConfig) -> Problems:
    count = len(data.path) if isinstance(data.path, list) else 1
    if data.weights is not None and len(data.weights) != count:
        reason = f"data.path has {count} prefixes, a weight belongs to each"
        yield Problem("data.weights", data.weights, reason, f"give {count} weights, or null for shares by size")


def preparation_is_complete(task: TaskConfig, data: DataConfig, prepare: PrepareConfig, request: Request) -> Problems:
    if task.name != "prepare_data":
        return
    if prepare.output is None:
        yield Problem("prepare.output", None, "task=prepare_data writes files", "prepare.output=<prefix>")
    if data.source == "megatron":
        reason = "task=prepare_data reads text, and these are tokens already"
        yield Problem("data.source", data.source, reason, "data=text, jsonl, stdlib or huggingface")
    if request.world_size is not None and request.world_size > 1:
        fix = "start it with python run.py; prepare.workers sets its processes"
        yield Problem("task.name", task.name, f"it runs in one process, and {request.world_size} are started", fix)


def prepared_tokens_have_a_tokenizer(data: DataConfig, tokenizer: TokenizerConfig, task: TaskConfig) -> Problems:
    if data.source != "megatron" or tokenizer.kind != "byte_bpe" or task.name not in ("train", "quickstart"):
        return
    for prefix in prefixes(data.path):
        if tokenizer_beside(prefix) is None:
            reason = f"{prefix}.bin does not say how it was tokenised, and no {prefix.name}.tokenizer.json lies beside it"
            yield Problem("tokenizer.kind", tokenizer.kind, reason, "tokenizer=file tokenizer.path=<tokenizer.json>")


def split_has_both_parts(data: DataConfig, trainer: TrainerConfig, task: TaskConfig, tuning: TuningConfig) -> Problems:
    fix = "data.split=[0.95,0.05]"
    if data.source == "megatron" and data.validation_path:
        return
    if len(data.split) != 2:
        yield Problem("data.split", data.split, "not two shares: training and validation", fix)
    elif data.split[0] <= 0 and task.name not in READS_A_MODEL:
        yield Problem("data.split", data.split, "nothing is left to train on", fix)
    elif data.split[1] <= 0 and (task.name not in BEGINS_WITH_A_MODEL or trainer.val_every or _evaluates(task, tuning)):
        yield Problem("data.split", data.split, "nothing is held out for validation", f"{fix}, or trainer.val_every=0")


def _evaluates(task: TaskConfig, tuning: TuningConfig) -> bool:
    return task.name == "tune" and tuning.evaluate


def ramp_up_reaches_the_batch_size(data: DataConfig) -> Problems:
    ramp, final = data.ramp_up, data.global_batch_size
    if ramp is None:
        return
    if ramp.start >= final:
        reason = f"not below data.global_batch_size={final}, which the ramp leads up to"
        yield Problem("data.ramp_up.start", ramp.start, reason, "choose less, or data.ramp_up=null")
    elif (final - ramp.start) % ramp.increment:
        reason = f"does not lead from {ramp.start} to data.global_batch_size={final} in whole increments"
        yield Problem("data.ramp_up.increment", ramp.increment, reason, f"choose a divisor of {final - ramp.start}")


RULES: list[Callable[..., Problems]] = [
    corpus_can_be_read,
    tokens_can_be_read,
    weights_fit_the_blend,
    preparation_is_complete,
    prepared_tokens_have_a_tokenizer,
    split_has_both_parts,
    ramp_up_reaches_the_batch_size,
]
