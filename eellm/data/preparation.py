"""Text to .bin/.idx files, for `data=megatron` to read: in shards, by several processes, and restartable.

The documents, in the order of their source, are cut into shards of about equal size; each is tokenised and appears whole,
in one rename, in `<output>.shards/<key>/`. The same command started again keeps the shards that are there. What is
written in the end depends on the text and the tokenizer alone: not on the number of processes, nor on interruptions.
"""

from __future__ import annotations

import collections
import functools
import json
import multiprocessing
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from eellm.config.paths import TOKENIZERS_BESIDE, expanded, made_how
from eellm.config.schema import Config, TokenizerConfig
from eellm.data.cache import cache_key, new_folder, write_atomically
from eellm.data.sources.document import Document
from eellm.data.text import documents, fingerprint
from eellm.data.tokenise import batched, encode_documents
from eellm.data.tokenizer import Tokenizer, content_key
from eellm.data.tokenizer_files import load_tokenizer, prepare_tokenizer
from eellm.errors import DataError

_FORMAT_VERSION = 1
"""Raised whenever the same text and tokenizer give other files."""

Progress = Callable[[int, bool], None]
"""Called after every shard with its characters, and whether it was there already."""


@dataclass(frozen=True)
class Preparation:
    """What is to be written where. `characters` is the size of the whole text."""

    config: Config
    output: Path
    tokenizer: Tokenizer
    tokenizer_file: Path
    characters: int
    how: dict[str, object]

    @classmethod
    def of(cls, config: Config) -> Preparation:
        """Reads all text once: a bad line is found now and not after hours. Raises DataError."""
        data, settings = config.data, config.prepare
        assert settings.output is not None, "checked with the config"
        content = fingerprint(data)
        tokenizer, path = prepare_tokenizer(data, config.tokenizer, content)
        how: dict[str, object] = {
            "format": _FORMAT_VERSION,
            "source": data.source,
            "path": data.path,
            "text": content,
            "tokenizer": content_key(tokenizer),
            "end_of_document": end_of_document(config.tokenizer),
            "vocab_size": tokenizer.vocab_size,
        }
        return cls(config, expanded(settings.output), tokenizer, path, sum(len(text) for _, text in documents(data)), how)

    @property
    def shards(self) -> Path:
        """Folder of the shards, of this text and this tokenizer only."""
        made_of = (_FORMAT_VERSION, self.how["text"], self.how["tokenizer"], self.config.prepare.shard_megabytes)
        return self.output.with_name(f"{self.output.name}.shards") / cache_key(*made_of)

    def is_done(self) -> bool:
        """Whether the output is there already. Raises DataError where there is another one, which stays."""
        index, how = Path(f"{self.output}.idx"), made_how(self.output)
        if not index.exists():
            return False
        there = json.loads(how.read_text(encoding="utf-8")) if how.is_file() else {}
        if all(there.get(key) == self.how[key] for key in ("format", "text", "tokenizer", "end_of_document")):
            return True
        raise DataError(
            f"prepare.output={self.output}: {index.name} is there, made of other text or with another tokenizer. "
            "Choose another prepare.output, or move it away."
        )

    def write(self, progress: Progress) -> dict[str, object]:
        """Make the shards that are missing, merge all of them; returns what `<output>.json` says."""
        count, settings = 0, self.config.prepare
        batches = batched(documents(self.config.data), round(settings.shard_megabytes * 1e6))
        with _encoder(self, settings.workers or len(os.sched_getaffinity(0))) as encoded:
            for folder, characters, tokens in encoded(
                (self.shards / f"{number:06d}", batch) for number, batch in enumerate(batches)
            ):
                if tokens is not None:
                    self._write_shard(folder, tokens)
                progress(characters, tokens is None)
                count += 1
        return self._merge([self.shards / f"{number:06d}" / "tokens" for number in range(count)])

    def _write_shard(self, folder: Path, tokens: list[np.ndarray]) -> None:
        from eellm.mcore.datasets import write_documents

        with new_folder(folder) as temporary:
            write_documents(temporary / "tokens", tokens, self.tokenizer.vocab_size)

    def _merge(self, shards: list[Path]) -> dict[str, object]:
        """The index comes last: with it the output is whole."""
        from eellm.mcore.datasets import merge_documents, open_documents

        merged = self.shards / "merged"
        merge_documents(merged, shards, self.tokenizer.vocab_size)
        stored = open_documents(merged)
        numbers = {"documents": len(stored), "tokens": int(stored.sequence_lengths.sum(dtype=np.int64))}
        how = self.how | numbers | {"dtype": np.dtype(stored.index.dtype).name}
        del stored
        for ending in TOKENIZERS_BESIDE:
            Path(f"{self.output}{ending}").unlink(missing_ok=True)
        write_atomically(Path(f"{self.output}.tokenizer{self.tokenizer_file.suffix}"), self.tokenizer_file.read_bytes())
        write_atomically(made_how(self.output), json.dumps(how, indent=2) + "\n")
        os.replace(f"{merged}.bin", f"{self.output}.bin")
        os.replace(f"{merged}.idx", f"{self.output}.idx")
        shutil.rmtree(self.shards.parent)
        return how


Shard = tuple[Path, list[Document]]
Encoded = tuple[Path, int, list[np.ndarray] | None]
"""A shard's folder, its characters, its documents' tokens; None where the shard is there already."""


@contextmanager
def _encoder(preparation: Preparation, workers: int) -> Iterator[Callable[[Iterator[Shard]], Iterator[Encoded]]]:
    """A function that tokenises the shards that are missing, in their order, `workers` of them at a time."""
    if workers == 1:
        yield lambda shards: (
            (folder, _characters(batch), None if folder.is_dir() else encode_documents(preparation.tokenizer, batch))
            for folder, batch in shards
        )
        return
    # spawned, because the parent may have run threads, which a forked child would wait for
    context = multiprocessing.get_context("spawn")
    start = functools.partial(_start_worker, str(preparation.tokenizer_file), preparation.config.tokenizer)
    with ProcessPoolExecutor(workers, context, start) as pool:
        try:
            yield lambda shards: _in_order(pool, shards, 2 * workers)
        except BrokenProcessPool as error:
            raise DataError(
                "a tokenising process was ended from outside, as the system does when memory runs out. Set fewer "
                "prepare.workers or a smaller prepare.shard_megabytes and start again: finished shards are kept."
            ) from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _in_order(pool: ProcessPoolExecutor, shards: Iterator[Shard], ahead: int) -> Iterator[Encoded]:
    waiting: collections.deque[tuple[Path, int, Future | None]] = collections.deque()
    for folder, batch in shards:
        waiting.append((folder, _characters(batch), None if folder.is_dir() else pool.submit(_encode_in_worker, batch)))
        if len(waiting) >= ahead:
            yield _finished(*waiting.popleft())
    while waiting:
        yield _finished(*waiting.popleft())


def _finished(folder: Path, characters: int, future: Future | None) -> Encoded:
    return folder, characters, None if future is None else future.result()


def _characters(batch: list[Document]) -> int:
    return sum(len(document.text) for document in batch)


def end_of_document(settings: TokenizerConfig) -> str | None:
    """The entry that the user named as the end of a document."""
    return settings.end_of_document if settings.kind == "file" else None


_WORKER: dict[str, Tokenizer] = {}


def _start_worker(tokenizer_file: str, settings: TokenizerConfig) -> None:
    # Ctrl-C reaches every process of a terminal; the parent answers it
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # a process each is the parallelism here
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _WORKER["tokenizer"] = load_tokenizer(tokenizer_file, end_of_document(settings))
    threading.Thread(target=_leave_with_the_parent, daemon=True).start()


def _leave_with_the_parent() -> None:
    """A parent that is killed does not tell its pool, which would wait for work forever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _encode_in_worker(batch: list[Document]) -> list[np.ndarray]:
    return [ids.astype(np.int32) for ids in encode_documents(_WORKER["tokenizer"], batch)]
