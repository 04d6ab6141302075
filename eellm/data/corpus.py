"""A run's corpus, tokenised and split once: what the parent prepares and every rank opens by path."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import logging
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from eellm.config.paths import expanded, prefixes
from eellm.config.schema import Config, DataConfig, TokenizerConfig
from eellm.data import prepared
from eellm.data.answers import AnswerWindows, answers_beside
from eellm.data.blend import Blend, BlendedOrder
from eellm.data.cache import cache_key, cache_root, new_folder, write_atomically
from eellm.data.chat_template import ChatTemplate, find_template
from eellm.data.order import DatasetOrder, SampleOrder
from eellm.data.split import split_stores
from eellm.data.stored import Store, store_of_chats, store_of_text, store_of_tokens
from eellm.data.text import fingerprint
from eellm.data.tokenizer import Tokenizer
from eellm.data.tokenizer_files import prepare_tokenizer
from eellm.errors import DataError

if TYPE_CHECKING:
    from eellm.data.batches import Order, WindowDataset
    from eellm.mcore.datasets import WindowSource

logger = logging.getLogger(__name__)

_FORMAT_VERSION = 2
"""Raised whenever the files below a corpus's folder of windows change their meaning."""

_COUNTS = "counts.json"


@dataclass(frozen=True)
class CorpusPart:
    """Documents of one pair of files. `prefix`.bin/.idx hold all of them; `windows` holds the split and the indices of its
    windows. `weight` is the part's share of a blend, None where parts count by their size."""

    prefix: str
    windows: str
    weight: float | None
    train_documents: int
    train_tokens: int
    validation_documents: int
    validation_tokens: int

    def tokens(self, split: str) -> int:
        return self.train_tokens if split == "train" else self.validation_tokens


@dataclass(frozen=True)
class Corpus:
    """Where a tokenised corpus lies, and its numbers. Tokens include the end-of-document tokens.

    Text is one part; `data=megatron` has one for each of its prefixes. `fingerprint` is equal for equal documents
    tokenised alike.
    """

    parts: list[CorpusPart]
    tokenizer: str
    fingerprint: str
    vocab_size: int
    eod_id: int
    sequence_length: int

    @property
    def num_documents(self) -> int:
        return sum(part.train_documents + part.validation_documents for part in self.parts)

    @property
    def num_tokens(self) -> int:
        return self.train_tokens + self.validation_tokens

    @property
    def train_tokens(self) -> int:
        return sum(part.train_tokens for part in self.parts)

    @property
    def validation_tokens(self) -> int:
        return sum(part.validation_tokens for part in self.parts)

    @property
    def train_samples(self) -> int:
        """Sequences to train on; without weights, those of one epoch."""
        return sum(self._windows("train"))

    @property
    def validation_samples(self) -> int:
        """Held-out sequences that can be read in the blend's shares without reading one twice."""
        sizes = self._windows("validation")
        return sum(sizes) if len(sizes) < 2 else Blend(self._shares("validation")).until_exhausted(sizes)

    def save(self, path: str | Path) -> None:
        """Write as JSON."""
        write_atomically(Path(path), json.dumps(dataclasses.asdict(self), indent=2))

    @classmethod
    def load(cls, path: str | Path) -> Corpus:
        """Read what `save` wrote."""
        values = json.loads(Path(path).read_text(encoding="utf-8"))
        return cls(**values | {"parts": [CorpusPart(**part) for part in values["parts"]]})

    def open(self, split: str) -> WindowDataset:
        """Windows of `train` or `validation`, on any number of ranks at once, the parts' end to end.

        Raises DataError when nothing is held out, and when files have vanished.
        """
        parts = self._parts(split)
        if not parts:
            raise DataError("no document is held out: give data.split a second share above 0, for example [0.95, 0.05].")
        opened = [_open_part(part, split, self.sequence_length) for part in parts]
        if len(opened) == 1:
            return opened[0]
        from torch.utils.data import ConcatDataset

        return ConcatDataset(opened)  # type: ignore[arg-type]

    def training_order(self, seed: int) -> Order:
        """Sample number -> index in `open("train")`: a function of the seed and the blend's weights."""
        parts, sizes = self._parts("train"), self._windows("train")
        if len(parts) == 1 or parts[0].weight is None:
            return SampleOrder(seed, sum(sizes))
        return BlendedOrder(Blend(self._shares("train")), [SampleOrder(seed, size) for size in sizes])

    def validation_order(self) -> Order:
        """Sample number -> index in `open("validation")`: a blend's parts in turn, by their shares."""
        sizes = self._windows("validation")
        if len(sizes) == 1:
            return DatasetOrder(sizes[0])
        return BlendedOrder(Blend(self._shares("validation")), [DatasetOrder(size) for size in sizes])

    def _parts(self, split: str) -> list[CorpusPart]:
        return [part for part in self.parts if num_windows(part.tokens(split), self.sequence_length) > 0]

    def _windows(self, split: str) -> list[int]:
        return [num_windows(part.tokens(split), self.sequence_length) for part in self._parts(split)]

    def _shares(self, split: str) -> list[float]:
        weights = [part.weight for part in self._parts(split)]
        return [float(size) for size in self._windows(split)] if None in weights else [weight for weight in weights if weight]


def prepare_corpus(config: Config) -> Corpus:
    """Read, tokenise and split the corpus of a run, or find all that in the cache.

    Called in the parent before ranks start, and before torch.distributed is initialised. Processes may do it at the
    same time. Raises DataError for unreadable text and for a split too small for one sequence.
    """
    begin = time.perf_counter()
    data = config.data
    if data.source == "megatron":
        tokenizer, tokenizer_path = prepare_tokenizer(data, prepared.tokenizer_of(data, config.tokenizer))
        _check_vocabulary(config, tokenizer)
        stores = [store_of_tokens(data, prefix, tokenizer) for prefix in prefixes(data.path)]
        held_out = [store_of_tokens(data, prefix, tokenizer) for prefix in prefixes(data.validation_path)]
        for store in [*stores, *held_out]:
            prepared.check_ends(data, store, tokenizer)
    else:
        content = fingerprint(data)
        tokenizer, tokenizer_path = prepare_tokenizer(data, config.tokenizer, content)
        _check_vocabulary(config, tokenizer)
        if data.source == "chats":
            stores = [store_of_chats(data, content, tokenizer, chat_template_of(config.tokenizer, tokenizer))]
        else:
            stores = [store_of_text(data, content, tokenizer)]
        held_out = []
    corpus = Corpus(
        parts=_parts(data, stores, held_out),
        tokenizer=str(tokenizer_path),
        fingerprint=_common_fingerprint([*stores, *held_out]),
        vocab_size=tokenizer.vocab_size,
        eod_id=tokenizer.eod_id,
        sequence_length=data.sequence_length,
    )
    logger.info(
        "corpus: %d documents, %d tokens (%d held out), ready in %.1f s",
        corpus.num_documents,
        corpus.num_tokens,
        corpus.validation_tokens,
        time.perf_counter() - begin,
    )
    return corpus


def chat_template_of(settings: TokenizerConfig, tokenizer: Tokenizer) -> ChatTemplate:
    """The template that comes with a tokenizer. Raises DataError where there is none."""
    source = None
    if settings.path is not None:
        path = expanded(settings.path)
        source = find_template(None, path / "tokenizer.json" if path.is_dir() else path)
    if source is None:
        raise DataError(
            "data.source=chats: no chat template (chat_template.jinja, or tokenizer_config.json with one) lies beside the "
            f"tokenizer{'' if settings.path is None else f' {settings.path}'}. Put the model's there."
        )
    return ChatTemplate(source, tokenizer)


def _check_vocabulary(config: Config, tokenizer: Tokenizer) -> None:
    if config.model.vocab_size is not None and config.model.vocab_size < tokenizer.vocab_size:
        raise DataError(
            f"model.vocab_size={config.model.vocab_size}: the tokenizer has {tokenizer.vocab_size} entries. "
            "Leave model.vocab_size null, or raise it to at least that."
        )


def _common_fingerprint(stores: list[Store]) -> str:
    return stores[0].fingerprint if len(stores) == 1 else cache_key(*(store.fingerprint for store in stores))


def _parts(data: DataConfig, stores: list[Store], held_out: list[Store]) -> list[CorpusPart]:
    """Split the documents, and index the windows of every part, unless the cache has them."""
    # GPTDataset names its files after its own description of itself, which another release may change
    release = importlib.metadata.version("megatron-core")
    made_of = [[store.fingerprint for store in stores], [store.fingerprint for store in held_out]]
    key = cache_key(_FORMAT_VERSION, *made_of, held_out_share(data.split), data.sequence_length, release)
    folder, every = cache_root(data) / "windows" / key, [*stores, *held_out]
    if folder.is_dir() and not all((folder / str(number) / _COUNTS).is_file() for number in range(len(every))):
        shutil.rmtree(folder, ignore_errors=True)
    if not folder.is_dir():
        with new_folder(folder) as temporary:
            splits = split_stores(stores, held_out, held_out_share(data.split))
            for number, (store, numbers) in enumerate(zip(every, splits, strict=True)):
                _index(data, store, numbers, temporary / str(number))
    weights: list[float | None] = [None] * len(stores + held_out)
    if data.weights is not None:
        weights[: len(stores)] = data.weights
    return [
        CorpusPart(
            str(store.prefix), str(folder / str(number)), weight, **json.loads((folder / str(number) / _COUNTS).read_text())
        )
        for number, (store, weight) in enumerate(zip(every, weights, strict=True))
    ]


def num_windows(tokens: int, sequence_length: int) -> int:
    """Windows of sequence_length tokens, each with its next token, in a stream of `tokens`."""
    return max(0, (tokens - 1) // sequence_length)


def held_out_share(split: list[float]) -> float:
    """Share of the held-out documents in data.split, [training] or [training, held out]."""
    if len(split) not in (1, 2) or sum(split) <= 0:
        raise DataError(f"data.split={split}: give the shares of training and held-out documents, for example [0.95, 0.05].")
    return split[1] / sum(split) if len(split) == 2 else 0.0


def _open_part(part: CorpusPart, split: str, sequence_length: int) -> WindowDataset:
    from eellm.mcore.datasets import open_windows

    def windows(prefix: Path) -> WindowDataset:
        return open_windows(_window_source(prefix, Path(part.windows), split, sequence_length))

    answers = answers_beside(Path(part.prefix))
    tokens = windows(Path(part.prefix))
    return tokens if answers is None else AnswerWindows(tokens, windows(answers))


def _window_source(prefix: Path, folder: Path, split: str, sequence_length: int) -> WindowSource:
    from eellm.mcore.datasets import WindowSource

    numbers = folder / f"{split}.npy"
    if not numbers.is_file():
        raise DataError(
            f"{numbers}: the split is not there any more; was the cache cleared meanwhile? "
            "Prepare the corpus again: start the same command again."
        )
    return WindowSource(prefix, split, np.load(numbers), sequence_length, folder)


def _index(data: DataConfig, store: Store, numbers: dict[str, np.ndarray], folder: Path) -> None:
    """Write train.npy and validation.npy (document numbers), the indices of their windows, and counts.json."""
    from eellm.mcore.datasets import build_windows

    folder.mkdir()
    lengths = store.lengths
    counts: dict[str, int] = {}
    for split in ("train", "validation"):
        chosen = numbers.get(split, np.empty(0, dtype=np.int64))
        count = int(lengths[chosen].sum())
        counts |= {f"{split}_documents": len(chosen), f"{split}_tokens": count}
        np.save(folder / f"{split}.npy", chosen)
        if split in numbers:
            _check_size(data, store, split, len(chosen), count)
            for prefix in filter(None, (store.prefix, answers_beside(store.prefix))):
                build_windows(_window_source(prefix, folder, split, data.sequence_length))
    write_atomically(folder / _COUNTS, json.dumps(counts))


def _check_size(data: DataConfig, store: Store, split: str, number: int, tokens: int) -> None:
    if num_windows(tokens, data.sequence_length) == 0:
        where = f" of {store.prefix}" if data.source == "megatron" else ""
        length = data.sequence_length
        raise DataError(
            f"the {split} split{where} has {number} documents with {tokens} tokens; data.sequence_length={length} needs "
            f"at least {length + 1}. Give more text, shorter sequences, or another data.split (now {data.split})."
        )
