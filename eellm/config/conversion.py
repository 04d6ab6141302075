"""What a conversion takes from its source: the model, and of a run also exits and tokenizer."""

from __future__ import annotations

import copy
from typing import Any

from eellm.config.commandline import experiment_groups
from eellm.config.paths import expanded
from eellm.config.request import Request
from eellm.config.saved_run import saved_values, with_checkpoint
from eellm.convert.families import family_named
from eellm.convert.fields import Unsupported
from eellm.convert.sources import open_source
from eellm.errors import Problem
from eellm.rundir import whole_checkpoint


def with_source(values: dict[str, Any], request: Request) -> tuple[dict[str, Any], list[Problem]]:
    """Fill in what `convert.source` brings along; problems name what of it cannot be converted.

    Raises CheckpointError, ConversionError or MissingExtra where there is nothing to read.
    """
    convert = values.get("convert")
    if not isinstance(convert, dict) or not isinstance(convert.get("source"), str):
        return values, []
    source = convert["source"]
    if convert["format"] == "huggingface":
        whole_checkpoint("convert.source", source)
        return with_checkpoint(values, saved_values(source), request), []
    if is_run(source):
        fix = "convert.format=huggingface; with other exits: task=train checkpoint=<run> 'exits.layers=[..]'"
        return values, [Problem("convert.source", source, "it is a run of eellm already", fix)]
    return _with_model(values, source, request)


def is_run(source: str) -> bool:
    """Whether a path names a run's directory, or a checkpoint in it."""
    path = expanded(source)
    return any((folder / "config.yaml").is_file() for folder in (path, path.parent, path.parent.parent))


def _with_model(values: dict[str, Any], source: str, request: Request) -> tuple[dict[str, Any], list[Problem]]:
    config = open_source(source, expanded(str(values["data"]["cache_dir"]))).config()
    try:
        model, unsupported = family_named(config).read(config)
    except Unsupported as problem:
        model, unsupported = {}, [problem]
    merged = copy.deepcopy(values)
    merged["model"] |= model
    asked = {override.group for override in request.parsed} | experiment_groups(request.parsed)
    if "exits" not in asked:
        merged["exits"]["layers"] = []
    if isinstance(model.get("max_positions"), int):
        merged["data"]["sequence_length"] = min(merged["data"]["sequence_length"], model["max_positions"])
    return merged, [
        Problem("convert.source", source, f"its {problem}", "convert a model without it, or of another kind")
        for problem in unsupported
    ]
