"""Rules on tuning exits behind a frozen backbone."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from eellm.config.rules.model import exit_layers
from eellm.config.schema import ExitsConfig, ModelConfig, ParallelConfig, TaskConfig, TuningConfig
from eellm.errors import Problem
from eellm.layout import equal_split
from eellm.model.spec import per_exit

Problems = Iterator[Problem]


def a_model_is_named(task: TaskConfig, checkpoint: str | None) -> Problems:
    if task.name == "tune" and checkpoint is None:
        yield Problem("checkpoint", None, "task=tune tunes exits of a trained model", "checkpoint=<run directory>, or reference")


def there_are_exits_to_tune(task: TaskConfig, model: ModelConfig, exits: ExitsConfig, tuning: TuningConfig) -> Problems:
    if task.name != "tune":
        return
    if not exits.layers:
        reason = "there is no exit to tune, and the checkpoint has none"
        yield Problem("exits.layers", [], reason, "exits.layers=[0.25,0.5]")
        return
    layers = exit_layers(model, exits)
    if tuning.layers is not None and not tuning.layers:
        yield Problem("tuning.layers", [], "there is no exit to tune", "tuning.layers=null for all that `exits` asks for")
    for layer in tuning.layers or []:
        if layer not in layers:
            yield Problem("tuning.layers", tuning.layers, f"no exit stands after layer {layer} ({layers})", "name exits' layers")


def exits_have_something_to_learn(task: TaskConfig, model: ModelConfig, exits: ExitsConfig, tuning: TuningConfig) -> Problems:
    layers = exit_layers(model, exits)
    heads, ties = per_exit(exits.head, len(layers)), per_exit(exits.tie_output, len(layers))
    if task.name != "tune" or not len(layers) == len(heads) == len(ties):
        return
    for layer, head, tied in zip(layers, heads, ties, strict=True):
        if head == "embedding" and tied and layer in tuned_layers(model, exits, tuning):
            reason = f"the exit after layer {layer} has nothing to learn: its output matrix is the model's, which is frozen"
            yield Problem("exits.head", exits.head, reason, "exits.head=norm, mlp or block, or exits.tie_output=false")


def stages_have_layers_to_run(task: TaskConfig, model: ModelConfig, exits: ExitsConfig, parallel: ParallelConfig, tuning: TuningConfig) -> Problems:
    if task.name != "tune":
        return
    stages, split = parallel.pp * parallel.vp, parallel.layers_per_stage
    depth = model.num_layers if runs_whole_model(tuning) else max(tuned_layers(model, exits, tuning), default=model.num_layers)
    below = "" if runs_whole_model(tuning) else " (nothing above the deepest exit is built)"
    if split is None:
        if depth < stages:
            reason = f"{stages} stages for the {depth} layers that run{below}"
            yield Problem("parallel.pp", parallel.pp, reason, f"at most {depth} for parallel.pp x parallel.vp")
    elif len(split) != stages or sum(split) != depth:
        reason = f"not {stages} entries that add up to the {depth} layers that run{below}"
        yield Problem("parallel.layers_per_stage", split, reason, f"parallel.layers_per_stage={equal_split(depth, stages)}, or null")


def distillation_reaches_the_exits(task: TaskConfig, parallel: ParallelConfig, tuning: TuningConfig) -> Problems:
    weight = tuning.distillation.weight
    if task.name == "tune" and weight > 0 and parallel.pp > 1:
        reason = "the final head, from which exits learn, would lie on another pipeline stage"
        yield Problem("tuning.distillation.weight", weight, reason, "parallel.pp=1 (with parallel.tp, parallel.dp), or weight 0")


def tuned_layers(model: ModelConfig, exits: ExitsConfig, tuning: TuningConfig) -> list[int]:
    """Of the exits that are tuned."""
    return exit_layers(model, exits) if tuning.layers is None else list(tuning.layers)


def runs_whole_model(tuning: TuningConfig) -> bool:
    """Whether every pass goes up to the final head."""
    return tuning.distillation.weight > 0


RULES: list[Callable[..., Problems]] = [
    a_model_is_named,
    there_are_exits_to_tune,
    exits_have_something_to_learn,
    stages_have_layers_to_run,
    distillation_reaches_the_exits,
]
