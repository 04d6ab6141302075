"""Hydra composes the same options once a test process: what a test sets beside them is set in a copy of the result.

Composing takes a third of a second, copying and setting a hundredth, and the suite asks for some two thousand configs. Values
(`++key=value`, as `eellm.config.commandline.forced` writes them) are parsed and set by Hydra's own functions, in order;
`tests/config/test_composing.py` holds the outcome against Hydra's.
"""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import hydra
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig

hydra_alone = hydra.compose


def compose(config_name: str | None = None, overrides: list[str] | None = None, **options: Any) -> DictConfig:
    """In place of `hydra.compose`."""
    values = [override for override in overrides or [] if override.startswith("++")]
    parsed = OverridesParser.create().parse_overrides(values)
    if options or any(value.is_sweep_override() or value.is_hydra_override() for value in parsed):
        return hydra_alone(config_name, overrides, **options)
    chosen = tuple(override for override in overrides or [] if not override.startswith("++"))
    composed = copy.deepcopy(_composed(_searched(), config_name, chosen))
    ConfigLoaderImpl._apply_overrides_to_config(parsed, composed)
    return composed


@cache
def _composed(searched: tuple[str | None, ...], config_name: str | None, chosen: tuple[str, ...]) -> DictConfig:
    return hydra_alone(config_name, list(chosen))


def _searched() -> tuple[str | None, ...]:
    """Folders that Hydra looks for options in."""
    return tuple(element.path for element in GlobalHydra.instance().config_loader().get_search_path().get_path())
