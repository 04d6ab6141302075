"""Conversations in JSON lines: a list of messages (role, content) under a field, one conversation a line."""

from __future__ import annotations

import json
from collections.abc import Iterator

from eellm.config.schema import DataConfig
from eellm.data.sources.document import Document
from eellm.data.sources.json_lines import records
from eellm.errors import DataError

ASSISTANT = "assistant"


def documents(data: DataConfig) -> Iterator[Document]:
    """Each document's text is its messages as JSON. Raises DataError for lines that hold no conversation with an answer."""
    for place, name, record in records(data):
        yield Document(name, json.dumps(_messages(record, data.text_field, place), ensure_ascii=False))


def _messages(record: dict, field: str, place: str) -> list[dict[str, str]]:
    messages = record.get(field)
    if not isinstance(messages, list):
        has = f"the line has the fields {sorted(record)}"
        raise DataError(f"{place}: no list of messages in the field '{field}'; {has}. Set data.text_field.")
    for message in messages:
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise DataError(f"{place}: a message is no object with the texts `role` and `content`.")
    if not any(message["role"] == ASSISTANT for message in messages):
        raise DataError(f"{place}: nobody answers: no message has the role '{ASSISTANT}', whose words are what is learned.")
    return [{"role": message["role"], "content": message["content"]} for message in messages]
