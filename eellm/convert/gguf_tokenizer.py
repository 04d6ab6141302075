"""The tokenizer inside a GGUF file, as tokenizer.json with its special tokens and chat template beside it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import tokenizers
from tokenizers import AddedToken, models, pre_tokenizers

from eellm.convert.tokenizer_files import CONFIG
from eellm.data.hugging_face_tokenizer import byte_level
from eellm.errors import ConversionError, writing

_CONTROL, _USER_DEFINED = 3, 4
"""Types of tokens: what is no text, and text that is a token wherever it stands."""

_CUTS: dict[str, Sequence[Any]] = {"gpt-2": (), "smollm": (pre_tokenizers.Digits(individual_digits=True),)}
"""llama.cpp's names of how text is cut before merges apply -> what is cut before GPT-2's pattern."""


class Metadata(Protocol):
    @property
    def path(self) -> Path: ...

    def value(self, key: str, default: Any = None) -> Any: ...


def write_tokenizer(file: Metadata, folder: Path) -> str | None:
    """Write the tokenizer of a file that has one; return its end of a sentence. Raises ConversionError for unknown kinds."""
    kind = file.value("tokenizer.ggml.model")
    if kind is None:
        return None
    cut = file.value("tokenizer.ggml.pre", "gpt-2")
    for key, value, known in (("tokenizer.ggml.model", kind, ("gpt2",)), ("tokenizer.ggml.pre", cut, tuple(_CUTS))):
        if value not in known:
            reason = f"only {', '.join(known)} can be read; take the model's folder of safetensors instead"
            raise ConversionError(f"{file.path}: {key}={value}: {reason}.")
    tokens, merges = file.value("tokenizer.ggml.tokens"), file.value("tokenizer.ggml.merges")
    types = file.value("tokenizer.ggml.token_type", [1] * len(tokens))
    vocabulary = {token: number for number, token in enumerate(tokens)}
    backend = _backend(vocabulary, [tuple(merge.split(" ", 1)) for merge in merges], cut)
    listed = list(zip(tokens, types, strict=True))
    backend.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token, type_ in listed if type_ == _CONTROL]
    )
    backend.add_tokens([AddedToken(token, normalized=False) for token, type_ in listed if type_ == _USER_DEFINED])
    named = {
        f"{name}_token": tokens[file.value(f"tokenizer.ggml.{key}_token_id")]
        for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
        if file.value(f"tokenizer.ggml.{key}_token_id") is not None
    }
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **named, "clean_up_tokenization_spaces": False}
    template = file.value("tokenizer.chat_template")
    with writing(folder):
        backend.save(str(folder / "tokenizer.json"))
        (folder / CONFIG).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        if template is not None:
            (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    return named.get("eos_token")


def _backend(vocabulary: dict[str, int], merges: list[Any], cut: str) -> tokenizers.Tokenizer:
    backend = byte_level(models.BPE(vocab=vocabulary, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.Sequence([*_CUTS[cut], pre_tokenizers.ByteLevel(add_prefix_space=False)])
    return backend
