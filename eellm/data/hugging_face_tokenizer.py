"""Tokenizers of the `tokenizers` library: tokenizer.json, and byte-level BPE out of a vocabulary and its merges."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from eellm.data.tokenizer import END_OF_DOCUMENT, KNOWN_ENDS, Tokenizer
from eellm.errors import DataError

_OFF = "no"
"""One of the words for "false" that `tokenizers` knows, and not the one that people write: so it is known to be ours."""


class HuggingFaceTokenizer(Tokenizer):
    """A `tokenizers.Tokenizer`, whose end of a document is `end_of_document` or the first known name that it has.

    One that has none of them gets one more entry. Raises DataError where it lacks the one that is asked for.
    """

    suffix = ".json"

    def __init__(self, backend: tokenizers.Tokenizer, end_of_document: str | None = None):
        self._backend = backend
        if end_of_document is not None and backend.token_to_id(end_of_document) is None:
            raise DataError(f"tokenizer.end_of_document={end_of_document}: the vocabulary has no such entry.")
        names = KNOWN_ENDS if end_of_document is None else (end_of_document,)
        end = next((name for name in names if backend.token_to_id(name) is not None), END_OF_DOCUMENT)
        backend.add_special_tokens([end])  # an entry that is there keeps its id, and is special from now on
        vocabulary = backend.get_vocab(with_added_tokens=True)
        self.eod_id, self.vocab_size = vocabulary[end], max(vocabulary.values()) + 1
        backend.no_padding()
        backend.no_truncation()
        backend.encode_special_tokens = True

    def encode(self, text: str) -> list[int]:
        return self._backend.encode(text, add_special_tokens=False).ids

    @functools.cached_property
    def beginning(self) -> list[int]:
        """What the file's own post-processor puts before a text."""
        bare, dressed = (self._backend.encode("a", add_special_tokens=special).ids for special in (False, True))
        return next((dressed[:start] for start in range(len(dressed)) if dressed[start : start + len(bare)] == bare), [])

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        with all_cores():
            return [encoding.ids for encoding in self._backend.encode_batch_fast(texts, add_special_tokens=False)]

    @functools.cached_property
    def special_tokens(self) -> dict[str, int]:
        added = self._backend.get_added_tokens_decoder()
        return {token.content: id_ for id_, token in added.items() if token.special}

    def encode_special(self, text: str) -> list[int]:
        return self._with_special_tokens.encode(text, add_special_tokens=False).ids

    @functools.cached_property
    def _with_special_tokens(self) -> tokenizers.Tokenizer:
        """A copy that sees them, since a switch would be seen by other threads too."""
        backend = tokenizers.Tokenizer.from_str(self._backend.to_str())
        backend.encode_special_tokens = False
        return backend

    def decode(self, ids: list[int]) -> str:
        return self._backend.decode(ids, skip_special_tokens=True)

    def to_bytes(self) -> bytes:
        return self._backend.to_str(pretty=True).encode()

    @functools.cached_property
    def token_bytes(self) -> list[bytes] | None:
        if not isinstance(self._backend.decoder, decoders.ByteLevel):
            return None
        special = {token for token, added in self._backend.get_added_tokens_decoder().items() if added.special}
        table = [b""] * self.vocab_size
        for text, token in self._backend.get_vocab(with_added_tokens=True).items():
            table[token] = b"" if token in special else _spelled_bytes(text)
        return table


def byte_level(model: models.BPE) -> tokenizers.Tokenizer:
    """GPT-2's way around a BPE model: text is cut into words by its pattern, and every byte is a character."""
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return backend


@contextmanager
def all_cores() -> Iterator[None]:
    """Let `tokenizers` use its threads inside, and no more afterwards: a process forked later would wait for them forever.

    A user's own TOKENIZERS_PARALLELISM stands.
    """
    variable = "TOKENIZERS_PARALLELISM"
    if os.environ.get(variable, _OFF) != _OFF:
        yield
        return
    os.environ[variable] = "true"
    try:
        yield
    finally:
        os.environ[variable] = _OFF


@functools.cache
def _bytes_of_characters() -> dict[str, int]:
    """Byte-level tokenizers spell every byte as one printable character: itself, or one of U+0100 and up in byte order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + place): byte for place, byte in enumerate(others)}


def _spelled_bytes(token: str) -> bytes:
    table = _bytes_of_characters()
    if all(character in table for character in token):
        return bytes(table[character] for character in token)
    return token.encode()
