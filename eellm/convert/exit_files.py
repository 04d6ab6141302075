"""Exits in a folder of `transformers`: a file of weights each, their kinds in config.json, and the code that runs them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from eellm.convert.exit_fields import exit_fields, exit_file, exit_prefix
from eellm.convert.families import Family, family_named
from eellm.convert.ledger import Ledger
from eellm.convert.safetensors_files import Announced, read_file, write_file
from eellm.convert.weights import Link, exit_links
from eellm.data.cache import write_atomically
from eellm.errors import writing
from eellm.mcore.whole_tensors import LazyTensor
from eellm.model.spec import ExitSpec, ModelSpec

CODE = Path(__file__).with_name("modeling_early_exit.py")
"""Travels with every model that has exits; it is not imported here."""


def export_exits(folder: Path, spec: ModelSpec, tensors: Mapping[str, LazyTensor]) -> None:
    """Add a model's exits to a folder that has its backbone already; `tensors` are theirs and nothing else's.

    Raises ConversionError unless each is used once, WriteError.
    """
    described = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    family = family_named(described)
    ledger = Ledger(tensors, "the checkpoint")
    taken = {
        exit_: [(link, ledger.take(link.ours, link.shape)) for link in exit_links(family, spec, exit_)] for exit_ in spec.exits
    }
    for link, tensor in (pair for pairs in taken.values() for pair in pairs):
        ledger.make(link.ours, tensor)
    ledger.settle(tensors)
    if not spec.exits:
        return
    for exit_, pairs in taken.items():
        _write(exit_file(folder, exit_), pairs)
    with writing(folder / CODE.name):
        shutil.copyfile(CODE, folder / CODE.name)
    described |= exit_fields(spec.exits)
    described["auto_map"] = {"AutoModelForCausalLM": f"{CODE.stem}.EarlyExitForCausalLM"}
    write_atomically(folder / "config.json", json.dumps(described, indent=2) + "\n")


def read_exits(folder: Path, exits: Sequence[ExitSpec]) -> dict[str, LazyTensor]:
    """What the files of a folder's exits hold, under `exit_prefix` and their names there. Raises ConversionError."""
    return {exit_prefix(exit_) + name: tensor for exit_ in exits for name, tensor in read_file(exit_file(folder, exit_)).items()}


def prefixed_links(family: Family, spec: ModelSpec) -> list[Link]:
    """One link for each parameter of the exits, to what `read_exits` gives."""
    return [
        replace(link, theirs=tuple(exit_prefix(exit_) + name for name in link.theirs))
        for exit_ in spec.exits
        for link in exit_links(family, spec, exit_)
    ]


def _write(path: Path, pairs: list[tuple[Link, LazyTensor]]) -> None:
    announced: dict[str, Announced] = {
        name: (shape, tensor.dtype) for link, tensor in pairs for name, shape in zip(link.theirs, link.shapes, strict=True)
    }
    with writing(path):
        path.parent.mkdir(exist_ok=True)
    write_file(path, announced, _split(pairs))


def _split(pairs: list[tuple[Link, LazyTensor]]) -> Iterator[torch.Tensor]:
    for link, tensor in pairs:
        yield from link.split(tensor.read())
