"""A run's corpus, tokenised and split once: what the parent prepares and every rank opens by path."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from eellm.config.schema import Config, DataConfig
from eellm.data.cache import cache_key, cache_root, new_folder, write_atomically
from eellm.data.split import split_documents
from eellm.data.text import Document, documents, fingerprint
from eellm.data.tokenizer import Tokenizer, content_key
from eellm.data.tokenizer_files import prepare_tokenizer
from eellm.errors import DataError

if TYPE_CHECKING:
    from eellm.data.batches import WindowDataset
    from eellm.mcore.datasets import WindowSource

logger = logging.getLogger(__name__)

_FORMAT_VERSION = 1
"""Raised whenever the files below a corpus's folder change their meaning."""

_BATCH_CHARACTERS = 2_000_000

_SECONDS_BETWEEN_REPORTS = 5.0

_COUNTS = "counts.json"


@dataclass(frozen=True)
class Corpus:
    """Where a tokenised corpus lies, and its numbers. Tokens include the end-of-document tokens.

    `prefix`.bin/.idx hold all documents; `windows` holds the split and the indices of its windows of `sequence_length`.
    `fingerprint` is equal for equal text tokenised alike.
    """

    prefix: str
    windows: str
    tokenizer: str
    fingerprint: str
    vocab_size: int
    eod_id: int
    sequence_length: int
    train_documents: int
    train_tokens: int
    validation_documents: int
    validation_tokens: int

    @property
    def num_documents(self) -> int:
        return self.train_documents + self.validation_documents

    @property
    def num_tokens(self) -> int:
        return self.train_tokens + self.validation_tokens

    @property
    def train_samples(self) -> int:
        """Sequences of one epoch."""
        return num_windows(self.train_tokens, self.sequence_length)

    @property
    def validation_samples(self) -> int:
        """Held-out sequences."""
        return num_windows(self.validation_tokens, self.sequence_length)

    def save(self, path: str | Path) -> None:
        """Write as JSON."""
        write_atomically(Path(path), json.dumps(dataclasses.asdict(self), indent=2))

    @classmethod
    def load(cls, path: str | Path) -> Corpus:
        """Read what `save` wrote."""
        return cls(**json.loads(Path(path).read_text(encoding="utf-8")))

    def open(self, split: str) -> WindowDataset:
        """Windows of `train` or `validation`, on any number of ranks at once. Raises DataError when nothing is held out."""
        from eellm.mcore.datasets import open_windows

        if split == "validation" and self.validation_samples == 0:
            raise DataError("no document is held out: give data.split a second share above 0, for example [0.95, 0.05].")
        return open_windows(_window_source(Path(self.prefix), Path(self.windows), split, self.sequence_length))


def prepare_corpus(config: Config) -> Corpus:
    """Read, tokenise and split the corpus of a run, or find all that in the cache.

    Called in the parent before ranks start, and before torch.distributed is initialised. Processes may do it at the
    same time. Raises DataError for unreadable text and for a split too small for one sequence.
    """
    begin = time.perf_counter()
    data = config.data
    content = fingerprint(data)
    tokenizer, tokenizer_path = prepare_tokenizer(data, config.tokenizer, content)
    if config.model.vocab_size is not None and config.model.vocab_size < tokenizer.vocab_size:
        raise DataError(
            f"model.vocab_size={config.model.vocab_size}: the tokenizer has {tokenizer.vocab_size} entries. "
            "Leave model.vocab_size null, or raise it to at least that."
        )
    key = cache_key(_FORMAT_VERSION, content, content_key(tokenizer))
    folder = cache_root(data) / "corpora" / key
    if not folder.is_dir():
        with new_folder(folder) as temporary:
            _tokenise(data, tokenizer, temporary)
    windows = folder / f"windows_{_windows_key(data)}"
    if not windows.is_dir():
        with new_folder(windows) as temporary:
            _split_and_index(data, folder, temporary)
    corpus = Corpus(
        prefix=str(folder / "tokens"),
        windows=str(windows),
        tokenizer=str(tokenizer_path),
        fingerprint=key,
        vocab_size=tokenizer.vocab_size,
        eod_id=tokenizer.eod_id,
        sequence_length=data.sequence_length,
        **json.loads((windows / _COUNTS).read_text()),
    )
    logger.info(
        "corpus: %d documents, %d tokens (%d held out), ready in %.1f s",
        corpus.num_documents,
        corpus.num_tokens,
        corpus.validation_tokens,
        time.perf_counter() - begin,
    )
    return corpus


def num_windows(tokens: int, sequence_length: int) -> int:
    """Windows of sequence_length tokens, each with its next token, in a stream of `tokens`."""
    return max(0, (tokens - 1) // sequence_length)


def held_out_share(split: list[float]) -> float:
    """Share of the held-out documents in data.split, [training] or [training, held out]."""
    if len(split) not in (1, 2) or sum(split) <= 0:
        raise DataError(f"data.split={split}: give the shares of training and held-out documents, for example [0.95, 0.05].")
    return split[1] / sum(split) if len(split) == 2 else 0.0


def _windows_key(data: DataConfig) -> str:
    # GPTDataset names its files after its own description of itself, which another release may change
    release = importlib.metadata.version("megatron-core")
    return cache_key(_FORMAT_VERSION, held_out_share(data.split), data.sequence_length, release)


def _window_source(prefix: Path, folder: Path, split: str, sequence_length: int) -> WindowSource:
    from eellm.mcore.datasets import WindowSource

    return WindowSource(prefix, split, np.load(folder / f"{split}.npy"), sequence_length, folder)


def _tokenise(data: DataConfig, tokenizer: Tokenizer, folder: Path) -> None:
    """Write tokens.bin/.idx (every document ended by the end-of-document token) and what splitting needs to know."""
    from eellm.mcore.datasets import write_documents

    logger.info("tokenising the corpus")
    hashes: list[bytes] = []
    lengths: list[int] = []

    reported = time.monotonic()

    def tokens() -> Iterator[np.ndarray]:
        nonlocal reported
        for batch in _batches(documents(data)):
            for ids in tokenizer.encode_batch(batch):
                ids.append(tokenizer.eod_id)
                lengths.append(len(ids))
                yield np.asarray(ids)
            hashes.extend(hashlib.blake2b(text.encode(), digest_size=8).digest() for text in batch)
            if time.monotonic() - reported > _SECONDS_BETWEEN_REPORTS:
                reported = time.monotonic()
                logger.info("tokenised %d documents, %.1f million tokens", len(lengths), sum(lengths) / 1e6)

    write_documents(folder / "tokens", tokens(), tokenizer.vocab_size)
    np.save(folder / "hashes.npy", np.frombuffer(b"".join(hashes), dtype="<u8"))
    np.save(folder / "lengths.npy", np.asarray(lengths, dtype=np.int64))


def _batches(source: Iterator[Document]) -> Iterator[list[str]]:
    batch: list[str] = []
    characters = 0
    for document in source:
        batch.append(document.text)
        characters += len(document.text)
        if characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _split_and_index(data: DataConfig, tokens: Path, folder: Path) -> None:
    """Write train.npy and validation.npy (document numbers), the indices of their windows, and counts.json."""
    from eellm.mcore.datasets import build_windows

    lengths = np.load(tokens / "lengths.npy")
    share = held_out_share(data.split)
    train, validation = split_documents(np.load(tokens / "hashes.npy"), lengths, share)
    counts: dict[str, int] = {}
    for split, numbers in {"train": train, "validation": validation}.items():
        count = int(lengths[numbers].sum())
        counts |= {f"{split}_documents": len(numbers), f"{split}_tokens": count}
        np.save(folder / f"{split}.npy", numbers)
        if split == "train" or share > 0:
            _check_size(data, split, len(numbers), count)
            build_windows(_window_source(tokens / "tokens", folder, split, data.sequence_length))
    write_atomically(folder / _COUNTS, json.dumps(counts))


def _check_size(data: DataConfig, split: str, number: int, tokens: int) -> None:
    if num_windows(tokens, data.sequence_length) == 0:
        raise DataError(
            f"the {split} split has {number} documents with {tokens} tokens; data.sequence_length={data.sequence_length} needs "
            f"at least {data.sequence_length + 1}. Give more text, shorter sequences, or another data.split (now {data.split})."
        )
