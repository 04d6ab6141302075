"""The exits of a folder of `transformers`, as its config.json describes them and its files are called. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

from eellm.config.node import HeadKind
from eellm.convert.fields import Unsupported
from eellm.model.spec import ExitSpec

FIELD = "early_exits"
"""Of config.json: layer, head, tie_output and temperature of every exit."""

_TYPES: dict[str, tuple[type, ...]] = {"layer": (int,), "head": (str,), "tie_output": (bool,), "temperature": (int, float)}


def exit_fields(exits: Sequence[ExitSpec]) -> dict[str, Any]:
    return {FIELD: [asdict(exit_) for exit_ in exits]}


def described_exits(config: Mapping[str, Any]) -> list[ExitSpec]:
    """The exits that a config.json lists, in order of depth; none where it lists none. Raises Unsupported."""
    listed = config.get(FIELD) or []
    for entry in listed if isinstance(listed, list) else [listed]:
        if not isinstance(entry, dict) or entry.keys() != _TYPES.keys():
            raise Unsupported(FIELD, entry, f"an exit has {', '.join(_TYPES)}")
        for key, types in _TYPES.items():
            if not isinstance(entry[key], types) or (key != "tie_output" and isinstance(entry[key], bool)):
                raise Unsupported(f"{FIELD}.{key}", entry[key], f"must be {' or '.join(kind.__name__ for kind in types)}")
        if entry["head"] not in get_args(HeadKind):
            raise Unsupported(f"{FIELD}.head", entry["head"], f"only {', '.join(get_args(HeadKind))} can be computed")
    exits = sorted((ExitSpec(**entry) for entry in listed), key=lambda exit_: exit_.layer)
    if len({exit_.layer for exit_ in exits}) < len(exits):
        raise Unsupported(FIELD, [exit_.layer for exit_ in exits], "more than one exit after a layer")
    return exits


def exit_file(folder: Path, exit_: ExitSpec) -> Path:
    """Where an exit's weights are in a model's folder."""
    return folder / "exits" / f"{exit_.name}.safetensors"


def exit_prefix(exit_: ExitSpec) -> str:
    """What the names of an exit's tensors begin with, where they stand beside those of the backbone."""
    return f"{exit_file(Path(), exit_).as_posix()}: "
