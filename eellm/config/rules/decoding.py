"""Rules on evaluation and decoding."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator

from eellm.config.request import Request, measures_decoding
from eellm.config.rules.model import exit_layers
from eellm.config.schema import (
    BenchmarkConfig,
    DecodingConfig,
    EvaluationConfig,
    ExitPolicyConfig,
    ExitsConfig,
    ModelConfig,
    ParallelConfig,
    TaskConfig,
)
from eellm.errors import Problem
from eellm.model.spec import per_exit

Problems = Iterator[Problem]

_ONE_STAGE = "there is one pipeline stage (parallel.pp=1)"


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


def decoding_runs_on_one_replica(
    task: TaskConfig,
    benchmark: BenchmarkConfig,
    evaluation: EvaluationConfig,
    decoding: DecodingConfig,
    parallel: ParallelConfig,
    request: Request,
) -> Problems:
    over_stages = _compares_over_stages(task, evaluation, decoding)
    if task.name not in ("generate", "serve") and not over_stages and not measures_decoding(task, benchmark):
        return
    for key, size in (("vp", parallel.vp), ("dp", request.data_parallel(parallel) or 1)):
        if size > 1:
            over = "data-parallel ranks" if key == "dp" else "several model chunks a rank"
            yield Problem(f"parallel.{key}", size, f"decoding over {over} is not available yet", f"parallel.{key}=1")
    if parallel.sequence_parallel and parallel.tp > 1:
        reason = "a decoded token has no sequence to split"
        yield Problem("parallel.sequence_parallel", True, reason, "parallel.sequence_parallel=false")


def quickstart_decodes_on_one_rank(task: TaskConfig, evaluation: EvaluationConfig, decoding: DecodingConfig) -> Problems:
    if task.name != "quickstart":
        return
    reason = "task=quickstart decodes on one rank"
    if decoding.mode == "pipeline":
        yield Problem("decoding.mode", "pipeline", reason, "decoding=catch_up")
    if "pipeline" in (evaluation.decodings or []):
        yield Problem("evaluation.decodings", evaluation.decodings, reason, "catch_up in place of pipeline")


def _compares_over_stages(task: TaskConfig, evaluation: EvaluationConfig, decoding: DecodingConfig) -> bool:
    return task.name == "evaluate" and "pipeline" in evaluation.compared_modes(decoding.mode)


def compared_modes_suit_the_stages(
    task: TaskConfig, evaluation: EvaluationConfig, decoding: DecodingConfig, parallel: ParallelConfig
) -> Problems:
    if not _compares_over_stages(task, evaluation, decoding):
        return
    modes, given = evaluation.compared_modes(decoding.mode), evaluation.decodings
    path, value = ("decoding.mode", decoding.mode) if given is None else ("evaluation.decodings", given)
    if evaluation.name == "lm_eval":
        reason = "tasks of lm-evaluation-harness are answered on one rank"
        yield Problem(path, value, reason, "catch_up in place of pipeline, which makes the same tokens")
    elif parallel.pp == 1:
        yield Problem(path, value, _ONE_STAGE, "parallel=pp2, or catch_up in place of pipeline, which makes the same tokens")
    elif set(modes) != {"pipeline"}:
        reason = "pipeline decodes over the stages, the other modes on one rank: there is no common full depth"
        yield Problem(path, value, reason, "evaluation.decodings=[pipeline], or leave pipeline out")


def the_mode_suits_the_stages(task: TaskConfig, decoding: DecodingConfig, parallel: ParallelConfig) -> Problems:
    mode, pp = decoding.mode, parallel.pp
    if task.name in ("generate", "serve") and mode == "pipeline" and pp == 1:
        yield Problem("decoding.mode", mode, _ONE_STAGE, "parallel=pp2, or decoding=catch_up")
    elif task.name in ("generate", "serve") and mode not in ("pipeline", "full") and pp > 1:
        reason = f"needs the whole model on one stage (parallel.pp={pp})"
        yield Problem("decoding.mode", mode, reason, "decoding=pipeline or decoding=full, or parallel.pp=1")


def thresholds_are_given(evaluation: EvaluationConfig) -> Problems:
    if not evaluation.thresholds:
        yield Problem("evaluation.thresholds", [], "the trade-off table has no rows", "evaluation.thresholds=[0.5,0.8]")


def new_tokens_fit(decoding: DecodingConfig) -> Problems:
    if decoding.max_tokens is not None and decoding.max_tokens < decoding.max_new_tokens:
        reason = f"no room for decoding.max_new_tokens={decoding.max_new_tokens}, not to speak of a prompt"
        yield Problem("decoding.max_tokens", decoding.max_tokens, reason, "a larger one, or null for what the prompts need")


def there_are_tokens_to_time(
    task: TaskConfig, benchmark: BenchmarkConfig, evaluation: EvaluationConfig, decoding: DecodingConfig
) -> Problems:
    compares = task.name == "evaluate" and evaluation.compared_modes(decoding.mode)
    times = task.name == "quickstart" or compares or measures_decoding(task, benchmark)
    if times and decoding.max_new_tokens == 1:
        reason = "the first token comes with its prompt and is not timed"
        yield Problem("decoding.max_new_tokens", 1, reason, "at least 2, or the default")


def a_benchmark_times_what_the_stages_run(task: TaskConfig, benchmark: BenchmarkConfig, parallel: ParallelConfig) -> Problems:
    if measures_decoding(task, benchmark) and parallel.pp == 1 and "pipeline" in benchmark.decodings:
        fix = "leave pipeline out, or time it with parallel=pp2"
        yield Problem("benchmark.decodings", benchmark.decodings, _ONE_STAGE, fix)


def a_timed_pipeline_has_exits(
    task: TaskConfig,
    benchmark: BenchmarkConfig,
    parallel: ParallelConfig,
    model: ModelConfig,
    exits: ExitsConfig,
    exit_policy: ExitPolicyConfig,
) -> Problems:
    if not measures_decoding(task, benchmark) or parallel.pp == 1:
        return
    layers, reason = exit_layers(model, exits), "without exits the pipeline is full depth, which it is timed against"
    if not layers:
        yield Problem("exits.layers", layers, reason, "a model with exits, or parallel.pp=1")
    elif exit_policy.kind == "never":
        yield Problem("exit_policy.kind", "never", reason, "another exit_policy, or parallel.pp=1")
    elif exit_policy.active == []:
        yield Problem("exit_policy.active", [], reason, f"choose from {layers}, null for all, or parallel.pp=1")


def a_compared_pipeline_has_exits(
    task: TaskConfig, evaluation: EvaluationConfig, decoding: DecodingConfig, exit_policy: ExitPolicyConfig
) -> Problems:
    if not _compares_over_stages(task, evaluation, decoding):
        return
    reason = "without exits the pipeline is full depth, which it is compared with"
    if exit_policy.kind == "never":
        yield Problem("exit_policy.kind", "never", reason, "another exit_policy, or evaluation.decodings=[]")
    elif exit_policy.active == []:
        yield Problem("exit_policy.active", [], reason, "null for all exits, or evaluation.decodings=[]")


def drafts_have_exits(exit_policy: ExitPolicyConfig, decoding: DecodingConfig, task: TaskConfig) -> Problems:
    if task.name in ("generate", "serve") and decoding.mode == "self_speculative" and exit_policy.kind == "never":
        reason = "decoding.mode=self_speculative drafts with exits"
        yield Problem("exit_policy.kind", "never", reason, "another exit_policy, or decoding=full")


def a_compiler_is_there(decoding: DecodingConfig, device: str) -> Problems:
    compilers = [os.environ["CXX"]] if "CXX" in os.environ else ["g++", "clang++"]
    if decoding.compile and device != "cuda" and not any(map(shutil.which, compilers)):
        reason = f"steps become C++ on the CPU, and there is no {' or '.join(compilers)}"
        yield Problem("decoding.compile", True, reason, "install g++, name one in the environment variable CXX, or leave it out")


def prompts_are_given(task: TaskConfig, decoding: DecodingConfig) -> Problems:
    if task.name in ("generate", "quickstart") and not decoding.prompts:
        yield Problem("decoding.prompts", [], "nothing to continue", "'decoding.prompts=[\"import \"]'")


RULES: list[Callable[..., Problems]] = [
    policy_fits_the_exits,
    thresholds_lie_in_range,
    decoding_runs_on_one_replica,
    quickstart_decodes_on_one_rank,
    compared_modes_suit_the_stages,
    the_mode_suits_the_stages,
    thresholds_are_given,
    new_tokens_fit,
    there_are_tokens_to_time,
    a_benchmark_times_what_the_stages_run,
    a_timed_pipeline_has_exits,
    a_compared_pipeline_has_exits,
    drafts_have_exits,
    a_compiler_is_there,
    prompts_are_given,
]
