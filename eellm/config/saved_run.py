"""What a run takes from the directory of another (`checkpoint`) or of its own past (`resume`)."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import yaml

from eellm.config.commandline import Override, prepared_groups
from eellm.config.request import (
    BEGINS_WITH_A_MODEL,
    FROM_CHECKPOINT,
    FROM_CHECKPOINT_UNLESS_GIVEN,
    READS_A_MODEL,
    Request,
    typed_value,
)
from eellm.errors import CheckpointError, Problem
from eellm.model.spec import exit_layer, per_exit
from eellm.reference import NAME, reference_run
from eellm.rundir import locate, whole_checkpoint

_MAY_CHANGE_ON_RESUME = (
    *("parallel", "schedule", "trainer", "optimizer", "lr_schedule", "loss_weights", "logger", "debug", "device_profile"),
    *("precision.initial_loss_scale", "precision.loss_scale_window"),
    *("model.attention", "exits.boundary", "exits.deferred"),
    *("data.micro_batch_size", "data.cache_dir", "data.num_workers"),
    *("task", "device", "objective", "resume", "hydra"),
)

_DECIDES_HOW_IT_GOES_ON = ("task", "seed", "loss_weights", "optimizer", "lr_schedule", "precision", "trainer")
"""What a run is resumed with, besides what every checkpoint needs. Other groups may be younger than the run: defaults will do."""

PER_EXIT = ("head", "tie_output", "temperature")
"""Keys of `exits` that have one value for all or one for each, as `ExitSpec` has them behind its layer."""

_OF_THE_MACHINE = ("cache_dir", "num_workers")
"""Keys of `data` that say nothing about the text."""


def with_saved_run(values: dict[str, Any], request: Request) -> tuple[dict[str, Any], list[Problem]]:
    """Fill in what `checkpoint` and `resume` bring along; problems name what a resumed run cannot change.

    A task that needs a trained model and is given none reads the one that comes with eellm.
    Raises CheckpointError where there is nothing whole to read.
    """
    task = values["task"].get("name") if isinstance(values.get("task"), dict) else None
    checkpoint, resume = values.get("checkpoint"), values.get("resume")
    if checkpoint == NAME or (checkpoint is None and task in READS_A_MODEL):
        checkpoint = str(reference_run())
        values = {**values, "checkpoint": checkpoint}
    if task in BEGINS_WITH_A_MODEL and isinstance(resume, str) and resume != "auto":
        return _resumed(resume, values, request)
    if _reads_checkpoint(task, values) and isinstance(checkpoint, str) and resume in (None, "auto"):
        _, whole = whole_checkpoint("checkpoint", checkpoint)
        if task == "tune":  # read again when the run is resumed, then from elsewhere perhaps
            values = {**values, "checkpoint": str(whole.absolute())}
        merges = {"train": with_warm_start, "tune": with_tuning}
        return merges.get(str(task), with_checkpoint)(values, saved_values(checkpoint), request), []
    return values, []


def _reads_checkpoint(task: str | None, values: dict[str, Any]) -> bool:
    benchmark = values.get("benchmark")
    if task == "benchmark":
        return isinstance(benchmark, dict) and benchmark.get("name") == "decoding"
    return task in (*READS_A_MODEL, *BEGINS_WITH_A_MODEL)


def with_checkpoint(values: dict[str, Any], saved: dict[str, Any], request: Request) -> dict[str, Any]:
    """Values for a task that reads a trained model: model, exits and tokenizer are the saved run's.

    So is the corpus, as far as the command line does not ask for another: numbers on other text would mislead.
    """
    merged = _with_saved_model(values, saved)
    merged["exits"] = copy.deepcopy(saved["exits"])
    merged["data"] = _with_overrides({"data": saved["data"]}, values, _about(request, "data"))["data"]
    for key in _OF_THE_MACHINE:
        merged["data"][key] = values["data"][key]
    return merged


def with_warm_start(values: dict[str, Any], saved: dict[str, Any], request: Request) -> dict[str, Any]:
    """Values for training that begins with the weights of another run: model and tokenizer are the saved run's.

    So are the exits, as far as neither the command line nor an experiment or study named there asks for others.
    """
    merged = _with_saved_model(values, saved)
    if "exits" not in prepared_groups(request.parsed):
        merged["exits"] = _with_overrides({"exits": saved["exits"]}, values, _about(request, "exits"))["exits"]
    return merged


def with_tuning(values: dict[str, Any], saved: dict[str, Any], request: Request) -> dict[str, Any]:
    """Values for tuning exits of another run's model: `exits` become those of the model that comes out of it.

    That is those asked for, or where none are those that it has, and its others; `tuning.layers` names the former.
    """
    typed = {override.key for override in request.parsed}
    prepared = "exits" in prepared_groups(request.parsed)
    # exits that are placed anew have nothing of the saved ones, whose lists have one entry for each of those
    placed = prepared or bool(typed & {"exits", "exits.layers"})
    merged = _with_saved_model(values, saved) if placed else with_warm_start(values, saved, request)
    asked, tuning = merged["exits"], merged["tuning"]
    if "exits.init" not in typed and not prepared:
        asked["init"] = "copy"
    try:
        mine = exit_columns(asked, merged["model"]["num_layers"])
        others = exit_columns(saved["exits"], merged["model"]["num_layers"])
    except (TypeError, ValueError):  # no list, or of another length: said with all that is wrong
        return merged
    if tuning["layers"] is None:
        tuning["layers"] = list(mine)
    if set(others) <= set(mine):
        return merged
    rows = sorted({**others, **mine}.items())
    asked["layers"] = [layer for layer, _ in rows]
    for column, name in enumerate(PER_EXIT):
        entries = [row[column] for _, row in rows]
        asked[name] = entries[0] if len(set(entries)) == 1 else entries
    return merged


def exit_columns(exits: dict[str, Any], num_layers: int) -> dict[int, tuple[Any, ...]]:
    """Layer of an exit -> its own values, those of `PER_EXIT`. Raises TypeError or ValueError for what are no such lists."""
    layers = [exit_layer(position, num_layers) for position in exits["layers"]]
    if len(set(layers)) < len(layers):
        raise ValueError("more than one exit after a layer")
    lists = [per_exit(exits[name], len(layers)) for name in PER_EXIT]
    return dict(zip(layers, zip(*lists, strict=True), strict=True))


def saved_values(given: str, resumed: bool = False) -> dict[str, Any]:
    """Plain values of the run that a path names, to read its model or to go on with it. Raises CheckpointError."""
    run, _ = locate(given)
    values = yaml.safe_load(run.config.read_text(encoding="utf-8"))
    needed = [*FROM_CHECKPOINT, *FROM_CHECKPOINT_UNLESS_GIVEN, "data"]
    if resumed:
        needed += _DECIDES_HOW_IT_GOES_ON
        if isinstance(values, dict) and isinstance(values.get("task"), dict) and values["task"].get("name") == "tune":
            needed.append("tuning")
    missing = [group for group in needed if not isinstance(values, dict) or group not in values]
    if missing:
        raise CheckpointError(f"{run.config} is not a run's config: it has no {', '.join(missing)}.")
    return values


def _with_saved_model(values: dict[str, Any], saved: dict[str, Any]) -> dict[str, Any]:
    merged = copy.deepcopy(values)
    for group in FROM_CHECKPOINT:
        merged[group] = copy.deepcopy(saved[group])
    if merged["model"]["max_positions"] is None:
        merged["model"]["max_positions"] = saved["data"]["sequence_length"]
    return merged


def _resumed(resume: str, values: dict[str, Any], request: Request) -> tuple[dict[str, Any], list[Problem]]:
    saved = saved_values(resume, resumed=True)
    younger = {group: value for group, value in values.items() if group not in saved}
    merged = _with_overrides({**saved, **younger}, values, request)
    problems = list(_refused_on_resume(resume, saved, merged, request))
    task, was = values["task"]["name"], (saved["task"] or {}).get("name")
    if task != was and "tune" in (task, was):
        problems.append(Problem("task", task, f"{resume} is a run of task={was}", f"task={was}"))
    return {**merged, "resume": resume}, problems


def _refused_on_resume(resume: str, saved: dict[str, Any], merged: dict[str, Any], request: Request) -> Iterator[Problem]:
    """Overrides that change what a resumed run keeps; repeating what it has is no change."""
    for override in request.parsed:
        if override.key in _MAY_CHANGE_ON_RESUME or override.group in _MAY_CHANGE_ON_RESUME:
            continue
        if override.group in saved and _at(saved, override) == _at(merged, override):
            continue
        fix = "leave it out, or start a new run"
        if override.group in ("exits", "precision"):
            fix = f"leave it out, or start a new run from these weights: task=train checkpoint={resume} {override.text}"
        yield Problem(override.key, typed_value(override), "a resumed run keeps it as it was", fix)


def _about(request: Request, group: str) -> Request:
    return Request(tuple(override.text for override in request.parsed if override.group == group))


def _path(override: Override) -> list[str]:
    return [override.group] if override.chooses_option else override.key.split(".")


def _at(values: dict[str, Any], override: Override) -> Any:
    """The value that an override is about."""
    for part in _path(override):
        values = values.get(part) if isinstance(values, dict) else None  # type: ignore[assignment]
    return values


def _with_overrides(base: dict[str, Any], composed: dict[str, Any], request: Request) -> dict[str, Any]:
    """`base` with everything that the command line names taken from the composed values."""
    merged = copy.deepcopy(base)
    for override in request.parsed:
        if override.group not in composed:
            continue
        path = _path(override)
        source, target = composed, merged
        for part in path[:-1]:
            source, target = source.get(part, {}), target.setdefault(part, {})
        if path[-1] in source:
            target[path[-1]] = copy.deepcopy(source[path[-1]])
    return merged
