"""Where a model comes from: a folder as `transformers` writes it, a .gguf file, a name on the hub, or SmolLM2 out of a package.

What a model is can be read without torch, before a run starts; tensors are read later, one at a time.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from eellm.config.paths import expanded
from eellm.convert.tokenizer_files import copy_tokenizer
from eellm.errors import ConversionError, MissingExtra

if TYPE_CHECKING:
    from eellm.mcore.whole_tensors import LazyTensor
    from eellm.model.spec import ExitSpec

SMOLLM2 = "smollm2"
"""The source that is a model out of a Python package (`eellm.convert.smollm2`)."""

_WEIGHTS, _TOKENIZER = ("*.safetensors", "*.safetensors.index.json"), ("*.json", "*.model", "*.jinja", "merges.txt")


class Source(Protocol):
    """A model of another library. Everything that is wrong with it is a ConversionError."""

    @property
    def name(self) -> str:
        """For messages."""
        ...

    def config(self) -> dict[str, Any]:
        """`transformers`' config.json of the model."""
        ...

    def tensors(self) -> Mapping[str, LazyTensor]:
        """Its weights under `transformers`' names."""
        ...

    def exit_tensors(self, exits: Sequence[ExitSpec]) -> Mapping[str, LazyTensor]:
        """Weights of the exits that its config.json lists, under names of `eellm.convert.exit_files`."""
        ...

    def write_tokenizer(self, folder: Path) -> str | None:
        """Write its tokenizer with what belongs to it, if it has one; return the entry that ends a document, if it says so."""
        ...


@dataclass(frozen=True)
class ModelFolder:
    """config.json, safetensors and tokenizer."""

    path: Path

    @property
    def name(self) -> str:
        return str(self.path)

    def config(self) -> dict[str, Any]:
        file = self.path / "config.json"
        try:
            config = json.loads(file.read_text(encoding="utf-8"))
        except OSError as error:
            raise ConversionError(f"looked for {file}, found {_found(self.path)}.") from error
        except ValueError as error:
            raise ConversionError(f"{file} is no JSON ({error}).") from error
        if not isinstance(config, dict):
            raise ConversionError(f"{file} is no object of fields.")
        return config

    def tensors(self) -> Mapping[str, LazyTensor]:
        from eellm.convert.safetensors_files import INDEX, WHOLE, read_folder

        if not any((self.path / name).is_file() for name in (INDEX, WHOLE)):
            raise ConversionError(f"looked for {WHOLE} or {INDEX} in {self.path}, found {_found(self.path)}.")
        return read_folder(self.path)

    def exit_tensors(self, exits: Sequence[ExitSpec]) -> Mapping[str, LazyTensor]:
        from eellm.convert.exit_files import read_exits

        return read_exits(self.path, exits)

    def write_tokenizer(self, folder: Path) -> str | None:
        return copy_tokenizer(self.path, folder, self.config())


@dataclass(frozen=True)
class HubModel:
    """A model by its name on the Hugging Face hub, e.g. `HuggingFaceTB/SmolLM2-135M`; kept in the hub's own cache."""

    name: str

    def config(self) -> dict[str, Any]:
        return self._folder("config.json").config()

    def tensors(self) -> Mapping[str, LazyTensor]:
        return self._folder(*_WEIGHTS).tensors()

    def exit_tensors(self, exits: Sequence[ExitSpec]) -> Mapping[str, LazyTensor]:
        return self._folder(*_WEIGHTS).exit_tensors(exits) if exits else {}

    def write_tokenizer(self, folder: Path) -> str | None:
        return self._folder(*_TOKENIZER).write_tokenizer(folder)

    def _folder(self, *patterns: str) -> ModelFolder:
        try:
            from huggingface_hub import snapshot_download
        except ImportError as error:
            raise MissingExtra("huggingface_hub", "hf", f"convert.source={self.name}") from error
        try:
            return ModelFolder(Path(snapshot_download(self.name, allow_patterns=list(patterns))))
        except Exception as error:  # of its own, of its HTTP library, of the system
            said = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise ConversionError(
                f"{self.name}: there is no such file or folder, and the hub does not give it either ({said})."
            ) from error


def _legacy(path: Path) -> Source | None:
    """A checkpoint of EE-LLM, by the names of its folders."""
    if not (path / "latest_checkpointed_iteration.txt").is_file() and not any(path.glob("mp_rank_*")):
        return None
    from eellm.convert.legacy_files import iteration_folder
    from eellm.convert.legacy_megatron import LegacyMegatron

    folder = iteration_folder(path)
    if folder is None:
        raise ConversionError(f"{path} names an iteration in latest_checkpointed_iteration.txt of which it holds no mp_rank_*.")
    return LegacyMegatron(path, folder)


def open_source(given: str, cache: Path) -> Source:
    """The model that `convert.source` names; `cache` is where downloads of ours are kept. A path goes before a name.

    Raises ConversionError for a file of another kind, MissingExtra for a .gguf file without its library.
    """
    path = expanded(given)
    if path.is_dir():
        return _legacy(path) or ModelFolder(path)
    if path.is_file() and path.suffix != ".gguf":
        raise ConversionError(f"{given} is neither a folder nor a .gguf file.")
    if path.is_file() or given == SMOLLM2:
        from eellm.convert.gguf_file import GgufFile
        from eellm.convert.smollm2 import gguf_file

        return GgufFile(path if path.is_file() else gguf_file(cache))
    if path.suffix == ".gguf" or path.is_absolute() or given.count("/") > 1 or given.startswith((".", "~")):
        raise ConversionError(f"{given}: there is no such file or folder.")
    return HubModel(given)


def _found(folder: Path) -> str:
    names = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
    return ", ".join(names[:8]) or "nothing"
