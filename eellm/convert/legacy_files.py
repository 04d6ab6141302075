"""Files of Megatron-LM's old checkpoints: `mp_rank_00_001/model_optim_rng.pt`, pickles whose classes need not be there.

Written from what EE-LLM's code says of them, and tried on files that the tests build by it: not on files of its own.
"""

from __future__ import annotations

import argparse
import collections
import pickle
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from eellm.errors import ConversionError

TRACKER, FILE = "latest_checkpointed_iteration.txt", "model_optim_rng.pt"
_RANK = re.compile(r"mp_rank_(\d+)(?:_(\d+))?")


class _Inert:
    """Stands for a class that is not known here: what it holds is of no use to a conversion."""

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def __setstate__(self, _: object) -> None:
        pass


class _Unpickler(pickle.Unpickler):
    """Makes tensors, containers and argparse's values, and calls nothing else that a file might name."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("argparse", "Namespace"):
            return argparse.Namespace
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if module == "torch._utils" and name in ("_rebuild_tensor_v2", "_rebuild_parameter"):
            return super().find_class(module, name)
        if module == "torch" and (name.endswith("Storage") or isinstance(getattr(torch, name, None), torch.dtype)):
            return super().find_class(module, name)
        return _Inert


_PICKLE = SimpleNamespace(Unpickler=_Unpickler, load=lambda *a, **k: _Unpickler(*a, **k).load(), __name__="eellm's pickle")


def iteration_folder(path: Path) -> Path | None:
    """The folder of ranks that a path names: itself, or by its tracker file; None where it is no such checkpoint."""
    if _rank_folders(path):
        return path
    tracker = path / TRACKER
    if not tracker.is_file():
        return None
    said = tracker.read_text(encoding="utf-8").strip()
    folder = path / (said if said == "release" else f"iter_{int(said):07d}" if said.isdigit() else said)
    return folder if _rank_folders(folder) else None


def _rank_folders(folder: Path) -> dict[tuple[int, int], Path]:
    """(tensor-parallel rank, pipeline rank) -> folder."""
    if not folder.is_dir():
        return {}
    matches = ((_RANK.fullmatch(entry.name), entry) for entry in folder.iterdir())
    return {(int(match[1]), int(match[2] or 0)): entry for match, entry in matches if match is not None}


def rank_files(folder: Path) -> list[list[Path]]:
    """By pipeline rank the files of its tensor-parallel ranks. Raises ConversionError where one is missing."""
    there = _rank_folders(folder)
    tp, pp = (1 + max(place[axis] for place in there) for axis in (0, 1))
    missing = [(tp_rank, pp_rank) for pp_rank in range(pp) for tp_rank in range(tp) if (tp_rank, pp_rank) not in there]
    if missing:
        raise ConversionError(f"{folder}: there is nothing of tensor-parallel rank {missing[0][0]}, stage {missing[0][1]}.")
    return [[there[tp_rank, pp_rank] / FILE for tp_rank in range(tp)] for pp_rank in range(pp)]


def read_rank(file: Path) -> dict[str, Any]:
    """What a rank has saved, its tensors mapped from the file. Raises ConversionError."""
    try:
        found = torch.load(file, map_location="cpu", mmap=True, weights_only=False, pickle_module=_PICKLE)
    except Exception as error:  # unpickling what is no pickle raises nearly anything
        raise ConversionError(f"{file} cannot be read ({error}).") from error
    if not isinstance(found, dict) or not isinstance(found.get("model"), dict):
        raise ConversionError(f"{file} is no checkpoint of Megatron-LM: looked for a model in it.")
    return found


def flat(node: dict[str, Any], prefix: str = "") -> dict[str, torch.Tensor]:
    """Tensors by dotted names."""
    tensors: dict[str, torch.Tensor] = {}
    for key, value in node.items():
        if isinstance(value, torch.Tensor):
            tensors[f"{prefix}{key}"] = value
        elif isinstance(value, dict):
            tensors |= flat(value, f"{prefix}{key}.")
    return tensors
