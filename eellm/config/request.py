"""What was asked for on the command line, and which of it a task or a choice really reads.

A value from an experiment file may go unread (the same file serves several tasks); one typed on the command line may not.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from eellm.config.commandline import Override, parse_override
from eellm.config.schema import BenchmarkConfig, Config, ParallelConfig, TaskConfig
from eellm.errors import Problem

FROM_CHECKPOINT = ("model", "tokenizer")
"""Groups that `checkpoint=` brings along."""

FROM_CHECKPOINT_UNLESS_GIVEN = ("exits",)
"""Groups that it brings along too, but training may ask for others."""

READS_A_MODEL = ("evaluate", "calibrate", "generate", "serve")
"""Tasks that need a trained model."""

BEGINS_WITH_A_MODEL = ("train", "tune")
"""Tasks that change a model, and whose runs can be resumed."""

_ALWAYS = ("task", "experiment", "study", "machine", "hydra", "name", "seed", "device", "objective", "checkpoint", "resume")
_TRAINING: tuple[str, ...] = (
    *("model", "exits", "loss_weights", "parallel", "schedule", "data", "tokenizer"),
    *("optimizer", "lr_schedule", "precision", "trainer", "logger", "debug", "device_profile"),
)

TASK_READS: dict[str, tuple[str, ...]] = {
    "quickstart": (*_TRAINING, "evaluation", "decoding", "exit_policy"),
    "train": _TRAINING,
    "evaluate": (
        *("data", "parallel", "precision", "evaluation", "logger", "trainer.loss_chunk"),
        *("decoding", "exit_policy"),
    ),
    "calibrate": (
        *("data", "parallel", "precision", "calibration", "logger", "trainer.loss_chunk"),
        "exit_policy",
    ),
    "generate": ("parallel", "precision", "decoding", "exit_policy", "logger"),
    "benchmark": (
        *("model", "exits", "loss_weights", "parallel", "schedule", "tokenizer", "precision", "benchmark", "logger"),
        *("data.sequence_length", "data.micro_batch_size", "data.global_batch_size"),
        *("trainer.recompute", "trainer.loss_chunk", "optimizer", "device_profile"),
        *("decoding.max_new_tokens", "decoding.max_pending", "decoding.draft_length", "decoding.compile", "exit_policy"),
    ),
    "tune": (
        *("exits", "loss_weights", "parallel", "data", "optimizer", "lr_schedule", "precision", "trainer", "tuning"),
        "device_profile",
        *("evaluation.batches", "evaluation.thresholds", "evaluation.calibration_bins", "logger", "debug"),
    ),
    "prepare_data": ("prepare", "data", "tokenizer"),
    "serve": ("parallel", "precision", "decoding", "exit_policy", "serve", "logger"),
    "convert": ("convert", "exits", "model.vocab_multiple", "data.cache_dir"),
    "plan": (*_TRAINING, "plan", "tuning"),
    "report": ("report",),
}
"""Groups, or single keys of a group, that a task reads."""

_BATCHES = ("split", "sequence_length", "micro_batch_size", "global_batch_size", "ramp_up", "document_boundaries", "num_workers")

_PROMPTS = ("decoding.prompts", "decoding.stop")
_GENERATION = tuple(f"decoding.{key}" for key in ("stop_at_eos", "max_tokens"))
_STEP_BENCHMARKS = (
    *("model.attention", "loss_weights", "trainer.loss_chunk", "data.micro_batch_size", "data.global_batch_size"),
)
_WHOLE_STEPS = ("schedule", "trainer.recompute", "exits.deferred")
_BACKWARD_THROUGH_LAYERS = (
    *("loss_weights.final", "exits.deferred", "trainer.recompute"),
    *("optimizer.overlap_grad_reduce", "optimizer.overlap_param_gather"),
)
_ON_HELD_OUT_TEXT = ("data", *(f"evaluation.{key}" for key in ("batches", "speed_thresholds", "calibration_bins")))
_ON_TASKS = tuple(f"evaluation.{key}" for key in ("tasks", "include_path", "limit", "num_fewshot", "batch_size", "bootstrap"))
_DECODING_BENCHMARK = ("decoding", "exit_policy", "benchmark.decodings", "benchmark.thresholds", "benchmark.batches")

READ_WITH: tuple[tuple[tuple[str, ...], str, tuple[str, ...]], ...] = (
    (
        tuple(f"data.{key}" for key in _BATCHES),
        "task.name",
        ("quickstart", "train", "tune", "evaluate", "calibrate", "benchmark", "plan"),
    ),
    (_BACKWARD_THROUGH_LAYERS, "task.name", ("quickstart", "train", "benchmark", "plan")),
    (_STEP_BENCHMARKS, "benchmark.name", ("training", "tuning", "planner")),
    (_WHOLE_STEPS, "benchmark.name", ("training", "planner")),
    (("benchmark.in_flight",), "benchmark.name", ("training",)),
    (("optimizer",), "benchmark.name", ("planner",)),
    (_DECODING_BENCHMARK, "benchmark.name", ("decoding",)),
    (_ON_HELD_OUT_TEXT, "evaluation.name", ("exits",)),
    (_ON_TASKS, "evaluation.name", ("lm_eval",)),
    (("loss_weights.initial", "loss_weights.shape"), "loss_weights.kind", ("warmup", "cooldown")),
    (("loss_weights.steps",), "loss_weights.kind", ("warmup", "cooldown", "rotating")),
    (("schedule.path",), "schedule.name", ("csv",)),
    (("optimizer.momentum",), "optimizer.name", ("sgd",)),
    (("optimizer.beta1", "optimizer.beta2", "optimizer.eps"), "optimizer.name", ("adam",)),
    (("tokenizer.path", "tokenizer.end_of_document"), "tokenizer.kind", ("file",)),
    (("tokenizer.vocab_size", "tokenizer.train_megabytes"), "tokenizer.kind", ("byte_bpe",)),
    (("tokenizer.vocab_size", "tokenizer.train_megabytes"), "data.source", ("stdlib", "text", "jsonl", "huggingface")),
    (("data.path",), "data.source", ("text", "jsonl", "chats", "huggingface", "megatron")),
    (("data.include_tests",), "data.source", ("stdlib",)),
    (("data.pattern",), "data.source", ("text", "jsonl", "chats")),
    (("data.text_field",), "data.source", ("jsonl", "chats", "huggingface")),
    (("data.subset", "data.hf_split"), "data.source", ("huggingface",)),
    (("data.weights", "data.validation_path"), "data.source", ("megatron",)),
    (("data.ramp_up",), "task.name", ("quickstart", "train", "tune")),
    (("precision.initial_loss_scale", "precision.loss_scale_window"), "precision.dtype", ("fp16",)),
    (("lr_schedule.min_ratio", "lr_schedule.decay_steps"), "lr_schedule.kind", ("cosine", "linear", "inverse_sqrt")),
    (("model.rotary_fraction", "model.rotary_base", "model.rotary_scaling"), "model.position", ("rotary",)),
    (("convert.move",), "convert.format", ("eellm",)),
    (("decoding.max_pending",), "decoding.mode", ("catch_up", "kv_recompute")),
    (("decoding.draft_length",), "decoding.mode", ("self_speculative",)),
    (_PROMPTS, "task.name", ("quickstart", "generate")),
    (_GENERATION, "task.name", ("quickstart", "generate", "serve")),
    (("decoding.max_batch",), "task.name", ("quickstart", "generate", "serve", "evaluate")),
    (("exit_policy.threshold",), "task.name", ("quickstart", "generate", "serve", "benchmark")),
    (("exit_policy.min_new_tokens",), "task.name", ("quickstart", "evaluate", "generate", "serve", "benchmark")),
    (("exit_policy.calibration",), "task.name", ("generate", "serve")),
    (("exit_policy.calibration",), "exit_policy.kind", ("max_probability",)),
    (("exit_policy.layer",), "exit_policy.kind", ("fixed_layer",)),
    (("exit_policy.threshold",), "exit_policy.kind", ("max_probability", "margin", "entropy", "patience")),
)
"""(keys, the choice they belong to, the options that read them). See `_chosen` for choices that are made elsewhere."""


@dataclass(frozen=True)
class Request:
    """`overrides` as typed; `world_size` counts the ranks that an outer launcher started (None: there is none)."""

    overrides: tuple[str, ...] = ()
    world_size: int | None = None

    @property
    def parsed(self) -> list[Override]:
        return [override for override in map(parse_override, self.overrides) if override is not None]

    def data_parallel(self, parallel: ParallelConfig) -> int | None:
        """Data-parallel size: as given, or what is left of the ranks; None where they do not divide."""
        if parallel.dp is not None:
            return parallel.dp
        if self.world_size is None:
            return 1
        left, rest = divmod(self.world_size, parallel.tp * parallel.pp)
        return None if rest or not left else left


def unread_overrides(task: str, request: Request) -> Iterator[Problem]:
    """Overrides of groups that the task never reads."""
    reads = TASK_READS[task]
    for override in request.parsed:
        known = override.group in Config.model_fields and override.group not in _ALWAYS
        if not known or override.group in groups_from_checkpoint(task):
            continue
        if not any(_covers(read, override.key) for read in reads):
            tasks = [name for name, groups in TASK_READS.items() if any(_covers(read, override.key) for read in groups)]
            reason = f"task={task} never reads it"
            yield Problem(override.key, typed_value(override), reason, f"leave it out, or choose task={' or '.join(tasks)}")


def groups_from_checkpoint(task: str) -> tuple[str, ...]:
    """Groups that a task that reads a checkpoint takes from it, whatever the command line says."""
    if task in BEGINS_WITH_A_MODEL:
        return FROM_CHECKPOINT
    return (*FROM_CHECKPOINT, *FROM_CHECKPOINT_UNLESS_GIVEN) if task in (*READS_A_MODEL, "benchmark") else ()


def checkpoint_overrides(task: str, request: Request) -> Iterator[Problem]:
    """Overrides of what the checkpoint brings along."""
    for override in request.parsed:
        if override.group in groups_from_checkpoint(task):
            reason = f"`{override.group}` comes from the checkpoint"
            yield Problem(override.key, typed_value(override), reason, "leave it out")


def unread_with_the_choice(groups: dict[str, Any], request: Request) -> Iterator[Problem]:
    """Overrides of keys that belong to another option than the one chosen."""
    for keys, choice, options in READ_WITH:
        chosen = _chosen(groups, choice)
        for override in request.parsed:
            if any(_covers(key, override.key) for key in keys) and _unread(chosen, options):
                fix = f"leave it out, or choose {choice}={' or '.join(options)}"
                yield Problem(override.key, typed_value(override), f"{choice}={','.join(chosen)} never reads it", fix)


def read_values(config: Config) -> dict[str, Any]:
    """Dotted key -> value of all that a run reads, without what its task and its choices leave unread, and without where its
    metrics go. The keys are Hydra's."""
    task, groups = config.task.name, {name: getattr(config, name) for name in Config.model_fields}
    reads = {*_ALWAYS, *TASK_READS[task], *groups_from_checkpoint(task)} - {"logger"}
    unread = [key for keys, choice, options in READ_WITH if _unread(_chosen(groups, choice), options) for key in keys]
    values = config.flat().items()
    return {
        key: value
        for key, value in values
        if any(_covers(read, key) for read in reads) and not any(_covers(name, key) for name in unread)
    }


def _unread(chosen: list[str], options: tuple[str, ...]) -> bool:
    """Whether what belongs to some options is never read with those chosen."""
    return bool(chosen) and not set(chosen) & set(options)


def _chosen(groups: dict[str, Any], choice: str) -> list[str]:
    """The options in force: several where decodings are compared, none where the choice does not matter."""
    group, _, name = choice.partition(".")
    value, task = getattr(groups.get(group), name, None), getattr(groups.get("task"), "name", None)
    if value is None or (group == "benchmark" and task != "benchmark") or (group == "evaluation" and task != "evaluate"):
        return []
    if choice == "decoding.mode" and task == "serve" and "serve" in groups:
        return list(groups["serve"].decodings or ())
    if choice == "decoding.mode" and task == "benchmark" and "benchmark" in groups:
        return list(groups["benchmark"].decodings)
    if choice == "decoding.mode" and task in ("quickstart", "evaluate") and "evaluation" in groups:
        compared = list(groups["evaluation"].compared_modes(value))
        return compared if task == "evaluate" else [value, *compared]
    return [value]


def trains_all_layers(task: TaskConfig, benchmark: BenchmarkConfig) -> bool:
    """Whether microbatches are run forward and backward by the schedule."""
    return task.name in ("quickstart", "train") or (task.name == "benchmark" and benchmark.name in ("training", "planner"))


def measures_decoding(task: TaskConfig, benchmark: BenchmarkConfig) -> bool:
    return task.name == "benchmark" and benchmark.name == "decoding"


def tunes(task: TaskConfig, benchmark: BenchmarkConfig) -> bool:
    """Whether exits are trained alone, behind a frozen backbone."""
    return task.name == "tune" or (task.name == "benchmark" and benchmark.name == "tuning")


def typed_value(override: Override) -> str:
    return override.text.partition("=")[2]


def _covers(read: str, key: str) -> bool:
    return key == read or key.startswith((f"{read}.", f"{read}/", f"{read}@"))
