"""Rules on tuning exits behind a frozen backbone."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from eellm.config.request import tunes
from eellm.config.rules.model import exit_layers
from eellm.config.schema import BenchmarkConfig, ExitsConfig, ModelConfig, ParallelConfig, TaskConfig, TuningConfig
from eellm.errors import Problem
from eellm.layout import equal_split
from eellm.model.spec import per_exit

Problems = Iterator[Problem]


def a_model_is_named(task: TaskConfig, checkpoint: str | None, resume: str | None) -> Problems:
    if task.name == "tune" and checkpoint is None and resume in (None, "auto"):
        fix = "checkpoint=<run directory>, or checkpoint=reference"
        yield Problem("checkpoint", None, "task=tune tunes exits of a trained model", fix)


def there_are_exits_to_tune(task: TaskConfig, model: ModelConfig, exits: ExitsConfig, tuning: TuningConfig) -> Problems:
    if task.name != "tune":
        return
    if not exits.layers:
        yield Problem("exits.layers", [], "there is no exit to tune, and the checkpoint has none", "exits.layers=[0.25,0.5]")
    elif tuning.layers == []:
        yield Problem("tuning.layers", [], "there is no exit to tune", "tuning.layers=null for all that `exits` asks for")
    for layer in tuning.layers or [] if exits.layers else []:
        layers = exit_layers(model, exits)
        if layer not in layers:
            yield Problem("tuning.layers", tuning.layers, f"no exit stands after layer {layer} ({layers})", "name exits' layers")


def exits_have_something_to_learn(
    task: TaskConfig, benchmark: BenchmarkConfig, model: ModelConfig, exits: ExitsConfig, tuning: TuningConfig
) -> Problems:
    layers = exit_layers(model, exits)
    heads, ties = per_exit(exits.head, len(layers)), per_exit(exits.tie_output, len(layers))
    if not tunes(task, benchmark) or not len(layers) == len(heads) == len(ties):
        return
    for layer, head, tied in zip(layers, heads, ties, strict=True):
        if head == "embedding" and tied and (tuning.layers is None or layer in tuning.layers):
            reason = f"the exit after layer {layer} has nothing to learn: its output matrix is the model's, which is frozen"
            yield Problem("exits.head", exits.head, reason, "exits.head=norm, mlp or block, or exits.tie_output=false")


def layers_that_run_fill_the_stages(
    task: TaskConfig,
    benchmark: BenchmarkConfig,
    model: ModelConfig,
    exits: ExitsConfig,
    parallel: ParallelConfig,
    tuning: TuningConfig,
) -> Problems:
    if not tunes(task, benchmark):
        return
    stages, split = parallel.pp * parallel.vp, parallel.layers_per_stage
    depth, running = model.num_layers, "layers of the model"
    if not tuning.runs_whole_model:
        depth = max(tuning.layers or exit_layers(model, exits), default=depth)
        running = "layers up to the deepest exit, above which nothing is built"
    if not isinstance(split, list) and depth < stages:
        reason = f"parallel.pp x parallel.vp = {stages} stages for the {depth} {running}"
        yield Problem("parallel.pp", parallel.pp, reason, f"at most {depth} stages")
    if isinstance(split, list) and (len(split) != stages or sum(split) != depth):
        reason = f"not {stages} entries that add up to the {depth} {running}"
        fix = f"parallel.layers_per_stage={equal_split(depth, stages)}".replace(" ", "") if depth >= stages else "fewer stages"
        yield Problem("parallel.layers_per_stage", split, reason, f"{fix}, or null")


def hidden_states_suffice(task: TaskConfig, tuning: TuningConfig) -> Problems:
    if task.name == "tune" and tuning.hidden_cache is not None and tuning.runs_whole_model:
        reason = "hidden states at exits do not say what the final head does (tuning.distillation.weight > 0)"
        yield Problem("tuning.hidden_cache", tuning.hidden_cache, reason, "null, or tuning.distillation.weight=0")


RULES: list[Callable[..., Problems]] = [
    a_model_is_named,
    there_are_exits_to_tune,
    exits_have_something_to_learn,
    layers_that_run_fill_the_stages,
    hidden_states_suffice,
]
