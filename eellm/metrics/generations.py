"""generations.jsonl, the generated texts of a run: one JSON object a text, as `eellm.decoding.generation` writes it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from eellm.metrics.names import HEAD_PATTERN
from eellm.metrics.rows import decode_lines, is_number

TEXTS, TOKEN_TEXTS, TOKEN_NUMBERS = ("prompt", "text", "decoding"), ("text", "head"), ("exit_layer", "confidence", "logprob")


def read_generations(path: Path) -> list[dict[str, Any]]:
    """All texts in order; [] where there is no file. Raises ValueError, naming the line, for one that is no generated text."""
    if not path.exists():
        return []
    return decode_lines(path, path.read_text(encoding="utf-8").split("\n"), lambda line: _checked(json.loads(line)))


def _checked(entry: object) -> dict[str, Any]:
    if not isinstance(entry, dict):
        raise ValueError(f"holds {entry!r:.40}, not an object")
    for name in TEXTS:
        _need(entry, name, isinstance(entry.get(name), str), "a text")
    value = entry.get("threshold")
    limits = value if isinstance(value, list) else [value]
    _need(entry, "threshold", value is None or all(map(is_number, limits)), "a number, several or null")
    _need(entry, "seconds", _optional_number(entry.get("seconds")), "a number or null")
    tokens = entry.get("tokens")
    _need(entry, "tokens", isinstance(tokens, list) and all(isinstance(token, dict) for token in tokens), "a list of objects")
    for token in entry["tokens"]:
        for name in TOKEN_TEXTS:
            _need(token, name, isinstance(token.get(name), str), "a text")
        _need(token, "head", re.fullmatch(HEAD_PATTERN, token["head"]) is not None, "a head's name")
        for name in TOKEN_NUMBERS:
            _need(token, name, name in token and _optional_number(token[name]), "a number or null")
    return entry


def _optional_number(value: object) -> bool:
    return value is None or is_number(value)


def _need(entry: dict[str, Any], name: str, holds: bool, kind: str) -> None:
    if not holds:
        raise ValueError(f"{name} is {entry[name]!r:.40}, not {kind}" if name in entry else f"{name} is missing")
