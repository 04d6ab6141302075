"""A tokenizer's files on their way between a run's directory and a folder of `transformers`: what it reads, it finds again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from eellm.errors import ConversionError
from eellm.rundir import RunDirectory

CONFIG = "tokenizer_config.json"

COMPANIONS = (CONFIG, "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "generation_config.json")
"""What lies beside a tokenizer: its special tokens, its chat template, how a model likes to be sampled."""

_OWN, _SENTENCEPIECE, _VOCABULARY = "tokenizer.json", "tokenizer.model", "vocab.json"


def copy_tokenizer(source: Path, target: Path, model_config: dict[str, Any]) -> str | None:
    """Copy the tokenizer of a folder, if it has one; return the token that ends a document as the model's makers see it."""
    from eellm.data.tokenizer_files import load_tokenizer

    found = [name for name in (_OWN, _SENTENCEPIECE) if (source / name).is_file()]
    if found:
        for name in found:
            shutil.copyfile(source / name, target / name)
    elif (source / _VOCABULARY).is_file():
        load_tokenizer(source / _VOCABULARY).save(target / _OWN)
    else:
        return None
    for name in COMPANIONS:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    return end_of_document(target, model_config)


def copy_run_tokenizer(run: RunDirectory, folder: Path) -> None:
    """Copy a run's tokenizer and what lies beside it, as they are."""
    for name in (_OWN, _SENTENCEPIECE, *COMPANIONS):
        if (run.path / name).is_file():
            shutil.copyfile(run.path / name, folder / name)


def end_of_document(folder: Path, model_config: dict[str, Any]) -> str | None:
    """`eos_token` of tokenizer_config.json, or the token of the model's `eos_token_id`; None where nobody says."""
    named = _text(read_config(folder / CONFIG).get("eos_token"))
    if named is not None or not (folder / _OWN).is_file():
        return named
    ids = model_config.get("eos_token_id")
    first = ids[0] if isinstance(ids, list) and ids else ids
    if not isinstance(first, int):
        return None
    import tokenizers

    return tokenizers.Tokenizer.from_file(str(folder / _OWN)).id_to_token(first)


def read_config(file: Path) -> dict[str, Any]:
    """A JSON object; empty where there is no such file. Raises ConversionError."""
    if not file.is_file():
        return {}
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ConversionError(f"{file} is no JSON object ({error}).") from error


def _text(token: object) -> str | None:
    """tokenizer_config.json writes a token as its text or as an object around it."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None
