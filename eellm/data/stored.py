"""Tokenised documents on disk, and what splitting needs to know of them: made from text here, or read as they are.

A *store* is a pair of .bin/.idx files and a folder of the cache with `hashes.npy` (uint64 [documents]), `lengths.npy`
(int64 [documents], in tokens) and `about.json`.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from eellm.config.schema import DataConfig
from eellm.data.answers import ANSWERS, arrays, encode_chat
from eellm.data.cache import cache_key, cache_root, new_folder
from eellm.data.chat_template import ChatTemplate
from eellm.data.text import documents
from eellm.data.tokenise import batched, encode_documents
from eellm.data.tokenizer import Tokenizer, content_key
from eellm.errors import DataError

logger = logging.getLogger(__name__)

_FORMAT_VERSION = 2
"""Raised whenever the files below a store's folder change their meaning."""

_BATCH_CHARACTERS = 2_000_000

_SECONDS_BETWEEN_REPORTS = 5.0

_FACTS = ("hashes.npy", "lengths.npy", "about.json")


@dataclass(frozen=True)
class Store:
    """`prefix` names the .bin/.idx files, `folder` holds the facts; `fingerprint` is equal for equal documents."""

    prefix: Path
    folder: Path
    fingerprint: str

    @property
    def hashes(self) -> np.ndarray:
        return np.load(self.folder / "hashes.npy")

    @property
    def lengths(self) -> np.ndarray:
        return np.load(self.folder / "lengths.npy")

    @property
    def without_end(self) -> int:
        """Documents whose last token is not the end-of-document token."""
        return int(self._about["without_end"])

    @property
    def _about(self) -> dict[str, Any]:
        return json.loads((self.folder / "about.json").read_text())


def store_of_text(data: DataConfig, content: str, tokenizer: Tokenizer) -> Store:
    """Text, tokenised into the cache or found there. `content` is its fingerprint."""
    key = cache_key(_FORMAT_VERSION, content, content_key(tokenizer))
    folder = cache_root(data) / "corpora" / key
    _make(folder, ("tokens.bin", "tokens.idx", *_FACTS), lambda temporary: _tokenise(data, tokenizer, temporary))
    return Store(folder / "tokens", folder, key)


def store_of_chats(data: DataConfig, content: str, tokenizer: Tokenizer, template: ChatTemplate) -> Store:
    """Conversations, tokenised into the cache or found there, and beside them which tokens are answers."""
    key = cache_key(_FORMAT_VERSION, content, content_key(tokenizer), template.fingerprint)
    folder = cache_root(data) / "corpora" / key
    names = ("tokens.bin", "tokens.idx", f"{ANSWERS}.bin", f"{ANSWERS}.idx", *_FACTS)
    _make(folder, names, lambda temporary: _tokenise_chats(data, tokenizer, template, temporary))
    return Store(folder / "tokens", folder, key)


def store_of_tokens(data: DataConfig, prefix: Path, tokenizer: Tokenizer) -> Store:
    """Tokens that are on disk already: read once, to check every id and to know equal documents.

    Raises DataError where the files are damaged or hold ids that the tokenizer does not have.
    """
    from eellm.mcore.datasets import open_documents

    open_documents(prefix)
    tokens = prefix.with_name(f"{prefix.name}.bin").stat()
    index = hashlib.blake2b(prefix.with_name(f"{prefix.name}.idx").read_bytes(), digest_size=16).hexdigest()
    seen = (index, tokens.st_size, tokens.st_mtime_ns)
    folder = cache_root(data) / "scans" / cache_key(_FORMAT_VERSION, *seen, tokenizer.vocab_size, tokenizer.eod_id)
    _make(folder, _FACTS, lambda temporary: _scan(prefix, tokenizer, temporary))
    store = Store(prefix, folder, "")
    return Store(prefix, folder, cache_key(_FORMAT_VERSION, str(store._about["content"]), content_key(tokenizer)))


def _make(folder: Path, names: tuple[str, ...], fill: Callable[[Path], None]) -> None:
    """Fill a folder of the cache unless it is there and whole; one that lost files is made again."""
    if folder.is_dir() and not all((folder / name).is_file() for name in names):
        shutil.rmtree(folder, ignore_errors=True)
    if not folder.is_dir():
        with new_folder(folder) as temporary:
            fill(temporary)


def _tokenise(data: DataConfig, tokenizer: Tokenizer, folder: Path) -> None:
    """Write tokens.bin/.idx, every document ended by the end-of-document token, and the facts."""
    from eellm.mcore.datasets import write_documents

    logger.info("tokenising the corpus")
    facts = _Facts("tokenised")

    def tokens() -> Iterator[np.ndarray]:
        for batch in batched(documents(data), _BATCH_CHARACTERS):
            for document, ids in zip(batch, encode_documents(tokenizer, batch), strict=True):
                facts.add(document.text.encode(), len(ids))
                yield ids

    write_documents(folder / "tokens", tokens(), tokenizer.vocab_size)
    facts.save(folder, without_end=0)


def _tokenise_chats(data: DataConfig, tokenizer: Tokenizer, template: ChatTemplate, folder: Path) -> None:
    from eellm.mcore.datasets import write_documents

    facts, answers = _Facts("tokenised"), []

    def tokens() -> Iterator[np.ndarray]:
        for document in documents(data):
            ids, said = arrays(*encode_chat(template, document), tokenizer.eod_id)
            facts.add(document.text.encode(), len(ids))
            answers.append(said)
            yield ids

    write_documents(folder / "tokens", tokens(), tokenizer.vocab_size)
    write_documents(folder / ANSWERS, answers, vocab_size=2)
    facts.save(folder, without_end=0)


def _scan(prefix: Path, tokenizer: Tokenizer, folder: Path) -> None:
    """Check every id, and write the facts of documents that are on disk already."""
    from eellm.mcore.datasets import open_documents

    stored = open_documents(prefix)
    size, largest = tokenizer.vocab_size, np.iinfo(stored.index.dtype).max
    if size - 1 > largest:
        raise DataError(
            f"{prefix}.bin: its {np.dtype(stored.index.dtype)} tokens end at {largest}, and the tokenizer has {size} entries: "
            "larger ids were cut when it was written. Prepare it again with this tokenizer (task=prepare_data)."
        )
    facts, without_end = _Facts("checked"), 0
    for number in range(len(stored)):
        ids = stored[number]
        if ids.max() >= size or ids.min() < 0:
            wrong = next(int(token) for token in ids if not 0 <= token < size)
            raise DataError(
                f"{prefix}.bin: document {number} holds the token id {wrong}, and the tokenizer ends at {size - 1}. "
                "Give the tokenizer it was made with: tokenizer=file tokenizer.path=<tokenizer.json>."
            )
        ended = ids[-1] == tokenizer.eod_id
        without_end += not ended
        # with and without its end it is the same document, as it is in tokens of another width
        facts.add((ids[:-1] if ended else ids).astype("<i4").tobytes(), len(ids))
    facts.save(folder, without_end)


class _Facts:
    """Hash and length of document after document; says now and then how far it is."""

    def __init__(self, done: str):
        self._done = done
        self._hashes: list[bytes] = []
        self._lengths: list[int] = []
        self._tokens = 0
        self._reported = time.monotonic()

    def add(self, content: bytes, length: int) -> None:
        self._hashes.append(hashlib.blake2b(content, digest_size=8).digest())
        self._lengths.append(length)
        self._tokens += length
        if time.monotonic() - self._reported > _SECONDS_BETWEEN_REPORTS:
            self._reported = time.monotonic()
            logger.info("%s %d documents, %.1f million tokens", self._done, len(self._lengths), self._tokens / 1e6)

    def save(self, folder: Path, without_end: int) -> None:
        hashes, lengths = b"".join(self._hashes), np.asarray(self._lengths, dtype=np.int64)
        np.save(folder / "hashes.npy", np.frombuffer(hashes, dtype="<u8"))
        np.save(folder / "lengths.npy", lengths)
        content = hashlib.blake2b(hashes + lengths.tobytes(), digest_size=16).hexdigest()
        (folder / "about.json").write_text(json.dumps({"without_end": without_end, "content": content}))
