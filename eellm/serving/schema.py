"""What a request may hold: OpenAI's fields, and eellm's `decoding`, `exit_threshold`, `exit_layers` and `top_k`.

What is not offered is refused, not ignored: a client that asks for it would take the answer for what it is not.
"""

from __future__ import annotations

import itertools
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints

from eellm.config.schema import DecodingMode
from eellm.decoding.continuation import MAX_ALTERNATIVES


def _is_text(value: str) -> str:
    """JSON can spell half a surrogate pair, which is no character."""
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"is no Unicode text: half a surrogate pair at {error.start}") from None
    return value


Text = Annotated[str, AfterValidator(_is_text)]
SomeText = Annotated[Text, StringConstraints(min_length=1)]


def _as_integer(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


Whole = BeforeValidator(_as_integer)
"""Of an integer: JSON has numbers only, and 2.0 is one there. It stands last, or bounds would be missing in the document."""
TokenIds = Annotated[list[Annotated[int, Field(ge=0), Whole]], Field(min_length=1)]
MAX_STOPS = 16


def _neutral(values: tuple[Any, ...]) -> BeforeValidator:
    def check(value: Any) -> Any:
        if value is not None and value not in values:
            raise ValueError("is not offered; leave it out")
        return None

    return BeforeValidator(check)


Zero = Annotated[None, _neutral((0, 0.0))]
Off = Annotated[None, _neutral((False,))]
One = Annotated[None, _neutral((1,))]
Nothing = Annotated[None, _neutral(({}, [], ""))]


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    include_usage: bool | None = None
    """Send a last chunk with the token counts."""


class Generation(BaseModel):
    """What both kinds of request share."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True)

    model: Text | None = None
    max_tokens: Annotated[int, Field(ge=1), Whole] | None = None
    """Tokens to generate; null = the server's default."""
    n: Annotated[int, Field(ge=1), Whole] | None = None
    """Continuations of each prompt; the second one draws with seed + 1, and so on."""
    stop: SomeText | Annotated[list[SomeText], Field(max_length=MAX_STOPS)] | None = None
    """Texts that end a continuation; they are not part of it."""
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63), Whole] | None = None
    """Of the draws; null = a random one."""
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    """0 = greedy."""
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0), Whole] | None = None
    """Sample from the k most probable tokens; 0 = all."""
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    decoding: DecodingMode | None = None
    """How tokens leave early; null = the server's default."""
    exit_threshold: float | Annotated[list[float], Field(min_length=1)] | None = None
    """For all exits or one per exit that may be taken; null = the server's."""
    exit_layers: Annotated[list[Annotated[int, Whole]], Field(min_length=1)] | None = None
    """Layers of the exits that may be taken; null = all that the server evaluates."""
    user: Text | None = None
    """Accepted and not used."""
    metadata: dict[Text, Text] | None = None
    """Accepted and not used."""
    frequency_penalty: Zero = None
    presence_penalty: Zero = None
    logit_bias: Nothing = None

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else (self.stop or [])


class CompletionRequest(Generation):
    prompt: Text | Annotated[list[Text], Field(min_length=1)] | TokenIds | Annotated[list[TokenIds], Field(min_length=1)]
    """A text or token ids, or several of them; an empty text starts a document."""
    logprobs: Annotated[int, Field(ge=0, le=MAX_ALTERNATIVES), Whole] | None = None
    """Most probable tokens to list at each place."""
    echo: Off = None
    best_of: One = None
    suffix: Nothing = None

    @property
    def alternatives(self) -> int:
        return self.logprobs or 0

    @property
    def wants_logprobs(self) -> bool:
        return self.logprobs is not None


class TextPart(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["text"]
    text: Text


class Message(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[TextPart], Field(min_length=1)]
    name: Text | None = None

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatRequest(Generation):
    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1), Whole] | None = None
    """OpenAI's newer name of max_tokens."""
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_ALTERNATIVES), Whole] | None = None
    """Most probable tokens to list at each place; needs `logprobs`."""
    tools: Nothing = None
    tool_choice: Annotated[None, _neutral(("none", "auto"))] = None
    response_format: Annotated[None, _neutral(({"type": "text"},))] = None

    @property
    def alternatives(self) -> int:
        return self.top_logprobs or 0

    @property
    def wants_logprobs(self) -> bool:
        return bool(self.logprobs)


FIELDS = {name for model in (CompletionRequest, ChatRequest, Message, TextPart, StreamOptions) for name in model.model_fields}
"""Names that may stand in an error's path; what else pydantic puts there says which type was tried."""


def path_of(location: tuple[int | str, ...], unknown: bool = False) -> str:
    """The field that a validation error is about, e.g. `messages.0.role`; `unknown`: it is the last one that should not be."""
    known = location[:-1] if unknown else location
    parts = list(itertools.takewhile(lambda part: isinstance(part, int) or part in FIELDS, known))
    return ".".join(map(str, [*parts, location[-1]] if unknown else parts))
