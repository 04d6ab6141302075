"""Tensors of a folder of safetensors, sharded or not: read one at a time, written one after the other.

The library writes a file from tensors that are all in memory. The format is a length, a table and the numbers, so what is
written here is the same without that.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from eellm.errors import ConversionError, writing
from eellm.mcore.whole_tensors import LazyTensor

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"

_TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_CODES = {dtype: code for code, dtype in _TYPES.items()}

Announced = tuple[tuple[int, ...], torch.dtype]
"""Shape and type of a tensor that is to be written."""


def read_folder(folder: Path) -> dict[str, LazyTensor]:
    """Tensors by name. Raises ConversionError for shards that are missing or cut, and where the index is not true."""
    index = folder / INDEX
    if not index.is_file():
        return read_file(folder / WHOLE)
    try:
        places = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise ConversionError(f"{index} is no index of tensors ({error or type(error).__name__}).") from error
    tensors: dict[str, LazyTensor] = {}
    for file in sorted(set(places.values())):
        there = read_file(folder / file)
        missing = sorted(name for name, place in places.items() if place == file and name not in there)
        if missing:
            raise ConversionError(f"{folder / file} lacks {', '.join(missing[:4])}, which {INDEX} says it holds.")
        twice = sorted(set(there) & set(tensors))
        if twice:
            raise ConversionError(f"{folder / file}: {', '.join(twice[:4])} is in another shard too.")
        tensors |= there
    return tensors


def read_file(path: Path) -> dict[str, LazyTensor]:
    """Tensors of one file by name; each opens it anew, so that nothing of it stays in memory."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise ConversionError(f"looked for {path}, found nothing.")

    def lazy(name: str, part: Any) -> LazyTensor:
        def read() -> torch.Tensor:
            with safe_open(str(path), framework="pt") as file:
                return file.get_tensor(name)

        code = part.get_dtype()
        if code not in _TYPES:
            raise ConversionError(f"{path}: {name} is stored as {code}, which cannot be read.")
        return LazyTensor(tuple(part.get_shape()), _TYPES[code], read)

    try:
        with safe_open(str(path), framework="pt") as file:
            return {name: lazy(name, file.get_slice(name)) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        size = path.stat().st_size
        raise ConversionError(f"{path} is cut short or no safetensors file: {error} ({size:,} bytes are there).") from error


class TensorWriter:
    """Writes a folder of files of at most `shard_bytes` each, in the order in which tensors are announced."""

    def __init__(self, folder: Path, tensors: Mapping[str, Announced], shard_bytes: int):
        self._folder, self._tensors = folder, tensors
        self._shards = _shards(tensors, shard_bytes)

    def write(self, values: Iterable[torch.Tensor]) -> None:
        """The values of all announced tensors in their order. Raises WriteError."""
        values = iter(values)
        count, total = len(self._shards), 0
        places: dict[str, str] = {}
        for number, names in enumerate(self._shards, start=1):
            file = WHOLE if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
            total += write_file(self._folder / file, {name: self._tensors[name] for name in names}, values)
            places |= dict.fromkeys(names, file)
        if count > 1:
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
            with writing(self._folder / INDEX):
                (self._folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def write_file(path: Path, tensors: Mapping[str, Announced], values: Iterable[torch.Tensor]) -> int:
    """Write one file of the tensors that are announced, taking as many of `values`; return their bytes. Raises WriteError."""
    values = iter(values)
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (shape, dtype) in tensors.items():
        start, end = end, end + _bytes(shape, dtype)
        table[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    header = json.dumps(table, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    with writing(path), path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        for name, announced in tensors.items():
            value = next(values).contiguous()
            assert (tuple(value.shape), value.dtype) == announced, name
            file.write(value.reshape(-1).view(torch.uint8).numpy().data)
    return end


def _shards(tensors: Mapping[str, Announced], shard_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    filled = 0
    for name, (shape, dtype) in tensors.items():
        size = _bytes(shape, dtype)
        if shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def _bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return torch.Size(shape).numel() * dtype.itemsize
