"""Conversions as the task makes them, without its process."""

from __future__ import annotations

from pathlib import Path

from eellm.config.compose import compose
from eellm.convert.exporting import export_model
from eellm.convert.importing import import_model
from eellm.convert.sources import open_source
from eellm.data.cache import cache_root
from eellm.model.spec import ModelSpec


def imported(source: Path | str, target: Path, *overrides: str) -> ModelSpec:
    given = ["task=convert", f"convert.source={source}", f"convert.target={target}", *overrides]
    config = compose(given)
    return import_model(open_source(str(source), cache_root(config.data)), target, config, given)


def exported(source: Path, target: Path, *overrides: str) -> Path:
    given = ["task=convert", f"convert.source={source}", f"convert.target={target}", "convert.format=huggingface", *overrides]
    export_model(str(source), target, compose(given))
    return target
