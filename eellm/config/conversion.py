"""What a conversion takes from its source: the model, and of a run also exits and tokenizer."""

from __future__ import annotations

import copy
from typing import Any

from eellm.config.commandline import prepared_groups
from eellm.config.paths import expanded
from eellm.config.request import Request
from eellm.config.saved_run import PER_EXIT, exit_columns, saved_values, with_checkpoint
from eellm.convert.exit_fields import described_exits
from eellm.convert.exit_origins import edit_problems, moved
from eellm.convert.families import family_named
from eellm.convert.fields import Unsupported
from eellm.convert.sources import open_source
from eellm.errors import Problem
from eellm.model.spec import ExitSpec, exit_layer
from eellm.rundir import whole_checkpoint


def with_source(values: dict[str, Any], request: Request) -> tuple[dict[str, Any], list[Problem]]:
    """Fill in what `convert.source` brings along; problems name what of it cannot be converted.

    Raises CheckpointError, ConversionError or MissingExtra where there is nothing to read.
    """
    convert = values.get("convert")
    if not isinstance(convert, dict) or not isinstance(convert.get("source"), str):
        return values, []
    source = convert["source"]
    if convert["format"] != "huggingface" and not is_run(source):
        return _with_model(values, source, request)
    whole_checkpoint("convert.source", source)
    saved = saved_values(source)
    merged = with_checkpoint(values, saved, request)
    if convert["format"] == "huggingface":
        return merged, []
    return _with_edited_exits({**merged, "exits": values["exits"]}, saved["exits"], request)


def is_run(source: str) -> bool:
    """Whether a path names a run's directory, or a checkpoint in it; a model that was exported into one is none."""
    path = expanded(source)
    return not (path / "config.json").is_file() and any(
        (folder / "config.yaml").is_file() for folder in (path, path.parent, path.parent.parent)
    )


def exits_of(exits: dict[str, Any], num_layers: int) -> list[ExitSpec]:
    """Exits of plain values. Raises TypeError or ValueError where lists are of another length."""
    return [ExitSpec(layer, *own) for layer, own in exit_columns(exits, num_layers).items()]


def _with_model(values: dict[str, Any], source: str, request: Request) -> tuple[dict[str, Any], list[Problem]]:
    config = open_source(source, expanded(str(values["data"]["cache_dir"]))).config()
    model: dict[str, Any] = {}
    exits: list[ExitSpec] = []
    try:
        model, unsupported = family_named(config).read(config)
        exits = described_exits(config)
    except Unsupported as problem:
        unsupported = [problem]
    merged = copy.deepcopy(values)
    merged["model"] |= model
    if isinstance(model.get("max_positions"), int):
        merged["data"]["sequence_length"] = min(merged["data"]["sequence_length"], model["max_positions"])
    before = {"layers": [exit_.layer for exit_ in exits]}
    before |= {name: [getattr(exit_, name) for exit_ in exits] for name in PER_EXIT}
    merged, lost = _with_edited_exits(merged, before, request)
    return merged, lost + [
        Problem("convert.source", source, f"its {problem}", "convert a model without it, or of another kind")
        for problem in unsupported
    ]


def _with_edited_exits(values: dict[str, Any], before: dict[str, Any], request: Request) -> tuple[dict[str, Any], list[Problem]]:
    """`exits` become those of the model that comes out, `before` being the source's; problems name weights that would be lost."""
    depth, asked = values["model"]["num_layers"], values["exits"]
    try:
        moves = {int(source): int(target) for source, target in (values["convert"]["move"] or {}).items()}
    except (AttributeError, TypeError, ValueError):  # no layers: said with all that is wrong
        moves = {}
    there, after = exits_of(before, depth), []
    try:
        asked = _edited(asked, before, moves, request, depth)
        after = exits_of(asked, depth)
    except (TypeError, ValueError):  # no list, or of another length: likewise
        return {**values, "exits": asked}, []
    return {**values, "exits": asked}, list(edit_problems(there, after, moves, asked["init"]))


def _edited(asked: dict[str, Any], before: dict[str, Any], moves: dict[int, int], request: Request, depth: int) -> dict[str, Any]:
    """What the command line says about exits, and for the rest what they have; those that are new have the options' defaults.

    An option or an experiment that places exits anew says all about them.
    """
    typed = {override.key for override in request.parsed if override.group == "exits"}
    there = exits_of(before, depth)
    if "exits" in typed or "exits" in prepared_groups(request.parsed) or (typed and not there):
        return asked
    old = {exit_.layer: exit_ for exit_ in moved(there, moves)}
    placed = list(old) if moves else before["layers"]
    edited = {**asked, **{key: before[key] for key in before if f"exits.{key}" not in typed}}
    edited["layers"] = asked["layers"] if "exits.layers" in typed else placed
    for name in PER_EXIT:
        if f"exits.{name}" not in typed:
            layers = [exit_layer(position, depth) for position in edited["layers"]]
            own = [getattr(old[layer], name) if layer in old else asked[name] for layer in layers]
            edited[name] = own if len(set(own)) > 1 else next(iter(own), asked[name])
    return edited
