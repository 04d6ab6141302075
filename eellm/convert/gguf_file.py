"""Models in llama.cpp's GGUF files, as `transformers` would have them: config, names, order of channels; weights in fp32."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eellm.convert.families import FAMILIES
from eellm.convert.gguf_tokenizer import write_tokenizer
from eellm.errors import ConversionError, MissingExtra

if TYPE_CHECKING:
    from eellm.mcore.whole_tensors import LazyTensor
    from eellm.model.spec import ExitSpec

_ARCHITECTURES = ("llama", "qwen2", "qwen3")
"""Architectures of GGUF that are families of ours by the same name (llama.cpp calls Mistral and SmolLM2 llama, too)."""

_KEYS = {
    "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "intermediate_size": "feed_forward_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "max_position_embeddings": "context_length",
    "rope_theta": "rope.freq_base",
    "num_local_experts": "expert_count",
    "sliding_window": "attention.sliding_window",
}
_EMBEDDING, _OUTPUT = "token_embd.weight", "output.weight"


@dataclass(frozen=True)
class GgufFile:
    """Quantised tensors are dequantised; queries and keys that llama.cpp has reordered for its rotation are put back."""

    path: Path

    @property
    def name(self) -> str:
        return str(self.path)

    @property
    def _reader(self) -> Any:
        status = self.path.stat()
        return _opened(self.path, status.st_size, status.st_mtime_ns)

    def value(self, key: str, default: Any = None) -> Any:
        """A value of the file's metadata; fractions are stored in fp32, and meant as they are written in decimals."""
        field = self._reader.get_field(key)
        value = default if field is None else field.contents()
        return float(f"{value:.7g}") if isinstance(value, float) else value

    def config(self) -> dict[str, Any]:
        architecture = self.value("general.architecture")
        if architecture not in _ARCHITECTURES:
            known = ", ".join(_ARCHITECTURES)
            raise ConversionError(f"{self.path}: general.architecture={architecture} is none of {known}.")
        own = {theirs: self.value(f"{architecture}.{key}") for theirs, key in _KEYS.items()}
        config = {name: value for name, value in own.items() if value is not None}
        shapes = {tensor.name: tensor.shape for tensor in self._reader.tensors}
        if _EMBEDDING not in shapes:
            raise ConversionError(f"{self.path} holds no {_EMBEDDING}.")
        if config.pop("sliding_window", None):
            raise ConversionError(f"{self.path}: {architecture}.attention.sliding_window is not supported in GGUF files.")
        width = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        turning = self.value(f"{architecture}.rope.dimension_count", width)
        scaling = self.value(f"{architecture}.rope.scaling.type", "none")
        if scaling not in ("none", None):
            config["rope_scaling"] = {"rope_type": scaling, "factor": self.value(f"{architecture}.rope.scaling.factor")}
        return {
            **config,
            "model_type": architecture,
            "vocab_size": int(shapes[_EMBEDDING][1]),
            "tie_word_embeddings": _OUTPUT not in shapes,
            "eos_token_id": self.value("tokenizer.ggml.eos_token_id"),
            **({"partial_rotary_factor": turning / width} if turning != width else {}),
        }

    def tensors(self) -> Mapping[str, LazyTensor]:
        import torch

        from eellm.mcore.whole_tensors import LazyTensor

        config = self.config()
        names = _names(config)
        heads = {"q_proj": config["num_attention_heads"]}
        heads["k_proj"] = config.get("num_key_value_heads", heads["q_proj"])

        def lazy(tensor: Any, name: str) -> LazyTensor:
            shape = tuple(int(size) for size in reversed(tensor.shape))
            part = name.rpartition(".")[0].rpartition(".")[2]
            turned = heads.get(part) if config["model_type"] == "llama" else None

            def read() -> torch.Tensor:
                whole = torch.from_numpy(_dequantised(self.path, tensor)).float().reshape(shape)
                return whole if turned is None else _halves(whole, turned)

            return LazyTensor(shape, torch.float32, read)

        found = {tensor.name: tensor for tensor in self._reader.tensors}
        return {names.get(name, name): lazy(tensor, names.get(name, name)) for name, tensor in found.items()}

    def exit_tensors(self, exits: Sequence[ExitSpec]) -> Mapping[str, LazyTensor]:
        """None: the format knows no exits."""
        return {}

    def write_tokenizer(self, folder: Path) -> str | None:
        return write_tokenizer(self, folder)


@cache
def _opened(path: Path, size: int, _changed: int) -> Any:
    """The library's view of a file. It takes seconds, and both the check of a config and the conversion need it."""
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise MissingExtra("gguf", "hf", f"convert.source={path}") from error
    try:
        return GGUFReader(path)
    except Exception as error:  # the library does not say what is wrong with a file, it stumbles over it
        raise ConversionError(f"{path} is cut short or no GGUF file ({error}; {size:,} bytes are there).") from error


def _names(config: dict[str, Any]) -> dict[str, str]:
    """GGUF's name of a tensor -> that of `transformers`; the library knows the one of the other."""
    import gguf

    architecture = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == config["model_type"])
    known = gguf.get_tensor_name_map(architecture, config["num_hidden_layers"])
    modules = [module for weights in FAMILIES[config["model_type"]].weights.values() for module in weights.modules]
    theirs = {module.format(i=layer) for module in modules for layer in range(config["num_hidden_layers"])}
    pairs = {(known.get_name(name), name) for name in theirs}
    return {f"{own}.{kind}": f"{name}.{kind}" for own, name in pairs if own is not None for kind in ("weight", "bias")}


def _dequantised(path: Path, tensor: Any) -> Any:
    """A writable array of fp32."""
    import numpy
    from gguf.quants import dequantize

    try:
        return numpy.array(dequantize(tensor.data, tensor.tensor_type), dtype=numpy.float32)
    except (NotImplementedError, ValueError) as error:
        raise ConversionError(f"{path}: {tensor.name} is stored as {tensor.tensor_type.name}, which cannot be read.") from error


def _halves(weight: Any, heads: int) -> Any:
    """llama.cpp pairs neighbouring channels of a head for its rotation, `transformers` those of the two halves."""
    pairs = weight.reshape(heads, -1, 2, *weight.shape[1:])
    return pairs.transpose(1, 2).reshape(weight.shape)
