"""Text to token ids and back, and the tokenizer that a corpus gets."""

from __future__ import annotations

import codecs
import functools
import hashlib
import itertools
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from eellm.config.schema import DataConfig, TokenizerConfig
from eellm.data.cache import cache_key, cache_root, write_atomically
from eellm.data.text import documents, fingerprint
from eellm.errors import DataError

logger = logging.getLogger(__name__)

END_OF_DOCUMENT = "<|endoftext|>"

_KNOWN_ENDS = (END_OF_DOCUMENT, "</s>", "<|end_of_text|>", "<eos>")
"""How known tokenizers call the token that ends a document; a tokenizer.json does not say which one it is."""

_TRAINING_VERSION = 1
"""Raised whenever the same corpus and settings train to another tokenizer."""

_OFF = "no"
"""One of the words for "false" that `tokenizers` knows, and not the one that people write: so it is known to be ours."""


class Tokenizer:
    """A `tokenizers.Tokenizer` with an end-of-document token.

    Text is only text: special tokens spelled out in it are encoded as the characters they consist of, and none are
    added around it. Special tokens decode to nothing.
    """

    def __init__(self, backend: tokenizers.Tokenizer):
        self._backend = backend
        known = [token for token in map(backend.token_to_id, _KNOWN_ENDS) if token is not None]
        if not known:
            backend.add_special_tokens([END_OF_DOCUMENT])
            known = [max(backend.get_vocab(with_added_tokens=True).values())]
        backend.no_padding()
        backend.no_truncation()
        backend.encode_special_tokens = True
        self.eod_id: int = known[0]
        self.vocab_size: int = max(backend.get_vocab(with_added_tokens=True).values()) + 1

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without an end-of-document token."""
        return self._backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """`encode` of every text; inside `all_cores`, in parallel."""
        return [encoding.ids for encoding in self._backend.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: list[int]) -> str:
        """Text of the ids; bytes that are no UTF-8 become U+FFFD."""
        return self._backend.decode(ids, skip_special_tokens=True)

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

    @functools.cached_property
    def token_bytes(self) -> list[bytes] | None:
        """Bytes of every token of a byte-level tokenizer; None for one whose tokens depend on their neighbours."""
        if not isinstance(self._backend.decoder, decoders.ByteLevel):
            return None
        special = {token for token, added in self._backend.get_added_tokens_decoder().items() if added.special}
        table = [b""] * self.vocab_size
        for text, token in self._backend.get_vocab(with_added_tokens=True).items():
            table[token] = b"" if token in special else _spelled_bytes(text)
        return table

    def save(self, path: str | Path) -> None:
        """Write a tokenizer.json. Reading it gives an equal tokenizer, with the same ids."""
        write_atomically(Path(path), self.to_json())

    def to_json(self) -> str:
        return self._backend.to_str(pretty=True)

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Read a tokenizer.json. Raises DataError when it is missing or not one."""
        path = Path(os.path.expandvars(path)).expanduser()
        if not path.is_file():
            raise DataError(f"tokenizer file {path}: there is no such file.")
        try:
            return cls(tokenizers.Tokenizer.from_file(str(path)))
        except Exception as error:  # the library raises plain Exception for anything it cannot read
            raise DataError(f"tokenizer file {path}: not a tokenizer.json ({error}).") from error

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


class TextStream:
    """Text of tokens that arrive one by one; an unfinished character is held back until its last byte is there."""

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


def prepare_tokenizer(data: DataConfig, tokenizer: TokenizerConfig, corpus: str | None = None) -> tuple[Tokenizer, Path]:
    """The tokenizer of a run and its tokenizer.json in the cache: read from a file, or trained on the corpus.

    `corpus` is the corpus's fingerprint where the caller has it already. Training is deterministic and done once per
    corpus and settings.
    """
    folder = cache_root(data) / "tokenizers"
    if tokenizer.kind == "file":
        if tokenizer.path is None:
            raise DataError("tokenizer.kind=file needs tokenizer.path: a tokenizer.json.")
        loaded = Tokenizer.load(tokenizer.path)
        path = folder / f"{content_key(loaded)}.json"
    else:
        if tokenizer.vocab_size is None:
            raise DataError("tokenizer.kind=byte_bpe needs tokenizer.vocab_size: the entries of the vocabulary to train.")
        settings = [tokenizer.vocab_size, tokenizer.train_megabytes]
        path = folder / f"{cache_key(_TRAINING_VERSION, corpus or fingerprint(data), *settings)}.json"
        if path.is_file():
            return Tokenizer.load(path), path
        loaded = _train(data, tokenizer.vocab_size, tokenizer.train_megabytes)
    if not path.is_file():
        loaded.save(path)
    return loaded, path


def content_key(tokenizer: Tokenizer) -> str:
    """Hash of everything a tokenizer does: equal for a trained tokenizer and the copies of its file."""
    return hashlib.blake2b(tokenizer.to_json().encode(), digest_size=10).hexdigest()


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


def training_sample(data: DataConfig, megabytes: float) -> Iterator[str]:
    """Documents of about `megabytes` in all, spread evenly over the corpus; all of it if it is smaller."""
    budget = megabytes * 1e6
    total = sum(len(document.text) for document in documents(data))
    seen = taken = 0
    for _, text in documents(data):
        # compared before the document is counted, or large documents would be favoured
        if taken <= budget * seen / max(total, budget):
            yield text
            taken += len(text)
        seen += len(text)


def _train(data: DataConfig, vocab_size: int, megabytes: float) -> Tokenizer:
    logger.info("training a byte-level BPE tokenizer with %d entries on %g MB of text", vocab_size, megabytes)
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_DOCUMENT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    with all_cores():
        backend.train_from_iterator(training_sample(data, megabytes), trainer)
    return Tokenizer(backend)


@functools.cache
def _bytes_of_characters() -> dict[str, int]:
    """Byte-level tokenizers spell every byte as one printable character: itself, or one of U+0100 and up in byte order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + place): byte for place, byte in enumerate(others)}


def _common_length(one: str, other: str) -> int:
    return next(
        (place for place, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]), min(len(one), len(other))
    )


def _spelled_bytes(token: str) -> bytes:
    table = _bytes_of_characters()
    if all(character in table for character in token):
        return bytes(table[character] for character in token)
    return token.encode()
