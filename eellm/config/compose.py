"""From YAML and overrides to a validated `Config`, and back to YAML."""

from __future__ import annotations

from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from eellm.config.commandline import CONF, composing_errors, explained, forced
from eellm.config.conversion import with_source
from eellm.config.measured_profile import with_measured_profile
from eellm.config.parse import parse
from eellm.config.request import Request
from eellm.config.saved_run import with_saved_run
from eellm.config.schema import Config
from eellm.config.validate import check
from eellm.errors import ConfigError, Problem


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

    What `device_profile.path`, `checkpoint`, `resume` and `convert.source` bring along is filled in first: ConfigError,
    CheckpointError or ConversionError where there is nothing to read.
    """
    request = Request(tuple(overrides or ()), world_size)
    task = values.get("task")
    fill = with_source if isinstance(task, dict) and task.get("name") == "convert" else with_saved_run
    values, problems = fill(with_measured_profile(values), request)
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
