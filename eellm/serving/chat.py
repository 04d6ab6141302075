"""Messages of requests to a prompt: the template is the model's, what it refuses is the client's to mend."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from eellm.data import chat_template
from eellm.data.chat_template import Refused, find_template
from eellm.data.tokenizer import Tokenizer
from eellm.serving.errors import ApiError, wrong
from eellm.serving.schema import Message


class ChatTemplate(chat_template.ChatTemplate):
    def render(self, messages: Sequence[Message]) -> str:
        """Up to where the assistant is to speak. Raises ApiError where the template refuses the messages."""
        try:
            return self.fill([{"role": message.role, "content": message.text} for message in messages], asks=True)
        except Refused as error:
            raise wrong("messages", f"{error}.") from error

    def encode(self, messages: Sequence[Message]) -> list[int]:
        """The template's special tokens become such. A message that spells one is refused: it would pass for the template's."""
        for place, message in enumerate(messages):
            spelled = self.spelled_special(message.text)
            if spelled is not None:
                raise wrong(f"messages.{place}.content", f"holds {spelled!r}, which is a special token of the model.")
        return self._tokenizer.encode_special(self.render(messages))


def find_chat_template(given: str | None, beside: Path, tokenizer: Tokenizer) -> ChatTemplate | None:
    """The template in the file that is given, or what lies beside a tokenizer's file; None: nothing. Raises DataError."""
    source = find_template(given, beside)
    return None if source is None else ChatTemplate(source, tokenizer)


def no_chat_template() -> ApiError:
    return ApiError(
        400,
        "messages: this model's tokenizer comes without a chat template. Use /v1/completions, or start the server with "
        "serve.chat_template=<a Jinja file>.",
        "messages",
        "no_chat_template",
    )
