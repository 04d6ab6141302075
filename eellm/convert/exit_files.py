"""Exits in a folder of `transformers`: a file of weights each, their kinds in config.json, and the code that runs them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path

import torch

from eellm.convert.families import family_named
from eellm.convert.ledger import Ledger
from eellm.convert.safetensors_files import Announced, write_file
from eellm.convert.weights import Link, exit_links
from eellm.data.cache import write_atomically
from eellm.errors import writing
from eellm.mcore.whole_tensors import LazyTensor
from eellm.model.spec import ExitSpec, ModelSpec

CODE = Path(__file__).with_name("modeling_early_exit.py")
"""Travels with every model that has exits; it is not imported here."""

FIELD = "early_exits"
"""Of config.json: layer, head, tie_output and temperature of every exit."""


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
    described[FIELD] = [asdict(exit_) for exit_ in spec.exits]
    described["auto_map"] = {"AutoModelForCausalLM": f"{CODE.stem}.EarlyExitForCausalLM"}
    write_atomically(folder / "config.json", json.dumps(described, indent=2) + "\n")


def exit_file(folder: Path, exit_: ExitSpec) -> Path:
    """Where an exit's weights are in a model's folder."""
    return folder / "exits" / f"{exit_.name}.safetensors"


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
