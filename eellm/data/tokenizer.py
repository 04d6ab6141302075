"""Text to token ids and back: what a tokenizer is, whichever library it comes from."""

from __future__ import annotations

import abc
import functools
import hashlib
import itertools
from pathlib import Path
from typing import ClassVar

from eellm.data.cache import write_atomically
from eellm.data.text_stream import TextStream

END_OF_DOCUMENT = "<|endoftext|>"

KNOWN_ENDS = (END_OF_DOCUMENT, "</s>", "<|end_of_text|>", "<eos>")
"""How known tokenizers call the token that ends a document; most files do not say which one it is."""


class Tokenizer(abc.ABC):
    """A vocabulary of `vocab_size` entries, the one that ends a document among them (`eod_id`).

    Text is only text: special tokens spelled out in it are encoded as the characters they consist of, and none are
    added around it. Special tokens decode to nothing.
    """

    suffix: ClassVar[str]
    """Of the one file that holds such a tokenizer; `eellm.data.tokenizer_files` reads it."""

    eod_id: int
    vocab_size: int

    @abc.abstractmethod
    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without an end-of-document token."""

    @functools.cached_property
    def beginning(self) -> list[int]:
        """Ids that models of this tokenizer expect before every text (Llama's and Mistral's `<s>`); most expect none."""
        return []

    def encode_prompt(self, text: str) -> list[int]:
        """Token ids of a text to be continued."""
        return [*self.beginning, *self.encode(text)]

    @abc.abstractmethod
    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """`encode` of every text, on all cores."""

    @abc.abstractmethod
    def decode(self, ids: list[int]) -> str:
        """Text of the ids; bytes that are no UTF-8 become U+FFFD."""

    @abc.abstractmethod
    def to_bytes(self) -> bytes:
        """Content of the file that holds the tokenizer. Reading it gives an equal tokenizer, with the same ids."""

    @functools.cached_property
    def token_bytes(self) -> list[bytes] | None:
        """Bytes of every token of a byte-level tokenizer; None for one whose tokens depend on their neighbours."""
        return None

    @functools.cached_property
    def special_tokens(self) -> dict[str, int]:
        """Entries that are no text, by how they are spelled; none where the library keeps them to itself."""
        return {}

    def encode_special(self, text: str) -> list[int]:
        """Token ids of a text whose special tokens are meant as such, as those of a chat template are."""
        return self.encode(text)

    def spelled(self, token: int) -> str:
        """A token by itself, for people; one that is not whole characters as its bytes."""
        table = self.token_bytes
        if table is None or token >= len(table):
            return self.decode([token])
        try:
            return table[token].decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in table[token])

    def save(self, path: str | Path) -> None:
        """Write the file."""
        write_atomically(Path(path), self.to_bytes())

    def pieces(self, ids: list[int]) -> list[str]:
        """The text that each token adds: joined, exactly `decode(ids)`.

        A character whose bytes are spread over several tokens belongs to the token that completes it.
        """
        if self.token_bytes is None:
            return self._pieces_of_prefixes(ids)
        stream = TextStream(self)
        pieces = [stream.add(token) for token in ids]
        if pieces:
            pieces[-1] += stream.finish()
        return pieces

    def _pieces_of_prefixes(self, ids: list[int]) -> list[str]:
        """`pieces` for any tokenizer: a token adds what the text of the ids up to it has in common with the whole text."""
        if not ids:
            return []
        whole = self.decode(ids)
        ends = [0]
        for count in range(1, len(ids)):
            prefix = self.decode(ids[:count]).rstrip("\ufffd")
            ends.append(max(ends[-1], _common_length(prefix, whole)))
        ends.append(len(whole))
        return [whole[start:end] for start, end in itertools.pairwise(ends)]


def content_key(tokenizer: Tokenizer) -> str:
    """Hash of everything a tokenizer does: equal for a trained tokenizer and the copies of its file."""
    return hashlib.blake2b(b"%d %b" % (tokenizer.eod_id, tokenizer.to_bytes()), digest_size=10).hexdigest()


def _common_length(one: str, other: str) -> int:
    return next(
        (place for place, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]), min(len(one), len(other))
    )
