"""Messages to a prompt, by the chat template that comes with a model's tokenizer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import TemplateError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from eellm.config.paths import expanded
from eellm.data.tokenizer import Tokenizer
from eellm.errors import DataError
from eellm.serving.errors import ApiError, wrong
from eellm.serving.schema import Message

_TEMPLATE, _TOKENIZER_CONFIG = "chat_template.jinja", "tokenizer_config.json"


class ChatTemplate:
    """A template as `transformers` renders it: the same environment, the same names in it.

    `tokens`: the special tokens that it may name (`bos_token`, `eos_token`, ..). Raises DataError where it is no template.
    """

    def __init__(self, source: str, tokenizer: Tokenizer, tokens: dict[str, str]):
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        environment.filters["tojson"] = _tojson
        environment.globals |= {"raise_exception": _raise, "strftime_now": lambda form: datetime.now().strftime(form)}
        try:
            self._template = environment.from_string(source)
        except TemplateError as error:
            raise DataError(f"the chat template cannot be read: {error}.") from error
        self._tokenizer, self._tokens = tokenizer, tokens
        end = tokenizer.special_tokens.get(tokens.get("eos_token", ""))
        self.eos_id = tokenizer.eod_id if end is None else end

    def render(self, messages: Sequence[Message]) -> str:
        """Raises ApiError where the template refuses the messages."""
        given = [{"role": message.role, "content": message.text} for message in messages]
        try:
            return self._template.render(messages=given, add_generation_prompt=True, **self._tokens)
        except Exception as error:  # a template is a program, and what it stumbles over are the messages
            raise wrong("messages", f"the model's chat template refuses them ({type(error).__name__}: {error}).") from error

    def encode(self, messages: Sequence[Message]) -> list[int]:
        """The template's special tokens become such. A message that spells one is refused: it would pass for the template's."""
        for place, message in enumerate(messages):
            spelled = [name for name in self._tokenizer.special_tokens if name in message.text]
            if spelled:
                raise wrong(f"messages.{place}.content", f"holds {spelled[0]!r}, which is a special token of the model.")
        return self._tokenizer.encode_special(self.render(messages))


def find_chat_template(given: str | None, beside: Path, tokenizer: Tokenizer) -> ChatTemplate | None:
    """The template in the file that is given, or what lies beside a tokenizer's file as `transformers` writes it; None: nothing.

    Raises DataError where it cannot be read, or the tokenizer knows no special tokens to fill it with.
    """
    config = _tokenizer_config(beside.parent / _TOKENIZER_CONFIG)
    file = expanded(given) if given is not None else beside.parent / _TEMPLATE
    if file.is_file():
        source = file.read_text(encoding="utf-8")
    elif isinstance(config.get("chat_template"), str):
        source = config["chat_template"]
    else:
        return None
    tokens = {name: _content(value) for name, value in config.items() if name.endswith("_token")}
    return ChatTemplate(source, tokenizer, {name: text for name, text in tokens.items() if text is not None})


def no_chat_template() -> ApiError:
    return ApiError(
        400,
        "messages: this model's tokenizer comes without a chat template. Use /v1/completions, or start the server with "
        "serve.chat_template=<a Jinja file>.",
        "messages",
        "no_chat_template",
    )


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
