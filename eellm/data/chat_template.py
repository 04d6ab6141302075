"""Messages to text, by the chat template that comes with a model's tokenizer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import TemplateError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from eellm.config.paths import expanded
from eellm.data.tokenizer import Tokenizer
from eellm.errors import DataError

TEMPLATE, TOKENIZER_CONFIG = "chat_template.jinja", "tokenizer_config.json"
"""Files beside a tokenizer's, as `transformers` writes them."""


class Refused(Exception):
    """Why a template does not take some messages."""


@dataclass(frozen=True)
class TemplateSource:
    """A template's text, and the special tokens that it may name (`bos_token`, `eos_token`, ..)."""

    text: str
    tokens: dict[str, str]


class ChatTemplate:
    """A template as `transformers` renders it: the same environment, the same names in it.

    Raises DataError where it is no template.
    """

    def __init__(self, source: TemplateSource, tokenizer: Tokenizer):
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        environment.filters["tojson"] = _tojson
        environment.globals |= {"raise_exception": _raise, "strftime_now": lambda form: datetime.now().strftime(form)}
        try:
            self._template = environment.from_string(source.text)
        except TemplateError as error:
            raise DataError(f"the chat template cannot be read: {error}.") from error
        self._source, self._tokenizer = source, tokenizer

    def fill(self, messages: Sequence[Mapping[str, str]], asks: bool) -> str:
        """The text of messages (role, content); with `asks` up to where the assistant is to speak. Raises Refused."""
        try:
            return self._template.render(messages=list(messages), add_generation_prompt=asks, **self._source.tokens)
        except Exception as error:  # a template is a program, and what it stumbles over are the messages
            raise Refused(f"the model's chat template refuses them ({type(error).__name__}: {error})") from error

    def tokens_of(self, messages: Sequence[Mapping[str, str]], asks: bool) -> list[int]:
        """Token ids of `fill`'s text; the template's special tokens become such. Raises Refused."""
        return self._tokenizer.encode_special(self.fill(messages, asks))

    def spelled_special(self, text: str) -> str | None:
        """A special token that a message's text spells, if any: it would pass for one of the template's."""
        return next((name for name in self._tokenizer.special_tokens if name in text), None)

    @property
    def fingerprint(self) -> str:
        return hashlib.blake2b(repr(self._source).encode(), digest_size=10).hexdigest()

    @property
    def eos_id(self) -> int:
        """What ends the assistant's turn."""
        end = self._tokenizer.special_tokens.get(self._source.tokens.get("eos_token", ""))
        return self._tokenizer.eod_id if end is None else end


def find_template(given: str | None, beside: Path) -> TemplateSource | None:
    """The template in the file that is given, or what lies beside a tokenizer's file; None: nothing. Raises DataError."""
    config = _tokenizer_config(beside.parent / TOKENIZER_CONFIG)
    file = expanded(given) if given is not None else beside.parent / TEMPLATE
    if file.is_file():
        text = file.read_text(encoding="utf-8")
    elif isinstance(config.get("chat_template"), str):
        text = config["chat_template"]
    else:
        return None
    tokens = {name: _content(value) for name, value in config.items() if name.endswith("_token")}
    return TemplateSource(text, {name: token for name, token in tokens.items() if token is not None})


def _tokenizer_config(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{file} is no JSON ({error}).") from error


def _content(token: object) -> str | None:
    """tokenizer_config.json writes a token as its text or as an object around it."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def _tojson(value: object, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _raise(message: str) -> NoReturn:
    raise TemplateError(message)
