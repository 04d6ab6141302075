"""Text of tokens that arrive one by one."""

from __future__ import annotations

import codecs
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from eellm.data.tokenizer import Tokenizer


class TextStream:
    """What each new token adds to the text; an unfinished character is held back until its last byte is there."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._ids: list[int] = []
        self._given = 0

    def add(self, token: int) -> str:
        """Text that this token completes, possibly none."""
        table = self._tokenizer.token_bytes
        if table is not None:
            return self._utf8.decode(table[token] if token < len(table) else b"")
        self._ids.append(token)
        return self._give(self._tokenizer.decode(self._ids).rstrip("\ufffd"))

    def finish(self) -> str:
        """What is still held back, unfinished as it is."""
        if self._tokenizer.token_bytes is not None:
            return self._utf8.decode(b"", final=True)
        return self._give(self._tokenizer.decode(self._ids))

    def _give(self, text: str) -> str:
        new = text[self._given :]
        self._given = max(self._given, len(text))
        return new
