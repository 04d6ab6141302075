"""From YAML and overrides to a validated `Config`, and back to YAML."""

from __future__ import annotations

import copy
import hashlib
import json
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from eellm.config.commandline import CONF, composing_errors, explained, forced, parse_override
from eellm.config.parse import parse
from eellm.config.request import FROM_CHECKPOINT, READS_A_MODEL, Request, typed_value
from eellm.config.schema import Config
from eellm.config.validate import check
from eellm.errors import CheckpointError, ConfigError, Problem
from eellm.rundir import locate, whole_checkpoint

_MAY_CHANGE_ON_RESUME = (
    *("parallel", "schedule", "precision", "trainer", "optimizer", "lr_schedule", "loss_weights", "logger", "debug"),
    *("data.micro_batch_size", "data.cache_dir", "data.num_workers"),
    *("task", "device", "objective", "resume", "hydra"),
)


def compose(overrides: list[str] | None = None, world_size: int | None = None) -> Config:
    """The config that `python run.py <overrides>` would run with. Raises ConfigError with all problems.

    For tests and notebooks; `world_size` stands for the ranks of an outer launcher.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir

    overrides = list(overrides or [])
    if not CONF.is_dir():
        raise ConfigError([Problem("conf", CONF, "there is no such folder", "install eellm from a checkout: pip install -e .")])
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            composed = hydra_compose("config", forced(overrides))
    except composing_errors() as error:
        raise explained(error) from None
    return validated(plain(composed), overrides, world_size)


def plain(composed: DictConfig) -> dict[str, Any]:
    """Composed values as plain dicts and lists, interpolations resolved. Raises ConfigError."""
    try:
        values = OmegaConf.to_container(composed, resolve=True)
    except OmegaConfBaseException as error:
        raise explained(error) from None
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


def validated(values: dict[str, Any], overrides: list[str] | None = None, world_size: int | None = None) -> Config:
    """Plain values -> Config, or one ConfigError with every problem.

    What `checkpoint` and `resume` bring along is filled in first: CheckpointError where there is nothing to read.
    """
    request = Request(tuple(overrides or ()), world_size)
    values, problems = _with_saved_run(values, request)
    parsed = parse(values)
    problems += parsed.problems + check(parsed.groups, request)
    if problems:
        raise ConfigError(problems)
    return Config(**parsed.groups)


def to_yaml(config: Config) -> str:
    return yaml.safe_dump(config.model_dump(), sort_keys=False, allow_unicode=True)


def from_yaml(text: str) -> Config:
    """Inverse of `to_yaml`; types are checked, rules between keys are not."""
    values = yaml.safe_load(text)
    parsed = parse(values if isinstance(values, dict) else {})
    if parsed.problems:
        raise ConfigError(parsed.problems)
    return Config(**parsed.groups)


def fingerprint(config: Config) -> str:
    """Hash of what determines the trained weights, whatever the layout, the machine or the logging.

    Counts: seed, model, exits, loss weights, data (but micro-batch size, cache and loaders), tokenizer, optimizer (but how
    its states and communication are split), learning-rate schedule with its end, dtype, overfitting. Two runs with equal
    fingerprints see the same batches and take the same steps, as far as both go.
    """
    dump = config.model_dump()
    for group, keys in {
        "data": ("micro_batch_size", "cache_dir", "num_workers"),
        "optimizer": ("distributed", "overlap_grad_reduce", "overlap_param_gather"),
        "model": ("attention",),
        "exits": ("boundary", "deferred"),
    }.items():
        for key in keys:
            del dump[group][key]
    dump["lr_schedule"]["decay_steps"] = config.lr_schedule.decay_steps or config.trainer.max_steps
    groups = ("seed", "model", "exits", "loss_weights", "data", "tokenizer", "optimizer", "lr_schedule")
    counted = {**{group: dump[group] for group in groups}, "dtype": config.precision.dtype, "overfit": config.debug.overfit}
    return hashlib.blake2b(json.dumps(counted, sort_keys=True).encode(), digest_size=8).hexdigest()


def with_checkpoint(values: dict[str, Any], saved: dict[str, Any], request: Request) -> dict[str, Any]:
    """Values for a task that reads a trained model: model, exits and tokenizer are the saved run's.

    So is the corpus, as far as the command line does not ask for another: numbers on other text would mislead.
    """
    merged = copy.deepcopy(values)
    for group in FROM_CHECKPOINT:
        merged[group] = copy.deepcopy(saved[group])
    if merged["model"]["max_positions"] is None:
        merged["model"]["max_positions"] = saved["data"]["sequence_length"]
    data = Request(tuple(override.text for override in request.parsed if override.group == "data"))
    merged["data"] = _with_overrides({"data": saved["data"]}, values, data)["data"]
    return merged


def saved_values(given: str) -> dict[str, Any]:
    """Plain values of the run that a path names. Raises CheckpointError."""
    run, _ = locate(given)
    values = yaml.safe_load(run.config.read_text(encoding="utf-8"))
    missing = [group for group in (*FROM_CHECKPOINT, "data") if not isinstance(values, dict) or group not in values]
    if missing:
        raise CheckpointError(f"{run.config} is not a run's config: it has no {', '.join(missing)}.")
    return values


def _with_saved_run(values: dict[str, Any], request: Request) -> tuple[dict[str, Any], list[Problem]]:
    task = values["task"].get("name") if isinstance(values.get("task"), dict) else None
    checkpoint, resume = values.get("checkpoint"), values.get("resume")
    if task in READS_A_MODEL and isinstance(checkpoint, str) and resume is None:
        whole_checkpoint("checkpoint", checkpoint)
        return with_checkpoint(values, saved_values(checkpoint), request), []
    if task == "train" and isinstance(resume, str) and resume != "auto" and checkpoint is None:
        merged = _with_overrides(saved_values(resume), values, request)
        return {**merged, "resume": resume}, list(_refused_on_resume(request))
    return values, []


def _refused_on_resume(request: Request) -> list[Problem]:
    problems = []
    for override in request.parsed:
        if override.key not in _MAY_CHANGE_ON_RESUME and override.group not in _MAY_CHANGE_ON_RESUME:
            reason = "a resumed run keeps it as it was"
            problems.append(Problem(override.key, typed_value(override), reason, "leave it out, or start a new run"))
    return problems


def _with_overrides(base: dict[str, Any], composed: dict[str, Any], request: Request) -> dict[str, Any]:
    """`base` with everything that the command line names taken from the composed values."""
    merged = copy.deepcopy(base)
    for text in request.overrides:
        override = parse_override(text)
        if override is None or override.group not in composed:
            continue
        path = [override.group] if override.chooses_option else override.key.split(".")
        source, target = composed, merged
        for part in path[:-1]:
            source, target = source.get(part, {}), target.setdefault(part, {})
        if path[-1] in source:
            target[path[-1]] = copy.deepcopy(source[path[-1]])
    return merged
